"""Score as action (Zhao et al., arXiv:2502.01819): policy gradients for diffusion models in continuous time.

The denoiser's score is the action of a control problem whose state is x_t; for a prompt it is to maximise

    J = E[ r(x_0) - kl_weight ∫ ½|u|² dt ],      u = (1+η²)/(2η) g (s_θ - s_ref),

where the running cost is the KL of the path from the reference's. V(t, x) is J from (t, x) on. Per rollout:

    draw     N steps of the policy, on a grid that may be another each time
    judge    r at the end; c_k, the cost of every step; V at every node
    learn    at K of the steps: Σ_k over the path, never a mean, so that the gradient does not depend on N
    value    fit V to what came of it, after it has been used

Differs from the authors' code, which has no running cost in the runs that use V, never follows the gradient of V, and
scales the advantages of every step apart: see `estimator`, `kl_weight` and `normalize`. What V sees at the data end is
the reward itself.

Only what was learnt at η = 1 may be sampled with another solver or noise level afterwards. Below 1 the score is tuned
for its own sampler, and x_0 keeps a memory of the initial noise (a factor α_T^{η²}: 0.07 at η = 1, 0.5 at η = 0.5 for
SD 1.5), by which the result falls short of r/kl_weight's tilt of the reference.
"""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor, nn

from rpo.objectives.policy_gradient import Surrogate, clipped_surrogate, log_ratio_cost, pathwise, plain, trust_region
from rpo.process.diffusion import require_gaussian
from rpo.process.transition import Transition, mean_of
from rpo.rewards import RewardLike
from rpo.trainers.rollouts.algorithm import OnlineAlgorithm
from rpo.trainers.rollouts.costs import step_cost
from rpo.trainers.rollouts.draw import OnImages, Rollout
from rpo.trainers.rollouts.prompts import PromptSource
from rpo.trainers.rollouts.steps import Steps, all_steps_of, mean_loss, replayed, transition_by
from rpo.trainers.rollouts.trust_region import TrustRegion
from rpo.trainers.score_as_action_config import ScoreAsActionConfig
from rpo.trainers.trainer import Run
from rpo.trainers.value import returns as returns_of
from rpo.trainers.value.inputs import value_gradient
from rpo.trainers.value.returns import PathReturns, advantages, fit_value, make_value, path_returns, scaled
from rpo.training.state import Stateful
from rpo.types import StepOutput


