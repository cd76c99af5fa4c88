"""How well a model does on prompts that it was not trained on, by a judge that had no say in its training.

Models are compared on the same prompts and noise, image by image. A judge is a reward, or anything else that gives an
image a number.
"""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from rpo.config.ranges import Count, Fraction, GuidanceScale, Seed, Text
from rpo.config.settings import settings
from rpo.data.pixels import to_pixels
from rpo.data.prompts import HELD_OUT, read_prompts
from rpo.errors import InputError
from rpo.evaluation.intervals import Interval, paired_gain
from rpo.files.whole import written_whole
from rpo.models.base import DiffusionModel
from rpo.plugins import load_plugin
from rpo.rewards import load_reward, score
from rpo.types import Canvas, Images

if TYPE_CHECKING:
    from rpo.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Sampling:
    """Everything besides the model and the prompts that determines the images."""

    seed: int
    images_per_prompt: int = 1
    num_steps: int | None = None
    """Nothing is the pipeline's own number, as is nothing for the guidance."""
    guidance_scale: float | None = None
    eta: float = 0.0
    solver: Literal["ddim", "dpm_solver"] = "ddim"
    spacing: Literal["checkpoint", "uniform"] = "checkpoint"
    canvas: Canvas | None = None
    """Nothing is the checkpoint's own size."""

    def draw(
        self,
        model: DiffusionModel,
        prompts: Sequence[str],
        *,
        first: tuple[int, int] = (0, 0),
        batch_size: int | None = None,
        progress: str | None = None,
    ) -> Images:
        """A model's images of the prompts, those of one prompt beside each other.

        Args:
            first: Numbers of the first prompt and image, of a part of a larger set.
        """
        from rpo.models.usual import usual_guidance, usual_steps  # not at the top: the settings are described without
        from rpo.sampling.sample import generate

        return generate(
            model,
            prompts,
            seed=self.seed,
            images_per_prompt=self.images_per_prompt,
            num_steps=usual_steps(model, self.num_steps),
            guidance_scale=usual_guidance(model, self.guidance_scale),
            eta=self.eta,
            solver=self.solver,
            spacing=self.spacing,
            canvas=self.canvas,
            first=first,
            batch_size=batch_size,
            progress=progress,
        )


@dataclass(frozen=True)
class Judged:
    """One model's scores of a list of prompts, one per image."""

    texts: tuple[str, ...]
    """The prompt of every image, which is what images resemble each other by."""
    domains: tuple[str, ...]
    """Where each of them is from."""
    scores: NDArray[np.float64]
    sampling: Sampling
    images: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8), repr=False)
    """[images, height, width, 3], as they were judged; those above 256 pixels are kept small, to be looked at."""

    told_by: str = ""
    """Name of what can tell more of these images than their scores; see `rpo.reports.training.RESULTS`."""

    def write(self, file: Path) -> None:
        """Keep scores and images, whole or not at all; `HeldOut.read` reads them."""
        with written_whole(file) as partial, partial.open("wb") as stream:
            np.savez_compressed(stream, scores=self.scores, images=self.images)

    def where(self, domain: str) -> NDArray[np.intp]:
        """Indices of the images of one domain."""
        return np.flatnonzero(np.asarray(self.domains) == domain)

    @property
    def by_domain(self) -> dict[str, NDArray[np.float64]]:
        """The scores of each domain."""
        return {domain: self.scores[self.where(domain)] for domain in dict.fromkeys(self.domains)}

    @property
    def means(self) -> dict[str, float]:
        """The mean score, by domain."""
        return {domain: float(scores.mean()) for domain, scores in self.by_domain.items()}

    def gain_in_words(self, before: "Judged") -> str:
        """The mean of both models with the gain and its interval, a line for each domain."""
        gains, means = self.gains_over(before), before.means
        lines = [
            f"{domain}: {means[domain]:.3f} -> {self.means[domain]:.3f} ({gain.value:+.3f} [{gain.low:+.3f}, "
            f"{gain.high:+.3f}])"
            for domain, gain in gains.items()
        ]
        return "\n".join(["mean score on held-out prompts, base -> aligned (gain [95 % interval])", *lines])

    def gains_over(self, before: "Judged", *, seed: int = 0) -> dict[str, Interval]:
        """The mean difference from another model on the same prompts and noise, by domain."""
        check_comparable(before, self)
        return {
            domain: paired_gain(
                before.by_domain[domain], scores, groups=[self.texts[one] for one in self.where(domain)], seed=seed
            )
            for domain, scores in self.by_domain.items()
        }


