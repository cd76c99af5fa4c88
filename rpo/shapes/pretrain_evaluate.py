"""How good a shapes checkpoint is: accuracy by kind of prompt, and what its autoencoder loses.

Everything goes through stock diffusers and the folder on disk, so the numbers are those that a user gets.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor

from rpo.shapes import ETA, GUIDANCE_SCALE, NUM_STEPS
from rpo.shapes.pretrain_loop import seed_of
from rpo.shapes.pretrain_vae import psnr, round_trip
from rpo.shapes.prompts import KINDS, Prompt, Split, sample_prompts
from rpo.shapes.verifier import verify_all

SPLITS: tuple[Split, ...] = ("train", "in_domain", "out_of_domain")


@dataclass(frozen=True)
class HeldOut:
    """Scenes that no training saw: uint8 `[count, 3, 64, 64]`, and what they show."""

    images: Tensor
    captions: list[str]


def evaluate(
    folder: Path, *, images_per_split: int, device: torch.device, seed: int, held_out: HeldOut
) -> dict[str, Any]:
    """Measure the checkpoint in `folder`.

    Args:
        images_per_split: Images sampled for each split, an equal share for each kind of prompt.

    Returns:
        What `table` shows, as plain numbers that JSON can hold.
    """
    pipe = StableDiffusionPipeline.from_pretrained(str(folder)).to(device)
    pipe.set_progress_bar_config(disable=True)
    accuracy = {}
    for split in SPLITS:
        prompts = sample_prompts(split, images_per_split, seed)
        images = sample_images(pipe, [prompt.text for prompt in prompts], seed=seed)
        accuracy[split] = accuracy_by_kind(images, prompts)
    return {
        "images_per_split": images_per_split,
        "num_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "eta": ETA,
        "accuracy": accuracy,
        "vae": vae_quality(pipe, held_out),
    }


def sample_images(pipe: StableDiffusionPipeline, prompts: list[str], *, seed: int, batch_size: int = 64) -> Tensor:
    """One image per prompt, `[count, 3, 64, 64]` in [0, 1], each from a generator of its own."""
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed_of(seed, start + index)) for index in range(len(batch))]
        output = pipe(
            batch,
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            eta=ETA,
            generator=generators,
            output_type="pt",
        )
        images.append(output.images.float().cpu())
    return torch.cat(images)


def accuracy_by_kind(images: Tensor, prompts: list[Prompt]) -> dict[str, float]:
    """Share of images whose prompt holds: for each kind that occurs, and for all together."""
    verdicts = verify_all(images, prompts)
    total, right = Counter(prompt.kind for prompt in prompts), Counter[str]()
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        right[prompt.kind] += verdict.holds
    by_kind: dict[str, float] = {kind: right[kind] / total[kind] for kind in KINDS if total[kind]}
    return {**by_kind, "all": right.total() / len(prompts)}


def vae_quality(pipe: StableDiffusionPipeline, held_out: HeldOut) -> dict[str, float]:
    """PSNR on held-out scenes, and the share that the verifier accepts before and after the autoencoder."""
    images = held_out.images.to(pipe.device)
    decoded = round_trip(pipe.vae, images)
    untouched = verify_all(images.cpu().float() / 255, held_out.captions)
    after = verify_all(decoded.cpu(), held_out.captions)
    return {
        "psnr_db": psnr(images, decoded),
        "verified": float(np.mean([verdict.holds for verdict in untouched])),
        "verified_after_round_trip": float(np.mean([verdict.holds for verdict in after])),
    }


def to_channels_first(images: NDArray[np.uint8]) -> Tensor:
    """Images as numpy and PIL have them, `[count, height, width, 3]`, to torch's order."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def table(evaluation: dict[str, Any]) -> str:
    """The numbers of `evaluate` for the terminal."""
    columns = (*KINDS, "all")
    lines = [f"{'verified accuracy':<18}" + "".join(f"{name:>13}" for name in columns)]
    for split, accuracy in evaluation["accuracy"].items():
        cells = (f"{100 * accuracy[name]:11.1f} %" if name in accuracy else f"{'-':>13}" for name in columns)
        lines.append(f"{split:<18}" + "".join(cells))
    vae = evaluation["vae"]
    lines.append(
        f"autoencoder: {vae['psnr_db']:.2f} dB on held-out scenes; verifier accepts {100 * vae['verified']:.2f} % of "
        f"them, {100 * vae['verified_after_round_trip']:.2f} % after the round trip"
    )
    return "\n".join(lines)
