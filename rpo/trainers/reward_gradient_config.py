"""The settings of learning along a reward's slope, refused at once when no run can have them."""

from dataclasses import field, replace

from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.objectives.reward_gradient import AlongPath, RewardGradientObjective
from rpo.objectives.reward_gradient.adjoint_matching import AdjointMatching
from rpo.objectives.reward_gradient.draft import Draft
from rpo.objectives.reward_gradient.refl import Refl
from rpo.objectives.reward_gradient.srpo import Srpo
from rpo.trainers.rollouts.settings import OnlineConfig

LATE = 0.75
"""Share of the path behind which ReFL's steps lie, of as many as there are."""


@settings
class RewardGradientConfig(OnlineConfig):
    """Settings of `RewardGradient`; those for `shapes` are in `configs/reward_gradient_shapes.yaml`."""

    objective: RewardGradientObjective = field(default_factory=Draft)
    """What is followed back: draft and alignprop through the sampler's last steps, refl from one late step, srpo from
    noised images, adjoint_matching through the reference, to an optimum that is known."""

    def with_steps(self) -> "RewardGradientConfig":
        """The same, with the steps that the objective learns where `steps` leaves them open."""
        steps, objective = self.steps, self.objective
        if isinstance(objective, Srpo):
            window = steps.window or (objective.step, 1 - objective.step)
            return replace(
                self, steps=replace(steps, window=window, train_steps=steps.train_steps or objective.moments)
            )
        if isinstance(objective, Refl):
            last = (self.rollout.num_steps - 1) / self.rollout.num_steps
            window = steps.window or (min(LATE, last), 1.0)
            return replace(self, steps=replace(steps, window=window, train_steps=steps.train_steps or 1))
        return replace(self, steps=replace(steps, window=steps.window or self._counting))

    @property
    def _counting(self) -> tuple[float, float] | None:
        """The window of the steps that count, where the objective says which."""
        return (self.first_step / self.rollout.num_steps, 1.0) if self.first_step else None

    @property
    def first_step(self) -> int:
        """From which on a path's steps count, where the objective says so."""
        if not isinstance(self.objective, AlongPath):
            return 0
        return int(self.objective.step_weights(self.rollout.num_steps).nonzero()[0])

    def __post_init__(self) -> None:
        """Refuse settings that no run can have."""
        objective, steps = self.objective, self.steps
        if steps.keep_graph:
            raise InputError(
                "steps.keep_graph is true, but reward gradients are followed back a step at a time and need no graph "
                "of a rollout; leave it out"
            )
        if isinstance(objective, AlongPath):
            self._check_path(objective)
        elif self.kl_weight > 0 and isinstance(objective, Srpo):
            raise InputError(
                f"kl_weight is {self.kl_weight:g}, in nats of a path, but srpo learns at moments that lie on none; "
                "expected 0; lower learning.learning_rate, or give objective.margin"
            )
        if steps.updates_per_rollout > 1 and not isinstance(objective, AdjointMatching):
            raise InputError(
                f"a rollout serves {steps.updates_per_rollout} updates, but the slope of {objective.kind} is that of "
                "the policy that drew it; set steps.minibatches and steps.passes to 1, or take adjoint_matching"
            )

    def _check_path(self, objective: AlongPath) -> None:
        rollout = self.rollout
        if rollout.solver == "dpm_solver" or rollout.max_steps is not None:
            raise InputError(
                f"objective.kind {objective.kind} follows the steps that were drawn, one leading to the next, but "
                "rollout.solver is dpm_solver, whose steps remember others, or rollout.max_steps is given; take ddim "
                "or euler_maruyama, and a fixed rollout.num_steps"
            )
        if self._counting not in (None, self.steps.window) and self.steps.window is not None:
            raise InputError(
                f"steps.window is {self.steps.window}, but the objective says which steps count; leave it out"
            )
        if not isinstance(objective, AdjointMatching):
            self.require_same_guidance("the slope is that of what was drawn")
            return
        if self.kl_weight == 0:
            raise InputError(
                "kl_weight is 0, but adjoint_matching goes to the reference tilted by exp(reward/kl_weight); give a "
                "positive one: the reward's spread within a prompt, divided by the nats that may be spent"
            )
        if rollout.eta not in (0, 1) or (rollout.eta == 0 and objective.last_steps is None):
            raise InputError(
                f"rollout.eta is {rollout.eta:g} with objective.last_steps {objective.last_steps}, but "
                "adjoint_matching needs eta 1, at which a path forgets its start, or eta 0 and objective.last_steps, "
                "such as 4"
            )
