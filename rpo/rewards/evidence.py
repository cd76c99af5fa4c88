"""Keep what a reward stumbled over: the images as PNG and, in `fault.json`, their prompts and what was wrong."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from rpo.data.preference import encode_png
from rpo.text import write_text
from rpo.types import Images

MAX_IMAGES = 8
"""Images kept of one fault; a reward that fails on a whole batch fails alike on all of it."""


def save_evidence(
    parent: Path, images: Images, prompts: Sequence[str], *, name: str, indices: Sequence[int], problem: str
) -> Path:
    """Write the images at fault and their prompts into a new folder.

    Args:
        parent: Where the folder is made; created if it is not there.
        images: The whole batch; values beyond [0, 1] are cut off in the pictures.
        indices: Which images are at fault; the first `MAX_IMAGES` are kept.

    Returns:
        The new folder: one for every fault, so that an earlier one is never overwritten.
    """
    folder = _new_folder(parent, re.sub(r"[^\w.-]+", "_", name).strip(".") or "reward")
    kept: list[dict[str, int | str]] = []
    for index in indices[:MAX_IMAGES]:
        file = f"image_{index:03d}.png"
        pixels = images[index].detach().float().nan_to_num(0).clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
        (folder / file).write_bytes(encode_png(pixels.permute(1, 2, 0).numpy()))
        kept.append({"index": index, "prompt": prompts[index], "file": file})
    record = {"reward": name, "problem": problem, "images_at_fault": len(indices), "images": kept}
    write_text(folder / "fault.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return folder


def _new_folder(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{name}-{number}"
        try:
            folder.mkdir()  # several processes may fail at once; only one of them makes this folder
        except FileExistsError:
            number += 1
        else:
            return folder