def check_comparable(before: Judged, after: Judged) -> None:
    """Refuse to compare images that differ in more than the model."""
    if before.sampling != after.sampling:
        raise InputError(
            f"before was drawn with {before.sampling} and after with {after.sampling}, but a paired gain needs the "
            "same noise for both; evaluate both with one Sampling"
        )
    if before.texts != after.texts or before.domains != after.domains:
        raise InputError(
            f"before has {len(before.texts)} images and after {len(after.texts)}, and their prompts differ, but a "
            "paired gain compares image by image; evaluate both on one list of prompts"
        )


VERIFIERS = {"shapes": "shapes-strict", "words": "words-judge"}
"""By the name of held-out prompts: the reward that is the truth about them."""

LARGEST_SHOWN = 256
"""Pixels of the longer side of an image that is kept to be looked at."""

J = TypeVar("J", bound=Judged)


@dataclass(frozen=True)
class Measurement(Generic[J]):
    """A checkpoint, and the same with a LoRA if one was given, on the same prompts and seeds."""

    base: J
    aligned: J | None = None


def measure(
    model: "Checkpoint", judge: Callable[["Checkpoint", str], J], *, lora: Path | None = None
) -> Measurement[J]:
    """Judge a checkpoint and, if a LoRA is given, the checkpoint with it.

    Args:
        model: A checkpoint without an adapter; it has none afterwards either.
        judge: From a model, and what to call it, to its images' scores.
    """
    aligned = None
    if lora is not None:  # before the base, so that a file that does not fit is told at once
        from rpo.adapters.lora import load_lora

        load_lora(model, lora)
        aligned = judge(model, "aligned")
        model.pipe.unload_lora_weights()
    return Measurement(judge(model, "base"), aligned)


FEWEST = 2
"""Prompts of a domain, between which a gain can spread."""


@settings
class HeldOutConfig:
    """What a model is judged on, and by whom."""

    prompts: Text = "shapes"
    """A text file with one prompt per line, or a .jsonl file whose lines have a "prompt"; "shapes" is both domains of
    its held-out prompts. None of them may be trained on."""

    count: Count = 160
    """Prompts of each domain; 100 to 400. More narrow the intervals."""

    images_per_prompt: Count = 1
    """More prompts tell more than more images of one; 1 to 4."""

    reward: Text = "shapes-strict"
    """Name of a reward, or "package.module:attribute"; it must not be among those that filter pairs."""

    num_steps: Count | None = None
    """DDIM steps; nothing is the pipeline's own number, 50 for Stable Diffusion. 20 for shapes."""

    eta: Fraction = 0.0
    """Noise level of the steps: 0 is deterministic, as usual for Stable Diffusion; 1, for shapes, ancestral."""

    guidance_scale: GuidanceScale | None = None
    """Nothing is the pipeline's own, 7.5 for Stable Diffusion. 2 for shapes."""

    batch_size: Count | None = None
    """Images at once, which changes speed and memory alone; nothing is 64 small ones, 16 of 512 px, 4 of 1024."""

    seed: Seed = 0
    """Of the prompts' draw and of the noise; the same one makes two models comparable."""


