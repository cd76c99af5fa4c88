"""Rollouts: images drawn by the current policy to learn from, with their paths and their rewards.

A rollout is a number of groups, the images of one prompt. Its randomness is a function of (seed, visit, image), where
the visits to prompts are counted over all rollouts, so a resumed run draws the same images whatever the number of
processes; its grid is one of (seed, rollout), so all processes share it.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rpo.data.prompts import metadata_of
from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.models.checkpoint import Checkpoint
from rpo.models.solvers import BlackBoxSolver
from rpo.process.categorical import Unmasking
from rpo.process.continuous import grid_at, jittered_times, uniform_times
from rpo.process.diffusion import diffusion_of
from rpo.process.transition import Kernel
from rpo.randomness import keyed_generator
from rpo.rewards.base import WeightedRewards
from rpo.sampling.sample import Keep, sample
from rpo.sampling.step import predict
from rpo.trainers.rollouts.failed import FailedScores
from rpo.trainers.rollouts.gates import counted, read_gates
from rpo.trainers.rollouts.prompts import Prompts, PromptSource, prompts_from
from rpo.trainers.rollouts.settings import RolloutConfig
from rpo.training.log import REWARD_INFO
from rpo.training.processes import Processes
from rpo.training.randomness import undisturbed_randomness
from rpo.types import Conditioning, Grid, Images, Latents, Node, Output, PerSample, Trajectory, join_conditioning

PROMPTS_KEPT = 2048
"""Embeddings at hand, the least recently drawn leave first: 1 GiB of Stable Diffusion 1.5's."""

JITTER = 0.9
"""How far random spacing moves a node, in steps; below 1, so that nodes keep their order."""


OnImages = Callable[[int, Images, tuple[str, ...], tuple[Any, ...], PerSample], object]
"""Called with a rollout's number, its images, prompts, metadata and rewards, each with one entry per image; the reward
of an image that could not be judged is NaN."""


@dataclass(frozen=True)
class Rollout:
    """What was drawn, and what it is worth."""

    index: int
    trajectory: Trajectory
    """Of all images; without live graphs."""
    chunks: tuple[Trajectory, ...]
    """The same as it was drawn, batch by batch, with the graphs that were kept."""
    prompts: tuple[str, ...]
    """One per image."""
    group: Int[Tensor, " batch"]
    """Which images share a prompt: 0, 0, 1, 1, …"""
    rewards: PerSample
    """The weighted sum of all rewards; NaN where any of them could not judge the image."""
    parts: dict[str, PerSample]
    """The raw score of each reward, by name; NaN at the same images."""
    counted: dict[str, PerSample]
    """The same where it counts: NaN also where the gate of a reward is shut."""
    counts: PerSample
    """What each image counts in a mean over those of all processes: see `rpo.trainers.rollouts.failed`."""
    names: tuple[str, ...]
    """What a person finds each image by."""
    visits: tuple[tuple[int, int], ...]
    """(visit to a prompt, image) of each, which all of its randomness is a function of."""
    info: dict[str, float]
    """What the rewards say beside their scores, as means over the images, by "reward.name"."""
    watched: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What was seen of the policy before it, by the name of its metric."""

    @property
    def num_images(self) -> int:
        """Images of this process."""
        return len(self.prompts)

    @property
    def judged(self) -> Bool[Tensor, " batch"]:
        """Which images have a score."""
        return self.counts > 0


def rollout_facts(rollout: Rollout, processes: Processes) -> dict[str, Tensor]:
    """What to log of a rollout's rewards: of the judged images of all processes."""
    is_judged = processes.join(rollout.counts) > 0
    rewards = processes.join(rollout.rewards)[is_judged]
    several = rollout.parts if len(rollout.parts) > 1 else {}
    gated = {name: one for name, one in rollout.counted.items() if one is not rollout.parts[name]}
    return {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(correction=0),
        "reward/failed": 1 - is_judged.float().mean(),
        **{f"reward/{name}": processes.join(part)[is_judged].mean() for name, part in several.items()},
        **{f"reward/{name}/counted": _share(processes.join(one), is_judged) for name, one in gated.items()},
        **{f"{REWARD_INFO}{name}": rollout.rewards.new_full((), mean) for name, mean in rollout.info.items()},
        **rollout.watched,
    }


def _share(counted: PerSample, is_judged: Bool[Tensor, " batch"]) -> Tensor:
    return (~counted[is_judged].isnan()).float().mean()


def training_kernel(model: DiffusionModel, config: RolloutConfig) -> Kernel:
    """The kernel in which one step of a rollout is learnt; a multistep solver's is the DDIM step, its first order."""
    return diffusion_of(model.prediction_type).kernel(config.solver, config.eta, config.order)


