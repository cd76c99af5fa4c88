"""The settings of learning from whole images, refused at once when no run can have them."""

from dataclasses import field, replace
from typing import ClassVar

from rpo.config.ranges import GuidanceScale
from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.objectives.endpoint import EndpointObjective
from rpo.objectives.endpoint.bound import Bound
from rpo.trainers.rollouts.settings import OnlineConfig
from rpo.trainers.value.settings import ValueConfig


@settings
class EndpointConfig(OnlineConfig):
    """Settings of `Endpoint`; what learnt fastest on `shapes` is in `configs/endpoint_shapes.yaml`."""

    renamed: ClassVar[dict[str, str]] = {
        **OnlineConfig.renamed,
        **{name: f"it is objective.{name} now" for name in ("baseline", "scale", "consistency")},
        "bound_clip": "it is objective.clip now",
    }

    objective: EndpointObjective = field(default_factory=Bound)
    """What is descended: score_as_action is the bound on the likelihood of whole images; nft, awm, ram, rvm, par, dgpo
    and rebel are published objectives, each as its authors run it."""

    reference_guidance: GuidanceScale | None = None
    """Guidance of what the reference of a published objective says; nothing means that of training. DGPO without
    guidance is run with 4.5."""

    value: ValueConfig = field(default_factory=ValueConfig)
    """The value network, for `objective.baseline: value`."""

    def with_times(self) -> "EndpointConfig":
        """The same, with the times of the objective's authors where `steps` leaves them open."""
        if isinstance(self.objective, Bound):
            return self
        times, steps, drawn = self.objective.times, self.steps, self.rollout.num_steps
        window = steps.window or times.window
        low, high = window or (0.0, 1.0)
        eligible = sum(low <= step / drawn < high for step in range(drawn - 1))
        count = steps.train_steps or (times.count and min(times.count, eligible))
        return replace(self, steps=replace(steps, window=window, train_steps=count or None))

    def __post_init__(self) -> None:
        """Refuse settings that no run can have."""
        if self.steps.keep_graph:
            raise InputError(
                "endpoint learns at moments that no rollout passed through: it has no graph of a rollout; set "
                "steps.keep_graph: false"
            )
        if not isinstance(self.objective, Bound):
            self.require_group("objective.kind: score_as_action with objective.baseline: value")
            if self.kl_weight > 0:
                raise InputError(
                    f"kl_weight is {self.kl_weight:g}, in nats of a path, but {self.objective.kind} has a trust region "
                    "of its own; expected 0; see objective.reference_weight and objective.old"
                )
        elif self.objective.baseline == "group":
            self.require_group("objective.baseline: value")
        if self.reference_guidance is not None:
            self._require_reference(self.reference_guidance)
        if self.value.trace != 1:
            raise InputError(
                f"value.trace is {self.value.trace:g}, but the moments of endpoint are no path whose next node V could "
                "be fitted to; leave it out"
            )

    def _require_reference(self, guidance: float) -> None:
        objective = self.objective
        if isinstance(objective, Bound):
            raise InputError(
                f"reference_guidance is {guidance:g} with objective.kind score_as_action, which measures likelihoods "
                "against a reference that is guided as the policy is; leave it out, or take a published objective"
            )
        if "reference" not in objective.needs:
            raise InputError(
                f"reference_guidance is {guidance:g}, but objective.kind {objective.kind} asks no reference as it is "
                "set; give objective.reference_weight above 0, or leave it out"
            )
