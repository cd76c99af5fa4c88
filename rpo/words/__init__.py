"""The second embedded world: text. A prompt asks for a word, a reward that others made reads it, a judge of ours tells.

The checkpoint is an ordinary diffusers folder: `StableDiffusionPipeline.from_pretrained(rpo.words.path())`.
"""

from pathlib import Path

from rpo.errors import InputError

NUM_STEPS = 10
"""DDIM steps in which the checkpoint is meant to be sampled and in which its accuracy is quoted."""

ETA = 1.0
"""Noise level of these steps: ancestral ones draw more words right than those with less noise."""

GUIDANCE_SCALE = 2.0
"""Guidance of these steps: it mends some of the mistakes that the checkpoint was taught."""


def path() -> Path:
    """Find the embedded checkpoint."""
    folder = Path(__file__).parent / "assets"
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"the words checkpoint in {folder} lacks {', '.join(missing)}, which a complete installation has; install "
            "rpo again, or train it with `python -m scripts.words.pretrain` of rpo's repository"
        )
    return folder


_FILES = (
    "model_index.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
)
