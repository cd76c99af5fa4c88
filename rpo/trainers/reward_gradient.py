"""Learning from a reward that can be differentiated by the image: no likelihood, no group, no value.

Let v_k be what the network says at step k of a path, and λ_k the slope of what the image earns by it. All methods here
descend

    loss = Σ_k -⟨v_k, λ_k⟩ + kl_weight KL_k(π_θ ‖ π_ref)

and differ in how λ_k is found: through the sampler's last steps (draft, alignprop), from the image that a late step
predicts (refl), from noised images whose noise is known (srpo), or through the reference (adjoint_matching), by which
it is a regression on the control of the optimum. λ is found once per rollout, a step at a time, so that memory does
not grow with how far it is followed; see `rpo.trainers.rollouts.reward_slopes`.

A reward is climbed by all means that it leaves open, and a gradient finds more of them than samples do: watch another
reward. Only adjoint_matching at eta 1 and a `kl_weight` have an optimum that is known.
"""

from dataclasses import replace
from typing import final

import torch

from rpo.objectives.endpoint.update import Times
from rpo.objectives.policy_gradient import pathwise
from rpo.objectives.reward_gradient.adjoint_matching import AdjointMatching
from rpo.objectives.reward_gradient.refl import Refl
from rpo.objectives.reward_gradient.srpo import Srpo
from rpo.process.diffusion import require_gaussian
from rpo.process.transition import Ddim
from rpo.rewards import RewardLike
from rpo.rewards.differentiable import require_differentiable
from rpo.trainers.checks.preflight import Check
from rpo.trainers.checks.slope import slope_check
from rpo.trainers.reward_gradient_config import RewardGradientConfig
from rpo.trainers.rollouts.algorithm import OnlineAlgorithm
from rpo.trainers.rollouts.costs import step_cost
from rpo.trainers.rollouts.draw import OnImages, Rollout
from rpo.trainers.rollouts.noised import NoisedImages
from rpo.trainers.rollouts.prompts import PromptSource
from rpo.trainers.rollouts.reward_slopes import RewardSlopes
from rpo.trainers.rollouts.steps import Steps, mean_loss, replayed
from rpo.trainers.trainer import Run
from rpo.types import Latents, StepOutput


@final
class RewardGradient(OnlineAlgorithm):
    """Learns along the slope of a reward.

    Attributes:
        slopes: Finds λ.
    """

    config: RewardGradientConfig

    def __init__(
        self,
        rewards: RewardLike,
        prompts: PromptSource,
        config: RewardGradientConfig | None = None,
        *,
        on_images: OnImages | None = None,
    ):
        """Keep what to learn from; see `OnlineAlgorithm`. Rewards must be torch functions of the images."""
        super().__init__(rewards, prompts, (config or RewardGradientConfig()).with_steps(), on_images=on_images)
        require_differentiable(self.rewards)

    @property
    def title(self) -> str:
        """Of the objective."""
        return self.config.objective.title

    @property
    def replays(self) -> bool:
        """Not where images are noised afresh."""
        return not isinstance(self.config.objective, Srpo)

    @property
    def is_matched(self) -> bool:
        """Whether the slope is the reference's, and the policy is fitted to it."""
        return isinstance(self.config.objective, AdjointMatching)

    @property
    def skips_clean_end(self) -> bool:
        """Only where a step's KL needs its noise, or images are noised."""
        return not self.replays or (self.is_matched and super().skips_clean_end)

    def start(self, run: Run) -> None:
        """Take the model, of latents alone."""
        require_gaussian(run.model, "a reward's gradient")
        super().start(run)
        self.slopes, self.noised = RewardSlopes(self.collector), NoisedImages(self.collector, Times())
        # A step's cost: its KL, or for those that need none of its noise that of the same change of score at eta 1.
        self.cost_kernel = self.collector.kernel if self.is_matched else Ddim(0.0)

    def checks(self) -> list[Check]:
        """Those of the rollouts; and that the reward has a slope."""
        of_rollouts = self.collector.checks(self.loss, has_ratio=False, kernel=self.cost_kernel)
        return [*of_rollouts, slope_check(self.slopes, self.collector.rollouts)]

    def collect(self, index: int) -> Steps:
        """Draw rollout `index`, and find the slope of what its images earn at the steps that are trained."""
        config, collector = self.config, self.collector
        rollout = collector.draw(index)
        facts, objective = collector.facts(rollout), config.objective
        if isinstance(objective, Srpo):
            steps = self.noised.of(rollout, "trained")
            slope = self._beside(rollout, steps, objective)
        elif isinstance(objective, Refl):
            steps = collector.steps(rollout)
            slope = self.slopes.of_predicted(steps, objective)
        else:
            steps, first = collector.steps(rollout), config.first_step
            found = self.slopes.along(rollout, first, by_reference=self.is_matched, kl_weight=config.kl_weight)
            weights = objective.step_weights(rollout.trajectory.grid.num_steps).to(steps.weight)
            steps = replace(steps, weight=steps.weight * weights[steps.step])
            slope = found[steps.step - first, steps.image]
        if config.kl_weight > 0:
            steps = steps.knowing(reference=collector.reference(steps))
        else:
            facts["policy/kl"] = collector.measured_kl(rollout)
        facts["policy/slope"] = slope.square().mean().sqrt()
        return replace(steps.knowing(slope=slope), facts=facts)

    def _beside(self, rollout: Rollout, steps: Steps, objective: Srpo) -> Latents:
        """SRPO's slope: of an image's moments every other one goes backwards."""
        moment = torch.arange(len(steps), device=steps.image.device) // rollout.num_images
        is_back = (steps.image + moment) % 2 == 1
        s = self.noised.moved_in_time(rollout, steps, torch.where(is_back, objective.step, -objective.step))
        return self.slopes.beside(steps, self.noised.said(steps), s, objective, is_back=is_back)

    def loss(self, steps: Steps) -> StepOutput:
        """What is descended, of a micro-batch of steps; only its gradient means something."""
        config, model = self.config, self.run.model
        said, _ = replayed(model, steps, self.cost_kernel, guidance_scale=config.guidance_scale)
        facts, per_step = dict(steps.facts), pathwise(said - steps["prediction"], steps["slope"])
        if "reference" in steps:
            cost = step_cost(model, said, steps["reference"], steps, self.cost_kernel)
            facts["policy/kl"] = (steps.weight * cost.detach()).mean()
            per_step = per_step + config.kl_weight * cost
        return mean_loss(steps.weight * per_step, steps, facts)