@final
class ScoreAsAction(OnlineAlgorithm):
    """Learns from a reward by continuous-time policy gradients.

    Attributes:
        value: V, or None where the settings use none.
    """

    config: ScoreAsActionConfig

    def __init__(
        self,
        rewards: RewardLike,
        prompts: PromptSource,
        config: ScoreAsActionConfig | None = None,
        *,
        value_network: nn.Module | None = None,
        on_images: OnImages | None = None,
    ):
        """Keep what to learn from; see `OnlineAlgorithm`.

        Args:
            value_network: F of the value, from `ValuePoints` to one number each; the package's own by default.
        """
        super().__init__(rewards, prompts, config or ScoreAsActionConfig(), on_images=on_images)
        self._network = value_network

    def start(self, run: Run) -> None:
        """Take the model, and make V."""
        require_gaussian(run.model, "score as action")
        super().start(run)
        config = self.config
        self.region = TrustRegion(config.trust_region_target)
        self.value = None
        if config.uses_value:
            is_differentiable = config.estimator == "pathwise"
            self.value = make_value(self.collector, config.value, self._network, is_differentiable=is_differentiable)

    def collect(self, index: int) -> Steps:
        """Draw rollout `index` and say what its trained steps are worth; then fit V to it."""
        config, collector = self.config, self.collector
        if index == 0:
            for number in range(config.value.pretrain_rollouts if self.value else 0):
                returns, _ = self._returns(collector.draw(-1 - number))
                fit_value(self.value, returns, config.value, updates=returns_of.PRETRAIN_UPDATES)
        rollout = collector.draw(index)
        returns, references = self._returns(rollout)
        steps = self._worth(collector.steps(rollout), returns)
        facts = dict(steps.facts)
        if references is None:
            facts["policy/kl"] = collector.measured_kl(rollout)
        else:
            steps = steps.knowing(reference=references[steps.step, steps.image])
        facts |= fit_value(self.value, returns, config.value, updates=config.value.updates)
        return replace(steps, facts={name: number.to(steps.x_t.device) for name, number in facts.items()})

    def _returns(self, rollout: Rollout) -> tuple[PathReturns, Tensor | None]:
        """What came of a rollout, and the reference's outputs at every step, [steps, images, …], if they were asked."""
        config, collector, model = self.config, self.collector, self.run.model
        shape, references = rollout.trajectory.log_probs.shape, None
        costs = torch.zeros(shape, device=rollout.rewards.device)
        if config.kl_weight > 0 and rollout.index >= 0:  # before training the policy is the reference
            steps = all_steps_of(rollout)
            reference = collector.reference(steps)
            if config.estimator == "likelihood":
                at_reference = transition_by(model, reference, steps, collector.kernel)
                cost = log_ratio_cost(steps["log_prob"], at_reference.log_prob(steps.x_s))
            else:
                cost = step_cost(model, steps["prediction"], reference, steps, collector.kernel)
            # A step to perfectly clean data adds no noise: it has no KL, and is not trained.
            costs = config.kl_weight * torch.where(cost.isfinite(), cost, 0.0).view(shape)
            references = reference.view(*shape, *reference.shape[1:])
        size = collector.batch_size
        return path_returns(rollout, collector.chosen, costs, self.value, model, batch_size=size), references

    def _worth(self, steps: Steps, returns: PathReturns) -> Steps:
        """The steps with their advantage, or the slope of V where they led; what their KL costs is in the same unit."""
        config = self.config
        if config.estimator == "pathwise" and self.value is not None:
            slope = value_gradient(
                self.run.model,
                self.value,
                returns.rollout,
                steps,
                guidance_scale=config.guidance_scale,
                batch_size=self.collector.batch_size,
            )
            return steps.knowing(slope=slope, cost_weight=torch.full_like(steps.weight, config.kl_weight))
        found = advantages(returns, config.advantage, trace=config.trace)
        advantage, scale = scaled(found, config.normalize, self.run.processes, returns.rollout.judged)
        row = steps.step - returns.first
        cost_weight = config.kl_weight / scale[row, steps.image]
        return steps.knowing(advantage=advantage[row, steps.image], cost_weight=cost_weight)

    def loss(self, steps: Steps) -> StepOutput:
        """The negative policy gradient of a micro-batch of steps, by the estimator that the settings name."""
        config, model, kernel = self.config, self.run.model, self.collector.kernel
        noise_pred, transition = replayed(model, steps, kernel, guidance_scale=config.guidance_scale)
        facts = dict(steps.facts)
        if config.estimator == "pathwise":
            old = transition_by(model, steps["prediction"], steps, kernel)
            per_step = pathwise(mean_of(transition) - mean_of(old), steps["slope"])
        else:
            surrogate = self._surrogate(transition, steps)
            per_step = surrogate.loss
            facts |= {"policy/ratio": surrogate.ratio.mean(), "policy/clipped": surrogate.is_clipped.float().mean()}
        if "reference" in steps:
            with torch.set_grad_enabled(torch.is_grad_enabled() and config.explicit_cost):
                cost = step_cost(model, noise_pred, steps["reference"], steps, kernel)
            facts["policy/kl"] = (steps.weight * cost.detach()).mean()
            if config.explicit_cost:
                per_step = per_step + steps["cost_weight"] * cost
        per_step = steps.weight * per_step
        if config.steps.updates_per_rollout > 1:
            moved = steps.weight * step_cost(model, noise_pred, steps["prediction"], steps, kernel)
            facts["policy/kl_from_rollout"] = moved.detach().mean()
            if config.update == "trust_region":
                facts["policy/trust_region"] = moved.new_full((), self.region.coefficient)
                per_step = per_step + trust_region(moved, self.region.coefficient)
        return mean_loss(per_step, steps, facts)

    def _surrogate(self, transition: Transition, steps: Steps) -> Surrogate:
        log_prob, num_dims = transition.log_prob(steps.x_s), transition.num_dims
        known = log_prob, steps["log_prob"], steps["advantage"]
        if self.config.update == "clip":
            return clipped_surrogate(*known, num_dims=num_dims, clip=self.config.clip)
        return plain(*known, num_dims=num_dims)

    def prepare(self) -> None:
        """Give every process the same V: a network of the caller's may differ between them."""
        if self.value is not None:
            self.run.processes.broadcast(list(self.value.network.parameters()))

    def after(self, update: int, metrics: dict[str, float]) -> None:
        """Adapt the trust region once per rollout."""
        if self.config.update == "trust_region" and update % self.config.steps.updates_per_rollout == 0:
            self.region.observe(metrics["policy/kl_from_rollout"])

    def plan(self) -> list[str]:
        """That of the rollouts; and what a noise level other than 1 means."""
        eta = self.config.rollout.eta
        note = f"eta {eta:g}: what is learnt is right for this sampler only; sample the result so, or train at eta 1"
        return super().plan() + ([] if eta == 1 else [note])

    @property
    def state(self) -> dict[str, Stateful]:
        """The rollout in use, the trust region and V."""
        return super().state | {"region": self.region} | ({} if self.value is None else {"value": self.value})
