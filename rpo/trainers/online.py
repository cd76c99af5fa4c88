"""An online run: what GRPO and score-as-action share between the pipeline and the loop.

One object that holds the policy, its rollouts and the run's folder, and divides a rollout into the micro-batches of an
update. What a step is worth, and what is descended, is the trainers' own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import final

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from rpo.config import to_yaml
from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.process.transition import Kernel
from rpo.publishing.publish import PublishPlan, publish, write_model_card
from rpo.randomness import keyed_generator
from rpo.rewards import RewardLike, load_rewards
from rpo.sampling.sample import Keep
from rpo.text import write_text
from rpo.trainers.checks.preflight import Subject, preflight
from rpo.trainers.checks.prepared import loop_for, prepared_model
from rpo.trainers.identity import base_identity, card_of, prompts_identity, settings_identity
from rpo.trainers.online_settings import OnlineSettings, division
from rpo.trainers.policy import make_policy
from rpo.trainers.rollouts.batches import PointBatches
from rpo.trainers.rollouts.draw import Rollout, Rollouts
from rpo.trainers.rollouts.moments import measured_kl
from rpo.trainers.rollouts.points import Points, choose_steps, points_of
from rpo.trainers.rollouts.preview import PREVIEWS, Preview
from rpo.training.checkpoint import checkpoints
from rpo.training.loop import TrainResult, describe, fit
from rpo.training.loop_config import LoopConfig
from rpo.training.processes import Processes
from rpo.training.resume import claimed
from rpo.training.state import Stateful
from rpo.types import Grid, StepOutput


@final
class OnlineRun:
    """The policy, its rollouts, and the run's folder.

    Attributes:
        model: The pipeline as a diffusion model.
        policy: What is trained.
        rollouts: Draws and scores images.
        rollout: The one in use.
        steps: Which of its steps are trained, [trained, images].
        stands_for: How many steps of a trajectory they stand for.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline | DiffusionModel,
        rewards: RewardLike,
        prompts: Sequence[str],
        settings: OnlineSettings,
    ):
        """Check everything that can be checked before the first update, and add the adapter."""
        self.settings = settings
        self.model = prepared_model(pipe, settings.loop)
        self.processes = Processes()
        self._base = base_identity(self.model)
        self.policy = make_policy(self.model, settings.adapter, seed=settings.seed)
        self.rollouts = Rollouts(
            self.model,
            prompts,
            load_rewards(rewards),
            settings.rollout,
            seed=settings.seed,
            share=(self.processes.index, self.processes.count),
            evidence=settings.evidence,
        )
        self.rollout: Rollout | None = None
        self.steps = torch.zeros(0, 0, dtype=torch.long)
        self.stands_for = 0.0
        self.micro_batch, self.accumulate = division(settings, self.processes.count, self.trained_steps)

    @property
    def trained_steps(self) -> int:
        """Steps of each trajectory that are trained."""
        rollout, learning = self.settings.rollout, self.settings.learning
        if rollout.max_steps is not None and learning.train_steps is None:
            raise InputError(
                f"rollout.max_steps is {rollout.max_steps}, so rollouts differ in length, but every update needs the "
                f"same number of points; give learning.train_steps, at most {rollout.num_steps - 1}"
            )
        return self._choose(self.rollouts.grid(0), 0)[0].shape[0]

    @property
    def batch_size(self) -> int:
        """Latents that go through the denoiser at once outside `sample`."""
        return self.settings.learning.micro_batch

    @property
    def guidance_scale(self) -> float:
        """Guidance of the trained prediction."""
        given = self.settings.learning.guidance_scale
        return self.settings.rollout.guidance_scale if given is None else given

    @property
    def freezes_negative(self) -> bool:
        """Whether the negative branch of the trained prediction comes from the rollout."""
        return self.settings.learning.freeze_negative and self.guidance_scale > 1

    def draw(self, index: int) -> Rollout:
        """Draw rollout `index`, and choose the steps that are trained."""
        learning = self.settings.learning

        def keep(grid: Grid) -> Keep:
            live = self._choose(grid, index)[0][:, 0].tolist() if learning.keep_graph else []
            return Keep(predictions=True, live_steps=frozenset(live), freeze_negative=self.freezes_negative)

        self.rollout = None  # its graphs, before the next one's are made
        self.rollout = self.rollouts.draw(index, keep)
        self.steps, self.stands_for = self._choose(self.rollout.trajectory.grid, index)
        return self.rollout

    def measured_kl(self, rollout: Rollout, kernel: Kernel) -> Tensor:
        """KL of the path from the reference's, to be logged; see `rpo.trainers.rollouts.moments.measured_kl`."""
        guidance, size = self.settings.rollout.guidance_scale, self.batch_size
        return measured_kl(self.policy, rollout, kernel, guidance, batch_size=size, processes=self.processes)

    def points(self, rollout: Rollout) -> Points:
        """The moments of the rollout in use that are trained."""
        return points_of(rollout, self.steps, self.stands_for, is_frozen=self.freezes_negative)

    def _choose(self, grid: Grid, index: int) -> tuple[Int[Tensor, "trained images"], float]:
        settings = self.settings
        generator, skips = keyed_generator("steps", settings.seed, index), settings.skips_clean_end
        every, stands_for = choose_steps(
            grid, settings.rollout.images, settings.learning, generator, skips_clean_end=skips
        )
        return self.processes.own(every, dim=1), stands_for

    def live(self, points: Points) -> Iterator[Points]:
        """The points of the rollout with their graphs, a batch of one step at a time."""
        assert self.rollout is not None
        first = 0
        images = self.rollout.num_images
        for chunk in self.rollout.chunks:
            size = chunk.latents.shape[1]
            for row, step in enumerate(self.steps[:, 0].tolist()):
                rows = torch.arange(first, first + size) + row * images
                yield replace(points.select(rows), live=chunk.live[step])
            first += size

    def batches(self, prepare: Callable[[int], Points]) -> PointBatches:
        """The micro-batches of rollouts that `prepare` makes the points of."""
        config, seed = self.settings.learning, self.settings.seed
        rollout, share = self.settings.rollout, (self.processes.index, self.processes.count)
        return PointBatches(
            prepare, self.live, config, rollout=rollout, accumulate=self.accumulate, seed=seed, share=share
        )

    def fit(
        self,
        prepare: Callable[[int], Points],
        loss: Callable[[Points], StepOutput],
        *,
        resume: bool,
        state: Mapping[str, Stateful],
        on_update: Callable[[int, dict[str, float]], None] | None = None,
    ) -> TrainResult:
        """Run all updates; see `rpo.training.loop.fit`."""
        settings = self.settings
        batches = self.batches(prepare)
        every, place = settings.preview_every if self.processes.is_main else 0, settings.folder / PREVIEWS
        preview = Preview(self.model, self.rollouts.prompts, settings.rollout, place, every=every, seed=settings.seed)

        def after(update: int, metrics: dict[str, float]) -> None:
            if on_update is not None:
                on_update(update, metrics)
            preview(update)

        self.model.denoiser.train(settings.adapter.gradient_checkpointing)  # diffusers checkpoints in training mode
        try:
            if not (resume and checkpoints(settings.folder)):
                if settings.preflight:
                    self._preflight(loss)
                preview(0)
            return fit(
                batches,
                loss,
                self.policy.parameters,
                self.loop,
                folder=settings.folder,
                names=lambda points: points.names,
                resume=resume,
                state={"batches": batches, **state},
                identity=self.identity,
                on_update=after,
            )
        finally:
            self.model.denoiser.eval()

    def _preflight(self, loss: Callable[[Points], StepOutput]) -> None:
        subject = Subject(
            self.model,
            self.policy,
            self.rollouts,
            self.settings,
            loss,
            guidance_scale=self.guidance_scale,
            freezes_negative=self.freezes_negative,
            images=self.settings.rollout.images // self.processes.count,
            trained_steps=self.trained_steps,
            micro_batch=self.micro_batch,
        )
        preflight(subject, say=tqdm.write if self.processes.is_main and self.settings.loop.progress else None)

    @property
    def loop(self) -> LoopConfig:
        """The loop's settings as they count."""
        return loop_for(self.model, self.settings.loop, accumulate=self.accumulate)

    def plan(self) -> str:
        """What the run comes to, in a few lines."""
        settings, rollout = self.settings, self.settings.rollout
        trained = sum(parameter.numel() for parameter in self.policy.parameters)
        rollouts = -(-settings.loop.updates // settings.learning.updates_per_rollout)
        return "\n".join(
            [
                f"{settings.method}, {settings.adapter.train}: {trained:,} parameters on {self.model.device}; "
                f"{len(self.rollouts.prompts)} prompts, rewards {', '.join(self.rollouts.rewards.weights)}",
                f"  rollout: {rollout.prompts} prompts × {rollout.images_per_prompt} images, {rollout.num_steps} steps "
                f"of {rollout.solver} at eta {rollout.eta:g}, guidance {rollout.guidance_scale:g}; "
                f"{rollouts:,} rollouts = {rollouts * rollout.images:,} images",
                f"  {describe(self.loop, self.micro_batch, self.processes.count, unit='points')}; "
                f"{self.trained_steps} steps of each path are trained",
                *self.rollouts.notes(),
            ]
        )

    @contextmanager
    def claim(self, *, resume: bool, lines: Sequence[str] | None = None) -> Iterator[None]:
        """Inside, the run's folder belongs to this run, and the plan and `lines`, if there are any, have been said."""
        with claimed(self.settings.folder, self.loop, self.identity, self.processes, resume=resume):
            if lines is not None and self.processes.is_main and self.settings.loop.progress:
                tqdm.write("\n".join((self.plan(), *lines)))
            yield

    def save(self, folder: str | PathLike[str] | None = None) -> Path:
        """Write what was trained, verified, with a model card and the settings."""
        settings = self.settings
        usual = "lora" if settings.adapter.train == "lora" else "pipeline"
        place = Path(folder) if folder else settings.folder / usual
        if self.processes.is_main:
            self.policy.save(place)
            write_text(place / "training_config.yaml", to_yaml(settings.whole, for_others=True))
            card = card_of(self.model, settings.method, settings.whole, is_lora=settings.adapter.train == "lora")
            write_model_card(place, card)
        return place

    def publish(self, repo_id: str, *, push: bool, private: bool) -> PublishPlan:
        """Save and say what publishing would upload; upload it with `push`."""
        return publish(self.save(), repo_id, push=push, private=private)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What decides about the result; how long a run is, and where it lies, may change."""
        settings = settings_identity(self.settings.whole, {"loop", "folder", "preview_every", "preflight"})
        rewards = ", ".join(f"{name} × {weight:g}" for name, weight in self.rollouts.rewards.weights.items())
        return settings | self._base | prompts_identity(self.rollouts.prompts) | {"rewards": rewards}