@final
class Rollouts:
    """Draws and scores the rollouts of one process."""

    def __init__(
        self,
        model: DiffusionModel,
        prompts: PromptSource | Prompts,
        rewards: WeightedRewards,
        config: RolloutConfig,
        *,
        seed: int,
        share: tuple[int, int] = (0, 1),
        evidence: Path | None = None,
        join: Callable[[Tensor], Tensor] | None = None,
        on_images: OnImages | None = None,
        gates: Mapping[str, str] | None = None,
        as_reference: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        """Prepare.

        Args:
            prompts: See `rpo.trainers.rollouts.prompts`.
            evidence: A folder for images and prompts of scores that failed.
            join: From a tensor of this process to those of all that share the rollout; alone without.
            on_images: Called on the main process with its images of every rollout that is trained on.
            gates: When a reward counts; see `rpo.trainers.rollouts.gates`.
            as_reference: Inside what it gives, `model` is the reference, which may say in which order tokens are kept.
        """
        self.model, self.rewards, self.config = model, rewards, config
        self.prompts, self.gates = prompts_from(prompts, seed), read_gates(gates or {}, rewards.weights)
        self._seed, self._on_images, self._as_reference = seed, on_images, as_reference
        _check_solver(model, config)
        self.failed = FailedScores(config.max_failed, join=join, evidence=evidence)
        self.canvas = model.canvas_of(config.resolution) if isinstance(model, Checkpoint) else None
        self._process, processes = share
        self._is_shown = self._process == 0
        if config.prompts % processes:
            raise InputError(
                f"rollout.prompts is {config.prompts} for {processes} processes, but each needs an equal share; give a "
                f"multiple of {processes}"
            )
        self._own_prompts = config.prompts // processes
        self._embeds: OrderedDict[str, Conditioning] = OrderedDict()

    def aside(
        self,
        config: RolloutConfig,
        *,
        seed: int,
        share: tuple[int, int] = (0, 1),
        prompts: PromptSource | None = None,
        rewards: WeightedRewards | None = None,
        on_images: OnImages | None = None,
    ) -> "Rollouts":
        """Rollouts that are looked at and not learnt from; each prompt is encoded once for both.

        Args:
            config: How they are drawn.
            seed: Of their noise.
            share: Of all that draw them together, such as (1, 4); this process alone by default.
            prompts: These by default.
            rewards: These by default.
            on_images: Called with the images of each, on every process with its own.
        """
        given, judges = self.prompts if prompts is None else prompts, rewards or self.rewards
        evidence = self.failed.evidence
        made = Rollouts(
            self.model,
            given,
            judges,
            config,
            seed=seed,
            share=share,
            evidence=evidence,
            on_images=on_images,
            as_reference=self._as_reference,
        )
        made._embeds, made._is_shown = self._embeds, True
        return made

    def notes(self) -> list[str]:
        """What a plan has to say of the prompts: those that the text encoder cuts."""
        notes = self.model.notes_on(self.prompts.shown) if isinstance(self.model, Checkpoint) else []
        return notes

    def grid(self, index: int) -> Grid:
        """The grid of a rollout; the same on every process."""
        config = self.config
        if config.solver == "dpm_solver":
            return BlackBoxSolver(self.model, config.num_steps, canvas=self.canvas).grid
        if config.spacing == "checkpoint":
            return self.model.grid(config.num_steps, self.canvas)
        generator = keyed_generator("grid", self._seed, index)
        high = config.max_steps or config.num_steps
        num_steps = int(torch.randint(config.num_steps, high + 1, (), generator=generator, device="cpu"))
        process = self.model.process
        if config.spacing == "uniform":
            times = uniform_times(process, num_steps)
        else:
            times = jittered_times(process, num_steps, generator, jitter=JITTER)
        return grid_at(process, times).to(self.model.device)

    def draw(self, index: int, keep: Callable[[Grid], Keep]) -> Rollout:
        """Draw rollout `index` with the policy as it is.

        Args:
            keep: From the grid to what is kept of its steps.
        """
        config, first = self.config, index * self.config.prompts + self._process * self._own_prompts
        # A rollout may visit a prompt more than once: the noise is that of the visit.
        jobs = [(first + row, image) for row in range(self._own_prompts) for image in range(config.images_per_prompt)]
        every = range(index * config.prompts, (index + 1) * config.prompts)
        visited = self.prompts.visited(every, self._seed)
        prompts = tuple(visited[place - every.start] for place, _ in jobs)
        generators = [keyed_generator("rollout", self._seed, place, image) for place, image in jobs]
        cond = self._conditioning(prompts)
        grid = self.grid(index)
        chunks, images = [], []
        for start in range(0, len(jobs), config.batch_size):
            part = slice(start, start + config.batch_size)
            kernel = self._kernel(cond.select(part))
            chunk = sample(
                self.model,
                cond.select(part),
                kernel.grid if isinstance(kernel, BlackBoxSolver) else grid,
                kernel,
                guidance_scale=config.guidance_scale,
                generators=generators[part],
                keep=keep(grid),
                canvas=self.canvas,
            )
            chunks.append(chunk)
            images.append(self.model.decode(chunk.x_0))
        joined = torch.cat(images)
        answers = self.rewards.ask(
            joined, prompts, evidence=self.failed.evidence, may_fail=True, batch_size=config.reward_batch_size
        )
        counts = self.failed.counts(answers, joined, prompts)
        parts = {name: one.values.masked_fill(counts == 0, math.nan) for name, one in answers.items()}
        info = {f"{name}.{key}": mean for name, one in answers.items() for key, mean in one.info.items()}
        gated = counted(parts, self.gates)
        total = sum(weight * parts[name] for name, weight in self.rewards.weights.items())
        assert isinstance(total, Tensor)
        group = torch.arange(self._own_prompts, device=total.device).repeat_interleave(config.images_per_prompt)
        names = tuple(f"rollout {index}, prompt {p!r}, image {job[1]}" for p, job in zip(prompts, jobs, strict=True))
        self._tell(index, joined, prompts, total)
        trajectory = _joined(chunks, cond)
        return Rollout(
            index, trajectory, tuple(chunks), prompts, group, total, parts, gated, counts, names, tuple(jobs), info
        )

    @torch.no_grad()
    def _tell(self, index: int, images: Images, prompts: tuple[str, ...], rewards: PerSample) -> None:
        """Show a rollout to whoever wants to see it, who may draw random numbers without changing the run."""
        if self._on_images is None or index < 0 or not self._is_shown:
            return
        with undisturbed_randomness(images.device):
            known = tuple(metadata_of(prompt) for prompt in prompts)
            self._on_images(index, images, tuple(map(str, prompts)), known, rewards.clone())

    def _kernel(self, cond: Conditioning) -> Kernel:
        if self.config.solver == "dpm_solver":
            return BlackBoxSolver(
                self.model, self.config.num_steps, canvas=self.canvas
            )  # it keeps a history: one per trajectory
        kernel = training_kernel(self.model, self.config)
        if not isinstance(kernel, Unmasking) or kernel.order == "policy":
            return kernel

        def reference(x_t: Latents, t: Node) -> Output:
            with self._as_reference():
                return predict(self.model, x_t, t, cond, guidance_scale=self.config.guidance_scale)

        return replace(kernel, reference=reference)

    def _conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Each prompt is encoded once and alone, so that a resumed run has the same bits, and kept on the CPU."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeds:
                self._embeds[prompt] = self.model.encode_prompts([prompt]).to("cpu")
            self._embeds.move_to_end(prompt)
        rows = [self._embeds[prompt] for prompt in prompts]
        while len(self._embeds) > max(PROMPTS_KEPT, self._own_prompts):
            self._embeds.popitem(last=False)
        return join_conditioning(rows).to(self.model.device)


def _check_solver(model: DiffusionModel, config: RolloutConfig) -> None:
    """Refuse for tokens what is said of latents."""
    said = {"solver": config.solver, "spacing": config.spacing}
    usual = {"solver": "ddim", "spacing": "checkpoint"}
    if said != usual and not diffusion_of(model.prediction_type).is_gaussian:
        told = ", ".join(f"rollout.{name}: {one}" for name, one in said.items() if one != usual[name])
        raise InputError(f"{told} is of latents, but this model draws tokens, in its own way; leave it out")


def _joined(chunks: Sequence[Trajectory], cond: Conditioning) -> Trajectory:
    first = chunks[0]
    if len(chunks) == 1:
        return replace(first, live={})
    predictions = [chunk.predictions for chunk in chunks if chunk.predictions is not None]
    negatives = [chunk.negatives for chunk in chunks if chunk.negatives is not None]
    return Trajectory(
        torch.cat([chunk.latents for chunk in chunks], dim=1),
        torch.cat([chunk.log_probs for chunk in chunks], dim=1),
        cond,
        first.grid,
        torch.cat(predictions, dim=1) if predictions else None,
        torch.cat(negatives, dim=1) if negatives else None,
    )
