"""The proxy reward on disk: an ordinary folder of a CLIPModel, with half-precision weights.

`CLIPModel.from_pretrained(rpo.shapes.PROXY, dtype=torch.float32)` reads it, as does whatever reads CLIP checkpoints.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from rpo.files import replace_folder
from rpo.shapes.networks import write_tokenizer
from rpo.shapes.world import IMAGE_SIZE
from rpo.text import write_text

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own."""

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": IMAGE_MEAN,
    "image_std": IMAGE_STD,
}
"""What an image goes through; bicubic is 3."""


def save_proxy(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path, words: Iterable[str]) -> None:
    """Write the proxy with half-precision weights; an existing `folder` is replaced in one move.

    Args:
        model: Its weights stay as they are; the configuration keeps saying their dtype.
        words: The words that the tokenizer knows whole, for its two classic files.
    """
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    write_tokenizer(draft, words)
    write_text(draft / "preprocessor_config.json", json.dumps(PREPROCESSOR, indent=2) + "\n")
    weights = draft / "model.safetensors"
    halved = {
        key: value.to(torch.float16) if value.is_floating_point() else value
        for key, value in load_file(weights).items()
    }
    save_file(halved, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors leaves it readable by its owner alone, which a shared installation cannot load
    replace_folder(draft, folder)
