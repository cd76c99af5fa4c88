"""GRPO for diffusion (Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818) and DDPO (arXiv:2305.13301).

Images of one prompt are compared with each other, and every step of the better ones is made likelier:

    A    = (r - mean) / std                 of its group (GRPO), or of its prompt's recent rewards (DDPO)
    loss = Σ_k [ max(-A ρ_k, -A clip(ρ_k, 1 ± clip)) D + kl_weight KL(π_θ ‖ π_ref)_k ],   ρ_k = (p_θ/p_old)^{1/D}

on the same rollouts, kernels and points as score-as-action. Flow-GRPO's noise level a is eta = a/√2 here.

Differs from the papers: the loss is summed over steps, not averaged, and is that of joint densities (times D), so that
`kl_weight` weighs a reward against nats; the KL is that of the transitions, with its gradient; several rewards are
normalised one by one before they are weighted, so that none drowns the others.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import final

import torch
from diffusers import DiffusionPipeline

from rpo.models.base import DiffusionModel
from rpo.objectives.advantages import group_normalize
from rpo.objectives.policy import clipped_surrogate
from rpo.publishing.publish import PublishPlan
from rpo.rewards import RewardLike
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.online import OnlineRun
from rpo.trainers.policy import Policy
from rpo.trainers.prompt_history import PromptHistory
from rpo.trainers.rollouts.draw import Rollout, rollout_facts, training_kernel
from rpo.trainers.rollouts.moments import current_prediction, reference_prediction, step_cost, transition_of
from rpo.trainers.rollouts.points import Points
from rpo.training.loop import TrainResult
from rpo.types import PerSample, StepOutput


def loss(points: Points, *, policy: Policy, config: GRPOConfig, guidance_scale: float) -> StepOutput:
    """The clipped surrogate of a micro-batch of points, and its KL to the reference."""
    assert points.advantage is not None
    model, kernel = policy.model, training_kernel(config.rollout)
    noise_pred = current_prediction(model, points, guidance_scale)
    transition = transition_of(model, noise_pred, points, kernel)
    surrogate = clipped_surrogate(
        transition.log_prob(points.x_s),
        points.log_prob,
        points.advantage,
        num_dims=transition.num_dims,
        clip=config.clip,
    )
    per_point = surrogate.loss
    facts = dict(points.facts or {})
    facts |= {"policy/ratio": surrogate.ratio.mean(), "policy/clipped": surrogate.is_clipped.float().mean()}
    if points.reference is not None:
        kl = step_cost(model, noise_pred, points.reference, points, kernel)
        facts["policy/kl"] = (points.weight * kl.detach()).mean()
        per_point = per_point + config.kl_weight * kl
    per_point = points.weight * per_point
    return StepOutput(per_point.mean(), per_point.detach(), facts)


@final
class GRPOTrainer:
    """Aligns a pipeline with a reward by comparing images of one prompt.

    Afterwards `pipe` itself carries the adapter, active.

    Example:
        >>> trainer = GRPOTrainer(pipe, "jpeg-compressibility", prompts)    # doctest: +SKIP
        >>> trainer.train()                                                 # doctest: +SKIP
        >>> trainer.save("runs/mine/lora")                                  # doctest: +SKIP

    Attributes:
        config: The settings.
        run: The policy, its rollouts and the folder.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline | DiffusionModel,
        rewards: RewardLike,
        prompts: Sequence[str],
        config: GRPOConfig | None = None,
    ):
        """Check everything that can be checked before the first update, and add the adapter.

        Args:
            pipe: The pipeline to train, on the device to train on.
            rewards: What images are worth: a name, a callable (images, prompts) → numbers, or weights by name.
            prompts: To draw images of.
            config: The settings.

        Raises:
            ValueError: If the pipeline, the rewards, the prompts or the settings cannot be trained with.
        """
        self.config = config or GRPOConfig()
        self.run = OnlineRun(pipe, rewards, prompts, self.config.online_settings())
        self.histories = {
            name: PromptHistory(self.config.history, self.config.min_history)
            for name in self.run.rollouts.rewards.weights
        }

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.settings.folder

    def train(self, *, resume: bool = False) -> TrainResult:
        """Run all updates.

        Args:
            resume: Continue a killed run in the same folder; on the CPU it ends in the same weights, bit for bit.

        Raises:
            PreflightError: The run cannot learn; said before the first update.
            RewardError: A reward fails; names the prompt, saves the image, and the last good state is kept.
            NonFiniteLossError: A loss is not finite; the last good state is kept.
            ValueError: The folder holds another run already.
        """
        with self.run.claim(resume=resume, lines=[]):
            return self.run.fit(
                self.prepare,
                partial(loss, policy=self.run.policy, config=self.config, guidance_scale=self.run.guidance_scale),
                resume=resume,
                state={f"history of {name}": history for name, history in self.histories.items()},
            )

    def plan(self) -> str:
        """What the run comes to, in a few lines."""
        return self.run.plan()

    def save(self, folder: str | PathLike[str] | None = None) -> Path:
        """Write what was trained, verified, with a model card and the settings.

        Args:
            folder: Where to; `lora` (or `pipeline`) in the run's folder by default.

        Returns:
            The folder: `pipe.load_lora_weights(folder)` reads it.
        """
        return self.run.save(folder)

    def publish(self, repo_id: str, *, push: bool = False, private: bool = True) -> PublishPlan:
        """Save and say what publishing would upload; upload it with `push=True`.

        Args:
            repo_id: "owner/name" on the Hugging Face Hub.
            push: Really upload; needs `hf auth login`.
            private: Whether a new repository is private.
        """
        return self.run.publish(repo_id, push=push, private=private)

    def prepare(self, index: int) -> Points:
        """Draw rollout `index` and make its trained points.

        Args:
            index: Number of the rollout, from 0.
        """
        run = self.run
        rollout = run.draw(index)
        points = run.points(rollout)
        facts = rollout_facts(rollout, run.processes)
        if self.config.kl_weight > 0:
            reference = reference_prediction(run.policy, points, run.guidance_scale, batch_size=run.batch_size)
            points = replace(points, reference=reference)
        elif self.config.measure_kl:
            facts["policy/kl"] = run.measured_kl(rollout, training_kernel(self.config.rollout))
        advantage = self.advantages(rollout).to(points.x_t.device)
        return replace(points, advantage=advantage[points.image], facts=facts)

    def advantages(self, rollout: Rollout) -> PerSample:
        """How each image compares, every reward by itself before they are weighted.

        Args:
            rollout: With its rewards.
        """
        config = self.config
        weights = self.run.rollouts.rewards.weights
        total = torch.stack([weight * self._compared(name, rollout) for name, weight in weights.items()]).sum(dim=0)
        scale = sum(abs(weight) for weight in weights.values())
        return (total / scale).clamp(-config.max_advantage, config.max_advantage)

    def _compared(self, name: str, rollout: Rollout) -> PerSample:
        """How the images of this process compare with those of all."""
        processes = self.run.processes
        rewards = processes.join(rollout.parts[name])
        if self.config.baseline == "group":
            group = torch.arange(len(rewards), device=rewards.device) // self.config.rollout.images_per_prompt
            return processes.own(group_normalize(rewards, group, scale=self.config.scale))
        prompts = [prompt for part in processes.gather(rollout.prompts) for prompt in part]
        return processes.own(self.histories[name].advantages(rewards, prompts))
