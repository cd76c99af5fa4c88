"""How well a model does on prompts that it was not trained on, by a reward that had no say in its training.

Models are compared on the same prompts and noise, image by image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from rpo.data.prompts import SHAPES, read_prompts
from rpo.errors import InputError
from rpo.evaluation.intervals import Interval, paired_gain
from rpo.models.base import DiffusionModel
from rpo.ranges import Count, Fraction, GuidanceScale, Seed, Text
from rpo.rewards import load_reward, score
from rpo.settings import settings
from rpo.shapes import ETA, GUIDANCE_SCALE, NUM_STEPS
from rpo.shapes.prompts import Split, sample_prompts

SPLITS: tuple[Split, ...] = ("in_domain", "out_of_domain")
"""The domains of the embedded prompts that no training sees."""


@settings
class HeldOutConfig:
    """What a model is judged on, and by whom."""

    prompts: Text = SHAPES
    """A text file with one prompt per line, or a .jsonl file whose lines have a "prompt"; "shapes" is both domains of
    its held-out prompts. None of them may be trained on."""

    count: Count = 160
    """Prompts of each domain; 100 to 400. More narrow the intervals."""

    images_per_prompt: Count = 1
    """More prompts tell more than more images of one; 1 to 4."""

    reward: Text = "shapes-strict"
    """Name of a reward, or "package.module:attribute"; it must not be among those that filter pairs."""

    num_steps: Count = NUM_STEPS
    """DDIM steps; 20 to 50."""

    eta: Fraction = ETA
    """Noise level of the steps: 0 is deterministic, as usual for Stable Diffusion; 1, for shapes, ancestral."""

    guidance_scale: GuidanceScale = GUIDANCE_SCALE
    """7.5 is usual for Stable Diffusion, 2 for shapes."""

    batch_size: Count = 64
    """Images at once; changes the speed only."""

    seed: Seed = 0
    """Of the prompts' draw and of the noise; the same one makes two models comparable."""


@dataclass(frozen=True)
class HeldOutScores:
    """One model's scores, by domain."""

    prompts: Mapping[str, Sequence[str]]
    """The prompt of every image."""
    scores: Mapping[str, NDArray[np.float64]]
    """One per image; with "shapes-strict", 1 where it shows what was asked for."""

    @property
    def means(self) -> dict[str, float]:
        """The mean score, by domain."""
        return {domain: float(scores.mean()) for domain, scores in self.scores.items()}

    def gain_over(self, before: "HeldOutScores", *, seed: int = 0) -> dict[str, Interval]:
        """The mean difference from another model on the same prompts and noise, by domain."""
        if before.prompts != self.prompts:
            raise InputError(
                "the two models were judged on other prompts, but a paired gain compares image by image; judge both "
                "with one HeldOut"
            )
        return {
            domain: paired_gain(before.scores[domain], scores, groups=self.prompts[domain], seed=seed)
            for domain, scores in self.scores.items()
        }


@final
class HeldOut:
    """Judges models on the same prompts and noise.

    Attributes:
        config: The settings.
        prompts: By domain.
    """

    def __init__(self, config: HeldOutConfig):
        """Read the prompts and load the reward."""
        self.config = config
        self.prompts = _prompts(config)
        self._reward = load_reward(config.reward)

    def refuse_trained(self, prompts: Sequence[str]) -> None:
        """Make sure that none of the prompts is trained on."""
        both = sorted(set(prompts) & {one for some in self.prompts.values() for one in some})
        if both:
            raise InputError(
                f"{len(both)} of the held-out prompts are trained on, {both[0]!r} for one; expected none, or the gain "
                "would not be one on new prompts; remove them from held_out.prompts"
            )

    def judge(self, model: DiffusionModel, *, progress: str | None = None) -> HeldOutScores:
        """Draw the images of a model and score them."""
        from rpo.sampling.sample import generate  # not at the top: its settings are described without diffusers

        config, scores = self.config, dict[str, NDArray[np.float64]]()
        repeated = {domain: _repeat(some, config.images_per_prompt) for domain, some in self.prompts.items()}
        for domain, prompts in self.prompts.items():
            images = generate(
                model,
                prompts,
                seed=config.seed,
                images_per_prompt=config.images_per_prompt,
                num_steps=config.num_steps,
                eta=config.eta,
                guidance_scale=config.guidance_scale,
                batch_size=config.batch_size,
                progress=f"{progress}, {domain}" if progress else None,
            )
            values = score(self._reward, images.to(model.device), repeated[domain], name=config.reward)
            scores[domain] = values.double().cpu().numpy()
        return HeldOutScores(repeated, scores)


def _prompts(config: HeldOutConfig) -> dict[str, list[str]]:
    if config.prompts == SHAPES:
        return {split: [prompt.text for prompt in sample_prompts(split, config.count, config.seed)] for split in SPLITS}
    domain = Path(config.prompts).stem
    return {domain: read_prompts(config.prompts, seed=config.seed)[: config.count]}


def _repeat(prompts: Sequence[str], times: int) -> list[str]:
    return [prompt for prompt in prompts for _ in range(times)]
