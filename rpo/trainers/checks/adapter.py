"""Whether an adapter does anything to an image, and its file does the same.

It is perturbed, a small image is drawn in a few steps with and without it, the file is written, loaded into a fresh
pipeline, and the image drawn again.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from rpo.adapters.lora import load_lora
from rpo.models.checkpoint import Checkpoint
from rpo.models.plain import fresh_pipeline, probe_side
from rpo.models.usual import usual_guidance
from rpo.sampling.sample import generate
from rpo.trainers.checks.preflight import Check, perturbed
from rpo.trainers.policy import LoraPolicy
from rpo.trainers.trainer import Run
from rpo.types import Canvas, Images

STEPS = 4

PART_OF_EFFECT = 0.05
"""How far the image of the file may be off, of what the adapter changes in it; another strength is off by more."""


def adapter_checks(run: Run, model: Checkpoint, prompt: str, folder: Path) -> Iterator[Check]:
    """Of a perturbed adapter, which is afterwards what it was; its file goes into a folder."""
    policy = run.policy
    with perturbed(policy.parameters, seed=run.config.seed), policy.deployed():
        live = _drawn(model, prompt)
        with policy.reference():
            base = _drawn(model, prompt)
        effect = (live - base).abs().max().item()
        yield Check(
            "adapter moves the image" if isinstance(policy, LoraPolicy) else "weights move the image",
            effect > 0,
            f"by up to {effect:.2g} of the range, perturbed and at strength 1",
            "the sampler does not see what is trained: adapter.target_modules names layers that the image does not "
            "depend on, or the adapter is switched off",
        )
        if not isinstance(policy, LoraPolicy):
            return
        file = policy.save(folder)
        fresh = fresh_pipeline(model.pipe, model.family, without_adapters=True)
        other = Checkpoint(fresh, compute_dtype=model.compute_dtype, allow_distilled=True)
        load_lora(other, file)
        error = (_drawn(other, prompt) - live).abs().max().item()
        yield Check(
            "adapter file draws the same",
            error <= PART_OF_EFFECT * effect,
            f"off by {error:.2g}, where the adapter's effect is {effect:.2g}",
            "the file has another strength than the adapter in memory: leave adapter.alpha out, so that it is the rank",
        )


def _drawn(model: Checkpoint, prompt: str) -> Images:
    side = probe_side(model.pipe, model.family) * model.family.cell(model.pipe)
    return drawn(model, prompt, STEPS, canvas=Canvas(side, side), guidance_scale=usual_guidance(model))


def drawn(model: Checkpoint, prompt: str, num_steps: int, *, canvas: Canvas, guidance_scale: float = 1.0) -> Images:
    """One image; an editor's is an edit of grey."""
    grey = torch.full((1, 3, *canvas), 0.5) if model.family.edits == "always" else None
    drawing = {"num_steps": num_steps, "guidance_scale": guidance_scale, "canvas": canvas}
    return generate(model, [prompt], seed=0, originals=grey, **drawing)
