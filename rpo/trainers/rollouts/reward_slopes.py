"""The slope of a reward: at images, and by what the network says at the steps that lead to them.

What is followed is always the network's output v, in whatever it predicts: ∂r/∂v of a step is what its loss needs. The
autoencoder and the rewards are differentiated for few images at once, so that their memory does not grow with a
rollout.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from rpo.models.checkpoint import Checkpoint
from rpo.models.latents import followed, images_per_slope
from rpo.objectives.reward_gradient.refl import Refl
from rpo.objectives.reward_gradient.srpo import Srpo
from rpo.process.prediction import to_x0_eps
from rpo.process.transition import Ddim, Kernel, mean_of
from rpo.rewards import RewardError
from rpo.rewards.differentiable import without_gradient
from rpo.sampling.step import predict, transition
from rpo.trainers.rollouts.collector import Collector
from rpo.trainers.rollouts.costs import step_cost
from rpo.trainers.rollouts.draw import Rollout
from rpo.trainers.rollouts.steps import Steps, steps_of
from rpo.types import Images, Latents, Node, PerSample


@final
class RewardSlopes:
    """Finds slopes of a collector's rewards."""

    def __init__(self, collector: Collector):
        """Take what draws, and its rewards."""
        self._collector, self._model = collector, collector.run.model
        self._rewards = collector.rollouts.rewards

    def at(
        self, latents: Latents, *asked: tuple[float, Sequence[str]], names: Sequence[str]
    ) -> tuple[PerSample, Latents]:
        """What the images of latents earn, and the slope of that by the latents.

        Args:
            asked: Prompts, one per image, and what it counts that the image earns by them; the sum is what it earns.
            names: What a person finds each by.

        Raises:
            InputError: A reward has no gradient, or one that is not finite, or judges too few; says which image.
        """
        found: list[tuple[PerSample, Latents]] = []
        is_frugal = self._collector.config.adapter.gradient_checkpointing
        for rows in torch.arange(len(latents)).split(images_per_slope(self._pixels(latents))):
            some = latents[rows.to(latents.device)].detach().requires_grad_()
            places: list[int] = rows.tolist()
            own = [(weight, [texts[place] for place in places]) for weight, texts in asked]
            with torch.enable_grad(), followed(self._model, recomputes=is_frugal):
                images = self._model.decode(some)
                earned = self._earned(images, own)
                found.append((earned.detach(), torch.autograd.grad(earned.sum(), some)[0]))
        values, slopes = (torch.cat(parts) for parts in zip(*found, strict=True))
        return values, self._sound(values, slopes, names)

    def along(self, rollout: Rollout, first: int, *, by_reference: bool, kl_weight: float) -> Latents:
        """Slope of what a path earns by the outputs of its steps from `first` on, [steps, images, …].

        It costs a forward and a backward for each of them but the first.

        Args:
            by_reference: Follow it back through the reference, and not through the policy.
            kl_weight: What the KL of a later step costs; with `by_reference` it is no part of the slope.
        """
        collector, num_steps = self._collector, rollout.trajectory.grid.num_steps
        _, slope = self.at(rollout.trajectory.x_0, (1.0, rollout.prompts), names=rollout.names)
        rows = torch.arange(rollout.num_images)
        found: list[Latents] = []
        for step in range(num_steps - 1, first - 1, -1):
            every = steps_of(rollout, torch.full((1, len(rows)), step), 1.0, is_frozen=False)
            by_output, by_state = [], []
            for part in rows.split(collector.batch_size):
                at, ahead = every.select(part), slope[part.to(slope.device)]
                by_output.append(self._by_output(at, ahead))
                if step > first:
                    by_state.append(self._by_state(at, ahead, by_reference=by_reference, kl_weight=kl_weight))
            found.append(torch.cat(by_output))
            slope = torch.cat(by_state) if by_state else slope
        return torch.stack(found[::-1])

    def of_predicted(self, steps: Steps, objective: Refl) -> Latents:
        """Slope of what the images earn that steps predict."""
        prediction, end = steps["prediction"], Node(*(torch.ones_like(steps.t.alpha) * k for k in (1.0, 0.0, 0.0)))
        x0_hat, _ = to_x0_eps(prediction, steps.x_t, steps.t, self._model.prediction_type)
        earned, slope = self.at(x0_hat, (1.0, steps.prompts), names=steps.names)
        slope = _below(objective.margin, earned, slope)
        return self._by_output(replace(steps, s=end), slope, Ddim(0.0))

    def beside(self, steps: Steps, prediction: Latents, s: Node, objective: Srpo, *, is_back: Tensor) -> Latents:
        """Slope of what noised images earn after one step, whose noise is known.

        Args:
            steps: Their "prediction" is that of a network that knows x_0.
            prediction: The policy's.
            s: Where the step leads.
            is_back: Whether it leads to more noise.
        """
        kind = self._model.prediction_type
        _, eps = to_x0_eps(steps["prediction"], steps.x_t, steps.t, kind)
        x_s = mean_of(transition(self._model, prediction, steps.x_t, steps.t, s, Ddim(0.0)))
        good, bad = (objective.worded(steps.prompts, is_good=is_good) for is_good in (True, False))
        back = is_back.tolist()
        wanted = [bad[row] if one else good[row] for row, one in enumerate(back)]
        unwanted = [good[row] if one else bad[row] for row, one in enumerate(back)]
        image = (x_s - s.sigma * eps) / s.alpha
        earned, slope = self.at(image, (1 + objective.bias, wanted), (-1.0, unwanted), names=steps.names)
        slope = _below(objective.margin, earned, slope)
        return self._by_output(replace(steps, s=s), slope / s.alpha, Ddim(0.0))

    def _by_output(self, steps: Steps, ahead: Latents, kernel: Kernel | None = None) -> Latents:
        """From a slope by where steps lead to one by what the network says; a step's mean is linear in that."""
        said = steps["prediction"].detach().requires_grad_()
        with torch.enable_grad():
            kernel = kernel or self._collector.kernel
            drawn = transition(self._model, said, steps.x_t, steps.t, steps.s, kernel)
            (found,) = torch.autograd.grad(mean_of(drawn), said, ahead)
        return found

    def _by_state(self, steps: Steps, ahead: Latents, *, by_reference: bool, kl_weight: float) -> Latents:
        """From a slope by where steps lead to one by where they start: one step of the adjoint equation, backwards.

        Each network is differentiated while it is the one that computed: one that is checkpointed computes again then.
        """
        collector, model, policy = self._collector, self._model, self._collector.run.policy
        x_t = steps.x_t.detach().requires_grad_()
        here = replace(steps, x_t=x_t)

        def said() -> Latents:
            with torch.enable_grad():
                return predict(model, x_t, here.t, here.conditioning, guidance_scale=collector.config.guidance_scale)

        def pulled_back(output: Latents, slope: Latents) -> Latents:
            return torch.autograd.grad(output, x_t, slope)[0]

        with policy.reference() if by_reference else nullcontext():
            output = said()
            cut = output.detach().requires_grad_()
            with torch.enable_grad():
                drawn = transition(model, cut, x_t, here.t, here.s, collector.kernel)
                earned = (mean_of(drawn) * ahead).sum()
            if by_reference or kl_weight == 0:
                direct, slope = torch.autograd.grad(earned, [x_t, cut])
                return direct + pulled_back(output, slope)
        with policy.reference():
            reference = said()
        cut_reference = reference.detach().requires_grad_()
        with torch.enable_grad():
            earned = earned - kl_weight * step_cost(model, cut, cut_reference, here, Ddim(0.0)).sum()
        direct, slope, slope_of_reference = torch.autograd.grad(earned, [x_t, cut, cut_reference])
        found = direct + pulled_back(output, slope)
        with policy.reference():
            return found + pulled_back(reference, slope_of_reference)

    def _earned(self, images: Images, asked: Sequence[tuple[float, Sequence[str]]]) -> PerSample:
        found: list[PerSample] = []
        for weight, prompts in asked:
            parts = self._rewards.parts_with_gradient(images, prompts)
            if flat := [name for name, part in parts.items() if not part.requires_grad]:
                raise without_gradient(flat[0])
            found.append(weight * self._rewards.weighted_sum(parts))
        return torch.stack(found).sum(dim=0)

    def _sound(self, values: PerSample, slopes: Latents, names: Sequence[str]) -> Latents:
        """Finite slopes: none where an image could not be judged, of which there are few; others end the run."""
        failed = values.isnan()
        wrong = ~slopes.isfinite().flatten(1).all(dim=1) & ~failed | values.isinf()
        most = self._collector.config.rollout.max_failed
        is_most, is_wrong = torch.stack([failed.float().mean() > most, wrong.any()]).tolist()
        if is_most or is_wrong:
            faults = (wrong if is_wrong else failed).nonzero().flatten().tolist()
            what = "has no finite gradient" if is_wrong else f"gave no number, and rollout.max_failed is {most:g}"
            raise RewardError(
                f"{names[faults[0]]}" + (f" and {len(faults) - 1} more" if len(faults) > 1 else "") + ": the reward "
                f"({', '.join(self._rewards.weights)}) {what}; expected finite numbers: an autoencoder in float16 "
                "overflows in backward (load the model in float32 or bfloat16), or the reward has a pole there"
            )
        return slopes.masked_fill(failed[:, None, None, None], 0.0)

    def _pixels(self, latents: Latents) -> int:
        cell = self._model.cell if isinstance(self._model, Checkpoint) else 1
        return latents[0, 0].numel() * cell**2


def _below(margin: float | None, earned: PerSample, slope: Latents) -> Latents:
    """The slope of images that earn less than a margin; of others none."""
    return slope if margin is None else slope * (earned < margin)[:, None, None, None]
