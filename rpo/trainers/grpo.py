"""GRPO for diffusion (Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818) and DDPO (arXiv:2305.13301).

Images of one prompt are compared with each other, and every step of the better ones is made likelier:

    A    = (r - mean) / std                 of its group (GRPO), or of its prompt's recent rewards (DDPO)
    loss = Σ_k [ max(-A ρ_k, -A clip(ρ_k, 1 ± clip)) D + kl_weight KL(π_θ ‖ π_ref)_k ],   ρ_k = (p_θ/p_old)^{1/D}

on the same rollouts, kernels and steps as score-as-action. Flow-GRPO's noise level a is eta = a/√2 here.

With `regression`, REBEL on paths (arXiv:2404.16767) takes the place of the clip: of all pairs of a group

    loss = mean ½ [ η (Δ_i - Δ_j) - (A_i - A_j) ]²,         Δ = Σ_k log p_θ/p_old of the path

whose minimum on what was drawn is p_θ ∝ p_old exp(A/η). Its gradient is that of -2η w Σ_k log p_θ, with w what is left
to gain, which is found anew before each further update of a rollout.

Differs from the papers: the loss is summed over steps, not averaged, and is that of joint densities (times D), so that
`kl_weight` weighs a reward against nats; the KL is that of the transitions, with its gradient; several rewards are
normalised one by one before they are weighted, so that none drowns the others.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch

from rpo.objectives.advantages import MAX_ADVANTAGE
from rpo.objectives.endpoint.rebel import left_to_gain
from rpo.objectives.policy_gradient import clipped_surrogate, plain
from rpo.rewards import RewardLike
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.rollouts.algorithm import OnlineAlgorithm
from rpo.trainers.rollouts.compared import compared_in_groups, share_facts
from rpo.trainers.rollouts.costs import step_cost
from rpo.trainers.rollouts.draw import OnImages, Rollout
from rpo.trainers.rollouts.prompt_history import PromptHistory
from rpo.trainers.rollouts.prompts import PromptSource
from rpo.trainers.rollouts.steps import Steps, mean_loss, per_image, replayed
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
        if config.regression is not None:
            steps = steps.knowing(gain=steps["advantage"])
            steps = self._left(steps, torch.zeros(rollout.num_images, device=steps.x_t.device))
        steps = replace(steps, facts={**steps.facts, **share_facts(weighted, self.run.processes)})
        if config.kl_weight > 0:
            return steps.knowing(reference=collector.reference(steps))
        return replace(steps, facts={**steps.facts, "policy/kl": collector.measured_kl(rollout)})

    @torch.no_grad()
    def again(self, steps: Steps) -> Steps:
        """With what is left to gain, where paths are regressed."""
        if self.config.regression is None:
            return steps
        changes = list[PerSample]()
        for part in steps.batches(self.collector.batch_size):
            now = replayed(self.run.model, part, self.collector.kernel, guidance_scale=self.config.guidance_scale)[1]
            changes.append(part.weight * (now.log_prob(part.x_s) - part["log_prob"]))
        images = self.config.rollout.images // self.run.processes.count
        return self._left(steps, per_image(torch.cat(changes), steps, images) * images / len(steps))

    def _left(self, steps: Steps, change: PerSample) -> Steps:
        """With 2η w for an advantage; the first rows are of one image each, in order."""
        eta, images = self.config.regression, len(change)
        assert eta is not None
        judged = steps.counts[:images] > 0
        group = torch.arange(images, device=change.device) // self.config.rollout.images_per_prompt
        left = torch.zeros_like(change)
        left[judged] = left_to_gain(steps["gain"][:images][judged], change[judged], group[judged], eta=eta)
        return steps.knowing(advantage=2 * eta * left[steps.image])

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
        now, drawn, advantage = transition.log_prob(steps.x_s), steps["log_prob"], steps["advantage"]
        if config.regression is None:
            surrogate = clipped_surrogate(now, drawn, advantage, num_dims=transition.num_dims, clip=config.clip)
        else:
            surrogate = plain(now, drawn, advantage, num_dims=transition.num_dims)
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
