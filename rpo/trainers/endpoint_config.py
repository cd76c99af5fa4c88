"""The settings of the endpoint gradient, refused at once when no run can have them."""

from dataclasses import field
from typing import Literal

from rpo.config.ranges import NotNegative, Positive
from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.trainers.rollouts.settings import OnlineConfig
from rpo.trainers.value.settings import ValueConfig


@settings
class EndpointConfig(OnlineConfig):
    """Settings of `Endpoint`; what learnt fastest on `shapes` is in `configs/endpoint_shapes.yaml`."""

    baseline: Literal["group", "value"] = "group"
    """What an image's reward is compared with: the other images of its prompt, or V(t, x_t)."""

    scale: Literal["none", "batch"] = "batch"
    """What the difference is divided by: the spread of the whole rollout, or nothing."""

    consistency: NotNegative = 0.0
    """Weight of fitting every image as it came out, whatever its reward. For a policy that
    reverses the noising process this has no gradient on average; it holds the policy to being one. 0.1 to 0.5 where
    `bound_clip` is not to be used; more is noisier and trains the policy on its own images."""

    bound_clip: Positive | None = 0.3
    """How far an image may be pushed or pulled, as a share of what the reference has: where the
    bound of its likelihood has moved that far, a point says no more. 0.1 to 0.5; nothing for no limit, and then low
    rewards push without bound until the images break (watch `policy/kl` and `loop/grad_norm` rise together)."""

    value: ValueConfig = field(default_factory=ValueConfig)
    """The value network, for `baseline: value`."""

    def __post_init__(self) -> None:
        """Refuse settings that no run can have."""
        if self.steps.keep_graph or self.steps.updates_per_rollout > 1:
            raise InputError(
                "endpoint learns at moments that no rollout passed through: it has no ratio and no graph of a rollout; "
                "set steps.keep_graph: false, minibatches and passes: 1"
            )
        if self.baseline == "group":
            self.require_group("baseline: value")
        if self.value.trace != 1:
            raise InputError(
                f"value.trace is {self.value.trace:g}, but the moments of endpoint are no path whose next node V could "
                "be fitted to; leave it out"
            )
