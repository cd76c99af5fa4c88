"""Draws rollouts for an algorithm, chooses the steps that are learnt from, and cuts them into micro-batches."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from rpo.errors import InputError
from rpo.process.continuous import grid_at, uniform_times
from rpo.process.diffusion import diffusion_of
from rpo.process.transition import Kernel
from rpo.randomness import keyed_generator
from rpo.rewards.base import Reward, WeightedRewards
from rpo.sampling.sample import Keep
from rpo.trainers.checks.online import Subject, online_checks
from rpo.trainers.checks.preflight import Check
from rpo.trainers.preview import PreviewOf
from rpo.trainers.rollouts.batches import StepBatches
from rpo.trainers.rollouts.compared import raw_in_groups, share_facts
from rpo.trainers.rollouts.costs import measured_kl, reference_prediction
from rpo.trainers.rollouts.draw import OnImages, Rollout, Rollouts, rollout_facts, training_kernel
from rpo.trainers.rollouts.monitor import Monitor
from rpo.trainers.rollouts.prompts import PromptSource
from rpo.trainers.rollouts.settings import OnlineConfig
from rpo.trainers.rollouts.steps import Steps, choose_steps, steps_of
from rpo.trainers.trainer import Run
from rpo.types import Grid, Output, StepOutput


@final
class Collector:
    """The rollouts of a run.

    Attributes:
        run: Model, policy and folder.
        config: How it draws and learns.
        rollouts: Draws and scores images.
        monitor: Watches the policy.
        chosen: Which steps of the rollout in use are trained, [trained, images].
        stands_for: How many steps of a trajectory they stand for.
    """

    def __init__(
        self,
        run: Run,
        rewards: WeightedRewards,
        prompts: PromptSource,
        config: OnlineConfig,
        *,
        skips_clean_end: bool,
        replays: bool,
        shares_steps: bool = False,
        skips_last: bool = False,
        held_out: Mapping[str, Reward],
        on_images: OnImages | None = None,
    ):
        """Check everything that can be checked before the first rollout.

        Args:
            skips_clean_end: Whether a last step to perfectly clean data cannot be learnt: DDIM's adds no noise.
            replays: Whether the rollouts' own steps are what is learnt from.
            shares_steps: Whether all images of a prompt are learnt at the same steps.
            skips_last: Whether the last step of a rollout is never learnt, wherever it leads.
            held_out: Rewards that the run looks at and does not learn from, by name.
        """
        self.run, self.config = run, config
        self._skips_clean_end = skips_clean_end and diffusion_of(run.model.prediction_type).is_gaussian
        self._replays, self._shares_steps = replays, shares_steps
        self._skips_last = skips_last
        self.rollouts = Rollouts(
            run.model,
            prompts,
            rewards,
            config.rollout,
            seed=config.seed,
            share=(run.processes.index, run.processes.count),
            evidence=Path(config.output) / "failed_reward",
            join=run.processes.join,
            on_images=on_images,
            gates=config.gates,
            as_reference=run.policy.reference,
        )
        self.monitor = Monitor(run, self.rollouts, config, held_out)
        self._info_names: tuple[str, ...] | None = None
        self.rollout: Rollout | None = None
        self.chosen: Int[Tensor, "trained images"] = torch.zeros(0, 0, dtype=torch.long)
        self.stands_for = 0.0
        self.kernel: Kernel = training_kernel(run.model, config.rollout)
        self.division = _division(config, run.processes.count, self.trained_steps)

    @property
    def trained_steps(self) -> int:
        """Steps of each trajectory that are trained."""
        rollout = self.config.rollout
        if rollout.max_steps is not None and self.config.steps.train_steps is None:
            raise InputError(
                f"rollout.max_steps is {rollout.max_steps}, so rollouts differ in length, but every update needs the "
                f"same number of steps; give steps.train_steps, at most {rollout.num_steps - 1}"
            )
        return self._choose(self.rollouts.grid(0), 0)[0].shape[0]

    @property
    def batch_size(self) -> int:
        """Latents that go through the denoiser at once outside `sample`."""
        return self.config.learning.micro_batch

    def draw(self, index: int) -> Rollout:
        """Draw rollout `index`, and choose the steps that are trained."""

        def keep(grid: Grid) -> Keep:
            live = self._choose(grid, index)[0][:, 0].tolist() if self.config.steps.keep_graph else []
            negatives = self.config.freezes_negative and self._replays
            return Keep(predictions=True, live_steps=frozenset(live), negatives=negatives)

        self.rollout = None  # its graphs, before the next one's are made
        watched = self.monitor.before(index)
        rollout = self.rollouts.draw(index, keep)
        names = self._info_names
        if names is None:
            names = self._info_names = self.run.processes.gather(tuple(rollout.info))[0]
        # Every update logs the same names, on every process, whatever a reward says this time.
        info = {name: rollout.info.get(name, math.nan) for name in names}
        self.rollout = replace(rollout, info=info, watched=watched)
        self.chosen, self.stands_for = self._choose(self.rollout.trajectory.grid, index)
        return self.rollout

    def steps(self, rollout: Rollout) -> Steps:
        """The steps of the rollout in use that are trained, and what to log of it."""
        steps = steps_of(rollout, self.chosen, self.stands_for, is_frozen=self.config.freezes_negative)
        return replace(steps, facts=self.facts(rollout))

    def facts(self, rollout: Rollout) -> dict[str, Tensor]:
        """What to log of a rollout; an algorithm that compares by each reward apart tells their shares anew."""
        weights, processes = self.rollouts.rewards.weights, self.run.processes
        raw = raw_in_groups(rollout, weights, processes, images_per_prompt=self.config.rollout.images_per_prompt)
        return {**rollout_facts(rollout, processes), **share_facts(raw, processes)}

    def reference(self, steps: Steps, *, guidance_scale: float | None = None) -> Output:
        """The guided output of the reference at every step.

        Args:
            guidance_scale: That of training by default.
        """
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        return reference_prediction(self.run.policy, steps, guidance_scale=guidance, batch_size=self.batch_size)

    def measured_kl(self, rollout: Rollout) -> Tensor:
        """KL of the path from the reference's, to be logged; see `rpo.trainers.rollouts.costs.measured_kl`."""
        return measured_kl(
            self.run.policy,
            rollout,
            self.kernel,
            guidance_scale=self.config.rollout.guidance_scale,
            batch_size=self.batch_size,
            processes=self.run.processes,
        )

    def batches(self, prepare: Callable[[int], Steps], again: Callable[[Steps], Steps]) -> StepBatches:
        """The micro-batches of rollouts whose steps `prepare` makes, and `again` for each further update."""
        config, share = self.config, (self.run.processes.index, self.run.processes.count)

        def prepared(index: int) -> Steps:
            steps = prepare(index)
            if config.rollout.rewards_leave:
                self.rollouts.rewards.leave()
            return steps

        return StepBatches(
            prepared,
            again,
            self._live,
            config.steps,
            rollout=config.rollout,
            accumulate=self.division[1],
            seed=config.seed,
            device=self.run.model.device,
            share=share,
        )

    def _live(self, steps: Steps) -> Iterator[Steps]:
        """The steps of the rollout with their graphs, a batch of one step at a time."""
        assert self.rollout is not None
        first, images = 0, self.rollout.num_images
        for chunk in self.rollout.chunks:
            size = chunk.latents.shape[1]
            for row, step in enumerate(self.chosen[:, 0].tolist()):
                rows = torch.arange(first, first + size) + row * images
                yield replace(steps.select(rows), live=chunk.live[step])
            first += size

    def _choose(self, grid: Grid, index: int) -> tuple[Int[Tensor, "trained images"], float]:
        config, process = self.config, self.run.model.process
        if not self._replays:  # the moments are of the process, wherever the rollout's grid ends
            grid = grid_at(process, uniform_times(process, grid.num_steps))
        every, stands_for = choose_steps(
            grid,
            config.rollout.images,
            config.steps,
            keyed_generator("steps", config.seed, index),
            skips_clean_end=self._skips_clean_end,
            skips_last=self._skips_last,
        )
        if self._shares_steps:
            size = config.rollout.images_per_prompt
            every = every[:, ::size].repeat_interleave(size, dim=1)
        return self.run.processes.own(every, dim=1), stands_for

    def checks(
        self,
        loss: Callable[[Steps], StepOutput],
        *,
        said: frozenset[str] = frozenset(),
        has_ratio: bool = True,
        kernel: Kernel | None = None,
    ) -> list[Check]:
        """What must hold before the first update.

        Args:
            said: The predictions that the loss asks for.
            has_ratio: Whether it asks for likelihoods of steps that were drawn.
            kernel: In which it measures the KL of a step; by default that of the rollouts.
        """
        subject = Subject(
            self.run,
            self.config,
            self.rollouts,
            loss,
            skips_clean_end=self._skips_clean_end,
            has_ratio=has_ratio and self._replays and self.config.rollout.has_density,
            kernel=kernel or self.kernel,
            images=self.config.rollout.images // self.run.processes.count,
            trained_steps=self.trained_steps,
            micro_batch=self.division[0],
            said=said,
        )
        return online_checks(subject)

    def plan(self) -> list[str]:
        """What a person should know of the rollouts."""
        config, rollout = self.config, self.config.rollout
        rollouts = -(-config.learning.updates // config.steps.updates_per_rollout)
        return [
            f"{self.rollouts.prompts.described}, rewards {', '.join(self.rollouts.rewards.weights)}",
            f"rollout: {rollout.prompts} prompts × {rollout.images_per_prompt} images, {rollout.num_steps} steps "
            f"of {rollout.solver} at eta {rollout.eta:g}, guidance {rollout.guidance_scale:g}; "
            f"{rollouts:,} rollouts = {rollouts * rollout.images:,} images",
            f"{self.trained_steps} {'steps of each path' if self._replays else 'moments of each image'} are trained",
            *self.monitor.notes(),
            *self.rollouts.notes(),
        ]

    @property
    def identity(self) -> dict[str, str]:
        """Prompts and rewards, as text by name; and which steps an update learns."""
        rewards = ", ".join(f"{name} × {weight:g}" for name, weight in self.rollouts.rewards.weights.items())
        return {**self.rollouts.prompts.identity, "rewards": rewards}

    def previewed(self) -> PreviewOf:
        """The first prompts, drawn with the number of steps and the guidance of the rollouts."""
        rollout = self.config.rollout
        return PreviewOf(
            self.rollouts.prompts.shown, rollout.num_steps, rollout.guidance_scale, canvas=self.rollouts.canvas
        )


def _division(config: OnlineConfig, processes: int, trained_steps: int) -> tuple[int, int]:
    """(steps per micro-batch, micro-batches per update and process)."""
    rollout, steps = config.rollout, config.steps
    images = rollout.images // processes
    if steps.keep_graph:
        size = min(rollout.batch_size, images)
        if images % size:
            raise InputError(
                f"rollout.batch_size is {rollout.batch_size} with steps.keep_graph, but {images} images per process "
                "are drawn; give a divisor of that"
            )
        return size, trained_steps * (images // size)
    every = images * trained_steps
    per_update, rest = divmod(every, steps.minibatches)
    if rest:
        raise InputError(
            f"a rollout gives {every} steps per process ({images} images × {trained_steps} trained steps), which "
            f"steps.minibatches={steps.minibatches} does not divide; use a divisor of {every}"
        )
    size = next(n for n in range(min(config.learning.micro_batch, per_update), 0, -1) if per_update % n == 0)
    return size, per_update // size
