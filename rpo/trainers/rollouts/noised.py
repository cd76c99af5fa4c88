"""Drawn images noised afresh, to times of which no rollout need know, and what the policy says of them there."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.objectives.endpoint.update import Times
from rpo.process.continuous import grid_at, jittered_times
from rpo.process.diffusion import diffusion_of
from rpo.process.transition import Kernel
from rpo.randomness import keyed_generator
from rpo.sampling.step import has_negative, predict_negative
from rpo.trainers.rollouts.collector import Collector
from rpo.trainers.rollouts.draw import JITTER, Rollout
from rpo.trainers.rollouts.steps import Steps, noised_steps, replayed
from rpo.types import Grid, Node, Output

SHORT_OF_NOISE = 0.005
"""Share of the process next to pure noise at which nothing ends."""


@final
class NoisedImages:
    """Noises the images of a collector's rollouts.

    Attributes:
        kernel: The steps of the reversal, in which bounds are written, whatever drew the images.
    """

    def __init__(self, collector: Collector, times: Times):
        """Noise at the times that an objective asks for."""
        self._collector, self._times = collector, times
        self.kernel: Kernel = diffusion_of(collector.run.model.prediction_type).reversal

    def of(self, rollout: Rollout, use: str) -> Steps:
        """The moments that the collector chose, by noise that is a function of the image and of what they are for."""
        collector, model = self._collector, self._collector.run.model
        visits = [(visit, 0) for visit, _ in rollout.visits] if self._times.shared else rollout.visits
        noise = [keyed_generator("noise", use, collector.config.seed, *visit) for visit in visits]
        steps = noised_steps(
            rollout,
            self._grid(rollout, use),
            collector.chosen,
            collector.stands_for,
            prediction_type=model.prediction_type,
            generators=noise,
        )
        is_guided = has_negative(model, collector.config.guidance_scale)
        return (
            self._with_negative(steps)
            if use == "trained" and collector.config.freezes_negative and is_guided
            else steps
        )

    @torch.no_grad()
    def said(self, steps: Steps) -> Output:
        """The policy's guided output."""
        model, guidance = self._collector.run.model, self._collector.config.guidance_scale
        parts = steps.batches(self._collector.batch_size)
        return torch.cat([replayed(model, part, self.kernel, guidance_scale=guidance)[0] for part in parts])

    def _grid(self, rollout: Rollout, use: str) -> Grid:
        model = self._collector.run.model
        if self._times.of_rollout:
            return rollout.trajectory.grid
        return grid_at(model.process, self._even(rollout, use), device=model.device)

    def _even(self, rollout: Rollout, use: str) -> Float[Tensor, " nodes"]:
        """Times even on the process, moved at random."""
        collector, num_steps = self._collector, rollout.trajectory.grid.num_steps
        moved = keyed_generator("times", use, collector.config.seed, rollout.index)
        return jittered_times(collector.run.model.process, num_steps, moved, jitter=JITTER)

    def moved_in_time(self, rollout: Rollout, steps: Steps, by: Float[Tensor, " steps"]) -> Node:
        """Nodes that lie later than those of steps that `of` has made for "trained", by a share of the process.

        They stay on the process, short of pure noise, behind which no image can be seen.
        """
        process = self._collector.run.model.process
        length = process.start - process.end
        times = self._even(rollout, "trained")[steps.step.cpu()] + by.cpu() * length
        times = times.clamp(process.end, process.start - SHORT_OF_NOISE * length)
        found = process.alpha(times), process.sigma(times), process.timestep(times)
        return Node(*(one.to(steps.x_t)[:, None, None, None] for one in found))

    def _with_negative(self, steps: Steps) -> Steps:
        """With the output under the negative conditioning, which no rollout has at these moments."""
        model, parts = self._collector.run.model, steps.batches(self._collector.batch_size)
        said = [predict_negative(model, one.x_t, one.t, one.conditioning) for one in parts]
        return steps.knowing(negative=torch.cat(said))
