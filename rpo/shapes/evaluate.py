"""How good a shapes model is: accuracy by kind of prompt, in and out of domain, and what a LoRA changes.

Two models are compared on the same prompts and seeds, image by image; `rpo.evaluation` judges and has the statistics,
and here are the verifier, the prompts and the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpo.data.pixels import to_pixels
from rpo.devices import device_named
from rpo.errors import InputError
from rpo.evaluation.comparison import (
    Accuracy,
    PairedComparison,
    accuracy,
    accuracy_by,
    compare,
    compare_by,
    format_gain,
    format_share,
)
from rpo.evaluation.held_out import Judged, Measurement, Sampling, check_comparable, columns_of, measure
from rpo.models.base import DiffusionModel
from rpo.models.checkpoint import Checkpoint
from rpo.shapes import ETA, GUIDANCE_SCALE, NUM_STEPS
from rpo.shapes.prompts import HELD_OUT, KINDS, Prompt, PromptKind, parse_prompt, sample_prompts
from rpo.shapes.verifier import Verdict, verify

__all__ = [
    "ShapesEvaluation",
    "accuracies",
    "comparisons",
    "evaluate",
    "evaluate_shapes",
    "format_accuracies",
    "held_out_prompts",
    "judge_images",
    "readable",
    "usual_sampling",
]


@dataclass(frozen=True)
class ShapesEvaluation(Judged):
    """One model's images of a list of prompts, and the verdict on each; images of one prompt lie beside each other."""

    prompts: tuple[Prompt, ...] = ()
    """One per image."""
    verdicts: tuple[Verdict, ...] = ()

    @property
    def holds(self) -> NDArray[np.bool_]:
        """Whether each image shows what its prompt asks for."""
        return np.array([verdict.holds for verdict in self.verdicts], bool)


