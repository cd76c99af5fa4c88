"""How good the shapes editor is: the share of instructions carried out with an otherwise unchanged scene, by task.

Everything goes through stock diffusers and images of 8 bits, so the numbers are those that a user gets.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from rpo.shapes import EDIT_GUIDANCE_SCALE, EDIT_IMAGE_GUIDANCE_SCALE, EDIT_NUM_STEPS
from rpo.shapes.edit_world import EDIT_TASKS, EditTriple, carries_out, triples
from rpo.shapes.pretrain_loop import seed_of
from rpo.shapes.world import render


@dataclass(frozen=True)
class EditSampling:
    """How edits are sampled."""

    num_steps: int = EDIT_NUM_STEPS
    guidance_scale: float = EDIT_GUIDANCE_SCALE
    image_guidance_scale: float = EDIT_IMAGE_GUIDANCE_SCALE
    batch_size: int = 32


def evaluate_editor(
    pipe: StableDiffusionInstructPix2PixPipeline, *, cases: int, seed: int, sampling: EditSampling
) -> dict[str, Any]:
    """Measure the editor on scenes that no training saw.

    Args:
        cases: How many edits with sentences that training knows, and as many with held-out ones.

    Returns:
        Shares for each of the two kinds of sentences: by task, and "all".
    """
    result: dict[str, Any] = {"cases": cases, **vars(sampling)}
    for name, is_held_out_only in (("known_sentences", False), ("held_out_sentences", True)):
        drawn = list(islice(triples(seed_of(seed, 7), is_held_out_only=is_held_out_only), cases))
        result[name] = _by_task(drawn, edit_images(pipe, drawn, seed=seed, sampling=sampling))
    return result


def edit_images(
    pipe: StableDiffusionInstructPix2PixPipeline, drawn: list[EditTriple], *, seed: int, sampling: EditSampling
) -> list[Image.Image]:
    """The editor's answer to each triple, each from a generator of its own."""
    images: list[Image.Image] = []
    for start in range(0, len(drawn), sampling.batch_size):
        batch = drawn[start : start + sampling.batch_size]
        output = pipe(
            [triple.instruction for triple in batch],
            image=[Image.fromarray(render(triple.source)) for triple in batch],
            num_inference_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            image_guidance_scale=sampling.image_guidance_scale,
            generator=[torch.Generator().manual_seed(seed_of(seed, start + index)) for index in range(len(batch))],
        )
        images += output.images
    return images


def _by_task(drawn: list[EditTriple], images: list[Image.Image]) -> dict[str, dict[str, float]]:
    total, done, unchanged, both = Counter(), Counter(), Counter(), Counter()
    for triple, image in zip(drawn, images, strict=True):
        verdict = carries_out(render(triple.source), np.asarray(image), triple.instruction)
        for name in (triple.task, "all"):
            total[name] += 1
            done[name] += verdict.is_done
            unchanged[name] += verdict.is_rest_unchanged
            both[name] += verdict.is_done and verdict.is_rest_unchanged
    return {
        name: {
            "carried_out": both[name] / total[name],
            "is_done": done[name] / total[name],
            "is_rest_unchanged": unchanged[name] / total[name],
            "cases": total[name],
        }
        for name in (*EDIT_TASKS, "all")
        if total[name]
    }


def editor_table(evaluation: dict[str, Any]) -> str:
    """The numbers of `evaluate_editor` for the terminal: carried out with the rest unchanged (done / unchanged)."""
    lines = []
    for name in ("known_sentences", "held_out_sentences"):
        cells = (
            f"{task} {100 * one['carried_out']:.0f} ({100 * one['is_done']:.0f}/{100 * one['is_rest_unchanged']:.0f})"
            for task, one in evaluation[name].items()
        )
        lines.append(f"{name}: " + "  ".join(cells))
    return "\n".join(lines)
