"""The same prompts from the same noise, drawn in several ways: what a LoRA does to an image, and how much.

A row is a prompt and a seed, a column a way to draw it: the base, a LoRA, a LoRA at half its strength. Image k of a
prompt is `generate(model, [prompt], seed=seed + k)`, whatever is drawn beside it. How far a column is from another is
the mean absolute difference of its images, as pixels in [0, 1] and as scaled latents.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from rpo.adapters.lora import adapter_layers
from rpo.adapters.strength import at_strength
from rpo.data.pixels import to_pixels
from rpo.models.checkpoint import Checkpoint
from rpo.rewards import Reward, score
from rpo.sampling.sample import image_generator, images_at_once, sample, solving
from rpo.types import Canvas, Conditioning, Images, Latents


@dataclass(frozen=True)
class Row:
    """What is drawn."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Column:
    """How it is drawn."""

    label: str
    strengths: Mapping[str, float] = field(default_factory=dict)
    """Of every adapter that the checkpoint carries, by name; see `rpo.adapters.strength`."""


@dataclass(frozen=True)
class Drawn:
    """One image."""

    row: int
    column: int
    pixels: NDArray[np.uint8]
    """[height, width, 3]"""
    rewards: Mapping[str, float]
    pixel_distance: float | None = None
    """From the same image of the column that distances are measured from; nothing where there is none."""
    latent_distance: float | None = None


def draw_side_by_side(
    model: Checkpoint,
    rows: Sequence[Row],
    columns: Sequence[Column],
    *,
    num_steps: int,
    guidance_scale: float,
    canvas: Canvas | None = None,
    measured_from: Column | None = None,
    rewards: Mapping[str, Reward] | None = None,
    batch_size: int | None = None,
    progress: str | None = None,
) -> Iterator[Drawn]:
    """Draw every row in every column, by deterministic DDIM (of a flow, Euler) steps.

    Args:
        model: With the adapters that the columns name.
        num_steps: Denoising steps.
        guidance_scale: 1 is no guidance.
        measured_from: What distances are from; drawn too if it is none of the columns.
        rewards: What scores the images, by name.
        batch_size: Images at once, by default as `images_at_once` has it; changes no image (but for float error).
        progress: Label of a progress bar; None for none.

    Yields:
        Images as they are ready: of a batch of rows, column by column.
    """
    size = batch_size or images_at_once(canvas or model.canvas)
    is_extra = measured_from is not None and all(one.strengths != measured_from.strengths for one in columns)
    total, is_quiet = len(rows) * (len(columns) + is_extra), progress is None
    bar = tqdm(total=total, desc=progress, unit="image", disable=is_quiet, dynamic_ncols=True)

    reads_alike = not any(adapter_layers(network) for network in model.text_encoders.values())

    def drawn(some: Sequence[Row], column: Column, read: Conditioning | None) -> tuple[Latents, Images]:
        with at_strength(model, column.strengths):
            grid, kernel = solving(model, num_steps, solver="ddim", eta=0.0, canvas=canvas)
            trajectory = sample(
                model,
                read or model.encode_prompts([row.prompt for row in some]),
                grid,
                kernel,
                guidance_scale=guidance_scale,
                generators=[image_generator(row.seed, 0, 0) for row in some],
                canvas=canvas,
            )
            images = model.decode(trajectory.x_0)
        bar.update(len(some))
        return trajectory.x_0, images

    with bar:
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            # Once for all columns, unless a LoRA of a text encoder has each read its own.
            read = model.encode_prompts([row.prompt for row in some]) if reads_alike else None
            origin = drawn(some, measured_from, read) if measured_from else None
            for number, column in enumerate(columns):
                is_origin = measured_from is not None and column.strengths == measured_from.strengths
                images = origin if origin and is_origin else drawn(some, column, read)
                yield from _cells((start, number), some, images, origin, rewards or {})


def _cells(
    place: tuple[int, int],
    rows: Sequence[Row],
    drawn: tuple[Latents, Images],
    origin: tuple[Latents, Images] | None,
    rewards: Mapping[str, Reward],
) -> list[Drawn]:
    """What there is to say of a batch of images, whose first one has that row and column."""
    (start, column), (latents, images), prompts = place, drawn, [row.prompt for row in rows]
    scored = {name: score(one, images, prompts, name=name).tolist() for name, one in rewards.items()}
    pixels, nothing = to_pixels(images), [None] * len(rows)
    of_pixels, of_latents = nothing, nothing
    if origin:
        apart = np.abs(pixels.astype(np.int16) - to_pixels(origin[1])) / 255
        of_pixels = apart.mean((1, 2, 3)).tolist()
        of_latents = (latents - origin[0]).abs().mean((1, 2, 3)).tolist()
    return [
        Drawn(start + one, column, pixels[one], {name: of[one] for name, of in scored.items()}, *distances)
        for one, distances in enumerate(zip(of_pixels, of_latents, strict=True))
    ]
