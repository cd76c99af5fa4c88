"""GRPO for diffusion (Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818) and DDPO (arXiv:2305.13301).

Images of one prompt are compared with each other, and every step of the better ones is made likelier:

    A    = (r - mean) / std                 of its group (GRPO), or of its prompt's recent rewards (DDPO)
    loss = Σ_k [ max(-A ρ_k, -A clip(ρ_k, 1 ± clip)) D + kl_weight KL(π_θ ‖ π_ref)_k ],   ρ_k = (p_θ/p_old)^{1/D}

on the same rollouts, kernels and steps as score-as-action. Flow-GRPO's noise level a is eta = a/√2 here.

Differs from the papers: the loss is summed over steps, not averaged, and is that of joint densities (times D), so that
`kl_weight` weighs a reward against nats; the KL is that of the transitions, with its gradient; several rewards are
normalised one by one before they are weighted, so that none drowns the others.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch

from rpo.objectives.advantages import MAX_ADVANTAGE
from rpo.objectives.policy_gradient import clipped_surrogate
from rpo.rewards import RewardLike
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.rollouts.algorithm import OnlineAlgorithm
from rpo.trainers.rollouts.compared import compared_in_groups, share_facts
from rpo.trainers.rollouts.costs import step_cost
from rpo.trainers.rollouts.draw import OnImages, Rollout
from rpo.trainers.rollouts.prompt_history import PromptHistory
from rpo.trainers.rollouts.prompts import PromptSource
from rpo.trainers.rollouts.steps import Steps, mean_loss, replayed
from rpo.trainers.trainer import Run
from rpo.training.state import Stateful
from rpo.types import PerSample, StepOutput


@final
class GRPO(OnlineAlgorithm):
    """Learns from a reward, by comparing images of one prompt.

    Attributes:
        collector: Draws the rollouts.
    """

    config: GRPOConfig
    compares_each = True

    def __init__(
        self,
        rewards: RewardLike,
        prompts: PromptSource,
        config: GRPOConfig | None = None,
        *,
        on_images: OnImages | None = None,
    ):
        """Keep what to learn from; see `OnlineAlgorithm`."""
        super().__init__(rewards, prompts, config or GRPOConfig(), on_images=on_images)

    @property
    def title(self) -> str:
        """By what images are compared with."""
        return "GRPO" if self.config.baseline == "group" else "DDPO"

    def start(self, run: Run) -> None:
        """Take the model, and start without a past."""
        super().start(run)
        self.histories = {name: PromptHistory(self.config.history) for name in self.collector.rollouts.rewards.weights}

    def collect(self, index: int) -> Steps:
        """Draw rollout `index`, from 0, and say what its trained steps are worth."""
        config, collector = self.config, self.collector
        rollout = collector.draw(index)
        steps, weighted = collector.steps(rollout), self.weighted(rollout)
        steps = steps.knowing(advantage=self._joined(weighted).to(steps.x_t.device)[steps.image])
        steps = replace(steps, facts={**steps.facts, **share_facts(weighted, self.run.processes)})
        if config.kl_weight > 0:
            return steps.knowing(reference=collector.reference(steps))
        return replace(steps, facts={**steps.facts, "policy/kl": collector.measured_kl(rollout)})

    def advantages(self, rollout: Rollout) -> PerSample:
        """How each image compares, every reward by itself before they are weighted."""
        return self._joined(self.weighted(rollout))

    def weighted(self, rollout: Rollout) -> dict[str, PerSample]:
        """How each image compares by each reward, times its weight."""
        weights = self.collector.rollouts.rewards.weights
        return {name: weight * self._compared(name, rollout) for name, weight in weights.items()}

    def _joined(self, weighted: Mapping[str, PerSample]) -> PerSample:
        size = sum(map(abs, self.collector.rollouts.rewards.weights.values()))
        return (torch.stack(list(weighted.values())).sum(dim=0) / size).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)

    def _compared(self, name: str, rollout: Rollout) -> PerSample:
        """How the images of this process compare with those of all."""
        processes, config = self.run.processes, self.config
        if config.baseline == "group":
            size = config.rollout.images_per_prompt
            return compared_in_groups(rollout, name, processes, images_per_prompt=size, scale=config.scale)
        rewards = processes.join(rollout.counted[name])
        prompts = [prompt for part in processes.gather(rollout.prompts) for prompt in part]
        return processes.own(self.histories[name].advantages(rewards, prompts))

    def loss(self, steps: Steps) -> StepOutput:
        """The clipped surrogate of a micro-batch of steps, and its KL to the reference."""
        config, model, kernel = self.config, self.run.model, self.collector.kernel
        noise_pred, transition = replayed(model, steps, kernel, guidance_scale=config.guidance_scale)
        surrogate = clipped_surrogate(
            transition.log_prob(steps.x_s),
            steps["log_prob"],
            steps["advantage"],
            num_dims=transition.num_dims,
            clip=config.clip,
        )
        per_step = surrogate.loss
        facts = dict(steps.facts)
        facts |= {"policy/ratio": surrogate.ratio.mean(), "policy/clipped": surrogate.is_clipped.float().mean()}
        if "reference" in steps:
            kl = step_cost(model, noise_pred, steps["reference"], steps, kernel)
            facts["policy/kl"] = (steps.weight * kl.detach()).mean()
            per_step = per_step + config.kl_weight * kl
        return mean_loss(steps.weight * per_step, steps, facts)

    @property
    def state(self) -> dict[str, Stateful]:
        """The rollout in use, and what prompts earned."""
        return super().state | {f"history of {name}": history for name, history in self.histories.items()}