def usual_sampling(seed: int, **changes: Any) -> Sampling:
    """How the embedded checkpoint is meant to be sampled."""
    usual = {"num_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE, "eta": ETA}
    return Sampling(seed, **{**usual, **changes})


def held_out_prompts(count: int, seed: int) -> dict[str, list[Prompt]]:
    """Prompts that fine-tuning never sees, an equal share of each kind, for `evaluate`.

    Args:
        count: How many of each split; a multiple of 4 is balanced.
    """
    return {split: sample_prompts(split, count, seed) for split in HELD_OUT}


def evaluate(
    model: DiffusionModel,
    prompts_by_domain: Mapping[str, Sequence[Prompt]],
    sampling: Sampling,
    *,
    batch_size: int = 64,
    progress: str | None = None,
) -> ShapesEvaluation:
    """Draw images of the prompts and judge each.

    Args:
        prompts_by_domain: Prompts, by the name under which their accuracy is reported.
        sampling: How to draw; the same sampling makes two models comparable.
    """
    texts = [prompt.text for prompts in prompts_by_domain.values() for prompt in prompts]
    if not texts:
        raise InputError(
            f"prompts_by_domain has no prompts (domains: {', '.join(prompts_by_domain) or 'none'}), but an accuracy "
            "needs at least one image; take some from held_out_prompts(count, seed)"
        )
    images = sampling.draw(model, texts, batch_size=batch_size, progress=progress)
    return judge_images(to_pixels(images), prompts_by_domain, sampling)


def judge_images(
    images: NDArray[np.uint8], prompts_by_domain: Mapping[str, Sequence[Prompt]], sampling: Sampling
) -> ShapesEvaluation:
    """Judge images that are there already, in the order in which `evaluate` draws them.

    Args:
        images: [images, 64, 64, 3], those of one prompt beside each other.
    """
    size = sampling.images_per_prompt
    prompts = [prompt for some in prompts_by_domain.values() for prompt in some for _ in range(size)]
    if len(images) != len(prompts):
        raise InputError(
            f"got {len(images)} images for {len(prompts) // size} prompts with {size} images each, which "
            f"makes {len(prompts)}; give the images of exactly these prompts, in their order"
        )
    verdicts = tuple(verify(image, prompt) for image, prompt in zip(images, prompts, strict=True))
    scores = np.array([verdict.score for verdict in verdicts], np.float64)
    texts = {domain: [prompt.text for prompt in some] for domain, some in prompts_by_domain.items()}
    return ShapesEvaluation(*columns_of(texts, size), scores, sampling, images, "shapes", tuple(prompts), verdicts)


def verified(judged: Judged) -> ShapesEvaluation:
    """The same images with the verifier's verdict on each; of evaluated ones, themselves."""
    if isinstance(judged, ShapesEvaluation):
        return judged
    prompts = tuple(parse_prompt(text) for text in judged.texts)
    verdicts = tuple(verify(image, prompt) for image, prompt in zip(judged.images, prompts, strict=True))
    return ShapesEvaluation(
        judged.texts, judged.domains, judged.scores, judged.sampling, judged.images, judged.told_by, prompts, verdicts
    )


def evaluate_shapes(
    *, lora: Path | None = None, images: int = 400, seed: int = 0, progress: bool = True
) -> Measurement[ShapesEvaluation]:
    """Measure the embedded checkpoint on held-out prompts, and a LoRA of it on the same prompts and seeds.

    Args:
        lora: Folder or file of a LoRA; None for the base alone.
        images: How many of each split, one for each prompt drawn.
    """
    model = Checkpoint.load("shapes", device=device_named("auto"))
    prompts, sampling = held_out_prompts(images, seed), usual_sampling(seed)

    def judge(model: Checkpoint, name: str) -> ShapesEvaluation:
        return evaluate(model, prompts, sampling, progress=name if progress else None)

    return measure(model, judge, lora=lora)


def accuracies(evaluation: ShapesEvaluation) -> dict[str, list[Accuracy]]:
    """For each domain: all prompts together, then by kind."""
    table: dict[str, list[Accuracy]] = {}
    for domain in dict.fromkeys(evaluation.domains):
        order = _by_kind(evaluation, domain)
        holds, kinds, texts = _columns(evaluation, order)
        total = Accuracy("all", len(holds), len(set(texts)), accuracy(holds, groups=texts))
        table[domain] = [total, *accuracy_by(holds, kinds, groups=texts)]
    return table


def comparisons(
    before: ShapesEvaluation, after: ShapesEvaluation, *, seed: int = 0
) -> dict[str, list[PairedComparison]]:
    """For each domain: the gain over all prompts together, then by kind.

    Args:
        after: Of the second, on the same prompts with the same sampling.
    """
    check_comparable(before, after)
    table: dict[str, list[PairedComparison]] = {}
    for domain in dict.fromkeys(before.domains):
        order = _by_kind(before, domain)
        holds, kinds, texts = _columns(before, order)
        holds_after = after.holds[order]
        total = compare("all", holds, holds_after, groups=texts, seed=seed)
        table[domain] = [total, *compare_by(holds, holds_after, kinds, groups=texts, seed=seed)]
    return table


def readable(domain: str) -> str:
    """The name of a domain as people write it: "out_of_domain" is "out-of-domain"."""
    return domain.replace("_", "-")


def _by_kind(evaluation: ShapesEvaluation, domain: str) -> list[int]:
    """Images of one domain, sorted by kind, so that tables list the kinds in their usual order."""
    ranks: dict[PromptKind, int] = {kind: rank for rank, kind in enumerate(KINDS)}
    return sorted(evaluation.where(domain).tolist(), key=lambda index: ranks[evaluation.prompts[index].kind])


def _columns(evaluation: ShapesEvaluation, order: Sequence[int]) -> tuple[NDArray[np.bool_], list[str], list[str]]:
    prompts = [evaluation.prompts[index] for index in order]
    return evaluation.holds[order], [prompt.kind for prompt in prompts], [prompt.text for prompt in prompts]


def format_accuracies(measured: Measurement[ShapesEvaluation], *, seed: int = 0) -> str:
    """What was measured, for the terminal; an asterisk marks a gain or loss that is clear of zero."""
    if measured.aligned is None:
        return _format_one(measured.base)
    return _format_two(comparisons(measured.base, measured.aligned, seed=seed))


def _format_one(evaluation: ShapesEvaluation) -> str:
    lines = [f"{'':<16}{'images':>7}{'prompts':>9}   verified accuracy [95 % interval]"]
    for domain, rows in accuracies(evaluation).items():
        lines += ["", readable(domain)]
        lines += [
            f"  {row.name:<14}{row.num_images:>7}{row.num_prompts:>9}   {format_share(row.share)}" for row in rows
        ]
    return "\n".join(lines)


def _format_two(table: Mapping[str, Sequence[PairedComparison]]) -> str:
    lines = [f"{'':<16}{'images':>7}{'prompts':>9}   {'base':<22}{'aligned':<22}gain [95 % interval]"]
    for domain, rows in table.items():
        lines += ["", readable(domain)]
        for row in rows:
            mark = " *" if row.gain.is_above_zero or row.gain.is_below_zero else ""
            shares = f"{format_share(row.before):<22}{format_share(row.after):<22}"
            counts = f"{row.num_images:>7}{row.num_prompts:>9}"
            lines.append(f"  {row.name:<14}{counts}   {shares}{format_gain(row.gain)}{mark}")
    return "\n".join([*lines, "", "* clear of zero"])
