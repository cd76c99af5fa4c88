"""The settings of score-as-action, refused at once when no run can have them."""

from dataclasses import field
from typing import Literal

from rpo.config.ranges import Fraction, Positive
from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.trainers.rollouts.settings import OnlineConfig
from rpo.trainers.value.settings import ValueConfig

Estimator = Literal["pathwise", "likelihood", "likelihood_state_cost"]
Update = Literal["plain", "clip", "trust_region"]
AdvantageKind = Literal["value_difference", "return_minus_value", "gae", "group"]
Normalize = Literal["none", "batch", "per_step"]


@settings
class ScoreAsActionConfig(OnlineConfig):
    """Settings of `ScoreAsAction`; the defaults are the method with its value network, on any checkpoint."""

    estimator: Estimator = "likelihood"
    """Which form of the policy gradient: along the slope of V (`pathwise`: any solver, no transition density), by
    likelihood with the sampled log-ratio as running cost, or by likelihood with the exact cost of each step and its
    explicit derivative. All three are the same gradient in expectation."""

    update: Update = "plain"
    """What is done with it: a plain step, PPO's clip on the ratio per dimension, or a penalty on the distance from the
    policy that drew the rollout, whose weight adapts. The last two are for several updates per rollout."""

    advantage: AdvantageKind = "gae"
    """What a step is worth in a likelihood estimator: how V changed over it, how it all ended minus V, the mixture
    (`trace`), or how the image compares with others of its prompt (no V is used)."""

    trace: Fraction = 0.9
    """Of the advantage "gae": 0 is how V changed over the step, 1 how it all ended minus V."""

    normalize: Normalize = "batch"
    """Scale of the advantages: as they are, divided by one number per rollout, or by one number per step, which
    preconditions the gradient over time (the authors' code does; it is another objective)."""

    clip: Positive = 1e-4
    """Of the ratio per dimension, for update "clip". 1e-5 to 1e-3; times the latent's dimensions it is in nats."""

    trust_region_target: Positive = 1.0
    """√KL per path that an update may move the policy; C grows above it and shrinks below."""

    value: ValueConfig = field(default_factory=ValueConfig)
    """The value network."""

    def __post_init__(self) -> None:
        """Refuse settings that no run can have."""
        if self.estimator == "pathwise":
            self._check_pathwise()
        else:
            self.require_density("estimator: pathwise")
            self.require_same_guidance("the likelihood of what was drawn is that of the policy that drew it")
            if self.advantage == "group":
                self.require_group("advantage: gae")
        if self.update == "trust_region" and self.steps.updates_per_rollout == 1:
            raise InputError(
                "update is trust_region with one update per rollout, before which the policy has not moved; set "
                "steps.minibatches or steps.passes above 1, or update: plain"
            )

    def _check_pathwise(self) -> None:
        if self.update == "clip":
            raise InputError(
                "update is clip with the pathwise estimator, which has no ratio to clip; use plain or trust_region"
            )
        if not (self.value.uses_reward or self.value.sees_latents):
            raise InputError(
                "estimator is pathwise with value.uses_reward and value.sees_latents off, so V would not depend on the "
                "latents; set one of them"
            )
        if self.freezes_negative and self.rollout.guidance_scale == 1:
            raise InputError(
                "steps.freeze_negative takes the negative branch from the rollout, which has none: its guidance_scale "
                f"is 1, and steps.guidance_scale {self.guidance_scale:g}; give steps.freeze_negative=false, or "
                "guidance in the rollout"
            )
        if self.kl_weight > 0 or self.steps.updates_per_rollout > 1 or self.steps.keep_graph:
            self.require_same_guidance(
                "the path's cost, its distance from the rollout and its graph are those of the guidance it was drawn "
                "with"
            )

    @property
    def explicit_cost(self) -> bool:
        """Whether the cost of a step is differentiated as such; a log-ratio is not, since its slope has mean 0."""
        return self.kl_weight > 0 and self.estimator != "likelihood"

    @property
    def uses_value(self) -> bool:
        """Whether V takes part in the gradient."""
        return self.estimator == "pathwise" or self.advantage != "group"
