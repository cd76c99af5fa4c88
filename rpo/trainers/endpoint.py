"""The endpoint gradient: score as action's likelihood gradient, averaged over the paths that end in an image.

It needs no path, so images may come from any solver, and has far less noise; exact where the policy is the reversal of
the noising process, as the base model and the optimum at eta 1 are. Every image is noised afresh, to times anywhere on
the process, and each such moment gets an advantage of its own:

    loss = A(t, x_t) KL( q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t) ),        A = r(x_0) - baseline,

where the baseline is what the other images of the prompt earned, or V(t, x_t). V has the smaller variance. Close to the
data x_t shows how it will end, so V takes away nearly all of what r - m says there, which is noise: the step could not
change it. And since E[A | x_t] = 0 with the right V, images that turned out badly do not push the policy away from
everything that looked like them. On `shapes` the two trained equally well.

With a KL weight the reward of an image loses kl_weight log p(x_0) / p_reference(x_0). Of both only bounds are known,
which miss the same where policy and reference reverse the noising process: their difference is the log-ratio.

    log p(x_0) / p_reference(x_0) = Σ_k KL(q ‖ p_reference) - KL(q ‖ p),    q = q(x_s | x_t, x_0)

The mean of this over the policy's images is the KL of the path. The KL of the steps at noised moments has that mean,
too, and is no function of x_0 alone: to weigh the gradient of an image with it optimises something else. The moments
that tell the log-ratio are not the trained ones, whose noise would be in both factors of that product.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from rpo.objectives.endpoint import endpoint
from rpo.process.continuous import grid_at, jittered_times
from rpo.process.prediction import to_x0_eps
from rpo.process.transition import Ddim
from rpo.randomness import keyed_generator
from rpo.rewards import RewardLike
from rpo.sampling.step import has_negative, predict_negative
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.rollouts.algorithm import OnlineAlgorithm
from rpo.trainers.rollouts.draw import JITTER, OnImages, Rollout, rollout_facts
from rpo.trainers.rollouts.prompts import PromptSource
from rpo.trainers.rollouts.steps import Steps, noised_steps, per_image, replayed, transition_by
from rpo.trainers.trainer import Run
from rpo.trainers.value import returns as returns_of
from rpo.trainers.value.inputs import ValuePoints, compared_with_others, node_time, others_mean
from rpo.trainers.value.returns import make_value, scaled
from rpo.training.state import Stateful
from rpo.types import Latents, PerSample, StepOutput

HOLD = 0.25
"""In units of `kl_weight`: how much every image is fitted whatever it is worth. On Gaussian problems a quarter to 1
reaches the optimum, 0 drifts among policies that draw the same images, and 2 narrows what is drawn."""

KERNEL = Ddim(1.0)
"""The reverse SDE's step, in which the bound is written, whatever drew the images."""