@final
class HeldOut:
    """Judges models by a reward on the same prompts and noise.

    Attributes:
        prompts: By domain; each domain's noise begins anew.
    """

    def __init__(self, config: HeldOutConfig):
        """Read the prompts and load the reward."""
        self.prompts = _prompts(config)
        if few := [domain for domain, prompts in self.prompts.items() if len(prompts) < FEWEST]:
            raise InputError(
                f"there is {len(self.prompts[few[0]])} held-out prompt ({few[0]}), but an interval over prompts needs "
                f"{FEWEST} or more; raise held_out.count, or add prompts to {config.prompts!r}"
            )
        self._config = config
        self._reward = load_reward(config.reward)

    def refuse_trained(self, prompts: Sequence[str]) -> None:
        """Make sure that none of the prompts is trained on."""
        both = sorted(set(prompts) & {one for some in self.prompts.values() for one in some})
        if both:
            raise InputError(
                f"{len(both)} of the held-out prompts are trained on, {both[0]!r} for one; expected none, or the gain "
                "would not be one on new prompts; remove them from held_out.prompts"
            )

    def read(self, file: Path) -> Judged:
        """What `Judged.write` kept of a model that these prompts were drawn with."""
        try:
            with np.load(file, allow_pickle=False) as kept:
                return self._of(kept["scores"], kept["images"])
        except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{file} is damaged ({error}); expected scores and images; delete it") from error

    def judge(self, model: DiffusionModel, *, progress: str | None = None) -> Judged:
        """Draw the images of a model and score them."""
        config, scores, shown = self._config, list[NDArray[np.float64]](), list[NDArray[np.uint8]]()
        drawn = self._sampling
        for domain, prompts in self.prompts.items():
            title = f"{progress}, {domain}" if progress else None
            images = drawn.draw(model, prompts, batch_size=config.batch_size, progress=title)
            shown.append(_to_look_at(images))
            images = images.to(model.device)
            texts = repeated(prompts, config.images_per_prompt)
            scores.append(score(self._reward, images, texts, name=config.reward).double().cpu().numpy())
        return self._of(np.concatenate(scores), np.concatenate(shown))

    def _of(self, scores: NDArray[np.float64], images: NDArray[np.uint8]) -> Judged:
        config = self._config
        told_by = config.prompts if config.reward == VERIFIERS.get(config.prompts) else ""
        return Judged(*columns_of(self.prompts, config.images_per_prompt), scores, self._sampling, images, told_by)

    @property
    def _sampling(self) -> Sampling:
        config = self._config
        return Sampling(config.seed, config.images_per_prompt, config.num_steps, config.guidance_scale, eta=config.eta)


def _to_look_at(images: Images) -> NDArray[np.uint8]:
    from torch.nn.functional import interpolate  # not at the top: the settings are described without torch

    scale = LARGEST_SHOWN / max(images.shape[2:])
    if scale < 1:
        images = interpolate(images, scale_factor=scale, mode="bilinear", antialias=True).clamp(0, 1)
    return to_pixels(images)


def columns_of(
    prompts_by_domain: Mapping[str, Sequence[str]], images_per_prompt: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The prompt and the domain of every image, those of one prompt beside each other."""
    texts = {domain: repeated(prompts, images_per_prompt) for domain, prompts in prompts_by_domain.items()}
    domains = tuple(domain for domain, some in texts.items() for _ in some)
    return tuple(text for some in texts.values() for text in some), domains


def repeated(prompts: Sequence[str], times: int) -> list[str]:
    """Each prompt several times in a row."""
    return [prompt for prompt in prompts for _ in range(times)]


def _prompts(config: HeldOutConfig) -> dict[str, list[str]]:
    if config.prompts in HELD_OUT:
        return load_plugin(config.prompts, HELD_OUT, "set of held-out prompts")(config.count, config.seed)
    return {Path(config.prompts).stem: read_prompts(config.prompts, seed=config.seed)[: config.count]}
