"""How good a shapes model is: accuracy by kind of prompt, in and out of domain, and what a LoRA changes.

Two models are compared on the same prompts and seeds, image by image; `rpo.evaluation.comparison` has the statistics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rpo.adapters.lora import adapter_layers
from rpo.adapters.lora_file import inspect_lora
from rpo.devices import device_named
from rpo.errors import InputError
from rpo.evaluation.comparison import Comparison, format_gain, format_share
from rpo.models.base import DiffusionModel
from rpo.models.checkpoint import Checkpoint
from rpo.sampling.sample import generate
from rpo.shapes.evaluation import (
    Sampling,
    ShapesEvaluation,
    accuracies,
    comparisons,
    judge_images,
    readable,
    to_pixels,
)
from rpo.shapes.prompts import Prompt, Split, sample_prompts

__all__ = [
    "HELD_OUT",
    "Measurement",
    "Sampling",
    "ShapesEvaluation",
    "accuracies",
    "comparisons",
    "evaluate",
    "evaluate_shapes",
    "format_accuracies",
    "held_out_prompts",
    "judge_images",
    "measure",
]

HELD_OUT: tuple[Split, ...] = ("in_domain", "out_of_domain")
"""The splits that fine-tuning never sees."""


@dataclass(frozen=True)
class Measurement:
    """The embedded checkpoint, and the same with a LoRA if one was given, on the same prompts and seeds."""

    base: ShapesEvaluation
    aligned: ShapesEvaluation | None = None


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
    prompts = [prompt for some in prompts_by_domain.values() for prompt in some]
    if not prompts:
        raise InputError(
            f"prompts_by_domain has no prompts (domains: {', '.join(prompts_by_domain) or 'none'}), but an accuracy "
            "needs at least one image; take some from held_out_prompts(count, seed)"
        )
    images = generate(
        model,
        [prompt.text for prompt in prompts],
        seed=sampling.seed,
        images_per_prompt=sampling.images_per_prompt,
        num_steps=sampling.num_steps,
        guidance_scale=sampling.guidance_scale,
        eta=sampling.eta,
        solver=sampling.solver,
        spacing=sampling.spacing,
        batch_size=batch_size,
        progress=progress,
    )
    return judge_images(to_pixels(images), prompts_by_domain, sampling)


def evaluate_shapes(
    *, lora: Path | None = None, images: int = 400, seed: int = 0, progress: bool = True
) -> Measurement:
    """Measure the embedded checkpoint on held-out prompts, and a LoRA of it on the same prompts and seeds.

    Args:
        lora: Folder or file of a LoRA; None for the base alone.
        images: How many of each split, one for each prompt drawn.
    """
    model = Checkpoint.load("shapes", device=device_named("auto"))
    return measure(model, held_out_prompts(images, seed), Sampling(seed), lora=lora, progress=progress)


def measure(
    model: Checkpoint,
    prompts_by_domain: Mapping[str, Sequence[Prompt]],
    sampling: Sampling,
    *,
    lora: Path | None = None,
    progress: bool = True,
) -> Measurement:
    """Evaluate a checkpoint and, if a LoRA is given, the checkpoint with it on the same prompts and seeds.

    Args:
        model: A checkpoint without an adapter; it has none afterwards either.
        prompts_by_domain: Prompts, by the name under which their accuracy is reported.
    """
    aligned = None
    if lora is not None:  # before the base, so that a file that does not fit is told at once
        load_lora(model, lora)
        aligned = evaluate(model, prompts_by_domain, sampling, progress="aligned" if progress else None)
        model.pipe.unload_lora_weights()
    base = evaluate(model, prompts_by_domain, sampling, progress="base" if progress else None)
    return Measurement(base, aligned)


def load_lora(model: Checkpoint, path: str | Path) -> None:
    """Load a LoRA into a checkpoint's pipeline, at full strength."""
    found = inspect_lora(path)
    try:
        model.pipe.load_lora_weights(str(found.path.parent), weight_name=found.path.name)
        used = len(adapter_layers(model.denoiser)) + sum(
            len(adapter_layers(encoder)) for encoder in model.text_encoders.values()
        )
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        used = 0
    if used != found.num_layers:
        model.pipe.unload_lora_weights()
        raise InputError(
            f"{found.path} adapts {found.num_layers} layers of {' and '.join(found.parts)}, of which this checkpoint "
            f"has {used} in that size; expected a LoRA trained on it: give another file, or the checkpoint that it "
            "belongs to"
        )


def format_accuracies(measured: Measurement, *, seed: int = 0) -> str:
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


def _format_two(table: Mapping[str, Sequence[Comparison]]) -> str:
    lines = [f"{'':<16}{'images':>7}{'prompts':>9}   {'base':<22}{'aligned':<22}gain [95 % interval]"]
    for domain, rows in table.items():
        lines += ["", readable(domain)]
        for row in rows:
            mark = " *" if row.gain.is_above_zero or row.gain.is_below_zero else ""
            shares = f"{format_share(row.before):<22}{format_share(row.after):<22}"
            counts = f"{row.num_images:>7}{row.num_prompts:>9}"
            lines.append(f"  {row.name:<14}{counts}   {shares}{format_gain(row.gain)}{mark}")
    return "\n".join([*lines, "", "* clear of zero"])