@final
class Endpoint(OnlineAlgorithm):
    """Learns from a reward by the bound on the likelihood of whole images.

    Attributes:
        value: V, or None where images are compared with their group.
    """

    config: EndpointConfig
    replays = False

    def __init__(
        self,
        rewards: RewardLike,
        prompts: PromptSource,
        config: EndpointConfig | None = None,
        *,
        on_images: OnImages | None = None,
    ):
        """Keep what to learn from; see `OnlineAlgorithm`."""
        super().__init__(rewards, prompts, config or EndpointConfig(), on_images=on_images)

    @property
    def skips_clean_end(self) -> bool:
        """Always: it learns in the DDIM step, whatever draws."""
        return True

    def start(self, run: Run) -> None:
        """Take the model, and make V if images are compared with it."""
        super().start(run)
        uses_value = self.config.baseline == "value"
        self.value = make_value(self.collector, self.config.value, is_differentiable=False) if uses_value else None

    def collect(self, index: int) -> Steps:
        """Draw rollout `index`, noise its images, and say what every such moment is worth; then fit V to it."""
        config = self.config
        if index == 0:
            for number in range(config.value.pretrain_rollouts if self.value else 0):
                self._learnt(self._worth(self.collector.draw(-1 - number)), returns_of.PRETRAIN_UPDATES)
        rollout = self.collector.draw(index)
        steps, returns, nodes = self._worth(rollout)
        facts = {**rollout_facts(rollout, self.run.processes), "policy/kl": self.collector.measured_kl(rollout)}
        facts |= self._learnt((steps, returns, nodes), config.value.updates)
        return replace(steps, facts={name: number.to(steps.x_t.device) for name, number in facts.items()})

    def _worth(self, rollout: Rollout) -> tuple[Steps, PerSample, ValuePoints | None]:
        """The trained moments, what came of each (its image's reward, less what its path costs), and V's inputs."""
        config, steps = self.config, self._noised(rollout, "trained")
        if config.freezes_negative and has_negative(self.run.model, config.guidance_scale):
            steps = steps.knowing(negative=self._negative(steps))
        has_moved = rollout.index >= 0  # in the rollouts before training the policy is the reference
        if config.bound_clip is not None and has_moved:
            steps = steps.knowing(reference_kl=self._kl(self.collector.reference(steps), steps))
        rewards = rollout.rewards
        if config.kl_weight > 0 and has_moved:
            rewards = rewards - config.kl_weight * self._log_ratio(rollout)
        returns, nodes = rewards[steps.image], None
        if self.value is None:
            baseline = compared_with_others(rewards, rollout.group)[steps.image]
        else:
            size = self.collector.batch_size
            nodes = self.value.ask_reward(self._seen(steps, rollout), batch_size=size)
            baseline = self.value.evaluate(nodes, batch_size=size)
        advantage, scale = scaled((returns - baseline)[None], config.scale, self.run.processes)
        return steps.knowing(advantage=advantage[0], cost_weight=config.kl_weight / scale[0]), returns, nodes

    def loss(self, steps: Steps) -> StepOutput:
        """The bound of a micro-batch of moments, weighted by what their images are worth."""
        config, model = self.config, self.run.model
        _, transition = replayed(model, steps, KERNEL, guidance_scale=config.guidance_scale)
        posterior = transition_by(model, steps["prediction"], steps, KERNEL)
        kl_of_posterior = posterior.kl(transition)
        reference_kl = steps.known.get("reference_kl")
        per_step = steps.weight * endpoint(
            kl_of_posterior,
            steps["advantage"] + config.consistency + HOLD * steps["cost_weight"],
            reference_kl=reference_kl,
            clip=config.bound_clip or math.inf,
        )
        facts = {**steps.facts, "policy/bound": (steps.weight * kl_of_posterior.detach()).mean()}
        return StepOutput(per_step.mean(), per_step.detach(), facts)

    def _noised(self, rollout: Rollout, use: str) -> Steps:
        model, config, collector = self.run.model, self.config, self.collector
        moved = keyed_generator("times", use, config.seed, rollout.index)
        times = jittered_times(model.process, rollout.trajectory.grid.num_steps, moved, jitter=JITTER)
        grid = grid_at(model.process, times, device=model.device)
        noise = [keyed_generator("noise", use, config.seed, *visit) for visit in rollout.visits]
        kind = model.prediction_type
        return noised_steps(
            rollout, grid, collector.chosen, collector.stands_for, prediction_type=kind, generators=noise
        )

    @torch.no_grad()
    def _current(self, steps: Steps) -> Latents:
        guidance, size = self.config.guidance_scale, self.collector.batch_size
        return torch.cat(
            [replayed(self.run.model, part, KERNEL, guidance_scale=guidance)[0] for part in steps.batches(size)]
        )

    def _negative(self, steps: Steps) -> Latents:
        """The output under the negative conditioning, which no rollout has at these moments."""
        parts = steps.batches(self.collector.batch_size)
        return torch.cat([predict_negative(self.run.model, one.x_t, one.t, one.conditioning) for one in parts])

    def _kl(self, prediction: Latents, steps: Steps) -> PerSample:
        """KL of what x_0 says of the step from what a prediction says: a term of the bound on -log p(x_0)."""
        posterior = transition_by(self.run.model, steps["prediction"], steps, KERNEL)
        return posterior.kl(transition_by(self.run.model, prediction, steps, KERNEL))

    def _log_ratio(self, rollout: Rollout) -> PerSample:
        """The log-ratio of every image: by how much the policy's bound is the better one."""
        steps = self._noised(rollout, "log-ratio")
        gap = self._kl(self.collector.reference(steps), steps) - self._kl(self._current(steps), steps)
        return per_image(steps.weight * gap / len(self.collector.chosen), steps, rollout.num_images)

    def _seen(self, steps: Steps, rollout: Rollout) -> ValuePoints:
        x0_hat, _ = to_x0_eps(self._current(steps), steps.x_t, steps.t, self.run.model.prediction_type)
        others = others_mean(rollout.rewards, rollout.group)
        time = node_time(self.run.model, steps.t.timestep.flatten())
        baseline = None if others is None else others[steps.image]
        return ValuePoints(steps.x_t, x0_hat, time, steps.conditioning.tokens, steps.prompts, baseline=baseline)

    def _learnt(self, worth: tuple[Steps, PerSample, ValuePoints | None], updates: int) -> Mapping[str, Tensor]:
        """Fit V to a rollout, after it has been used; says how good it was on it."""
        _, returns, nodes = worth
        if self.value is None or nodes is None:
            return {}
        size = self.config.value.batch_size
        return self.value.fit(nodes, returns.view_as(self.collector.chosen), steps=updates, batch_size=size)

    @property
    def state(self) -> dict[str, Stateful]:
        """The rollout in use, and V."""
        return super().state | ({} if self.value is None else {"value": self.value})
