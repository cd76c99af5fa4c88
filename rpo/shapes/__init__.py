"""The embedded default: a small world of flat shapes, its ground-truth verifier, and a checkpoint trained on it.

The checkpoint is an ordinary diffusers folder: `StableDiffusionPipeline.from_pretrained(rpo.shapes.path())`.
"""

from pathlib import Path

from rpo.errors import InputError

NUM_STEPS = 20
"""DDIM steps in which the checkpoint is meant to be sampled and in which its accuracy is quoted."""

ETA = 1.0
"""Noise level of these steps: ancestral ones draw far more images right than deterministic ones do."""

GUIDANCE_SCALE = 2.0
"""Guidance of these steps: better than 1, 3 or 5 on the whole."""

PROXY = Path(__file__).parent / "assets" / "proxy"
"""The embedded proxy reward: the folder of a small CLIPModel, which the reward "shapes-clip" reads."""

POTENTIAL = Path(__file__).parent / "assets" / "potential"
"""The embedded judge of images on their way: the heads that the reward "shapes-potential" reads."""

TOKENS = Path(__file__).parent / "assets" / "tokens"
"""The folder of the embedded masked-token generator; `tokens_path` gives it after a look at its files."""

TOKENS_NUM_STEPS = 20
"""Steps in which the token generator is meant to unmask a grid, and at which its accuracy is quoted."""

TOKENS_GUIDANCE_SCALE = 2.0
"""Guidance, in logits, of these steps."""

EDIT_GUIDANCE_SCALE = 3.0
EDIT_IMAGE_GUIDANCE_SCALE = 2.5
"""Guidance by instruction and by source at which the editor is meant to be sampled and its accuracy is quoted."""

EDIT_NUM_STEPS = 20
"""DDIM steps of an edit, at which the editor's accuracy is quoted."""

EDIT_SOLVER_STEPS = 8
"""Steps of DPM-Solver++ that edit as well."""

_FILES = (
    "model_index.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
)

_TOKENS_FILES = (
    "model_index.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vqvae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
)


def path() -> Path:
    """Find the embedded checkpoint."""
    folder = Path(__file__).parent / "assets"
    _check(folder, "checkpoint", "pretrain")
    return folder


def editor_path() -> Path:
    """Find the embedded editor: `StableDiffusionInstructPix2PixPipeline.from_pretrained(rpo.shapes.editor_path())`."""
    folder = Path(__file__).parent / "assets" / "editor"
    _check(folder, "editor", "pretrain_editor")
    return folder


def tokens_path() -> Path:
    """Find the embedded masked-token generator: `AmusedPipeline.from_pretrained(rpo.shapes.tokens_path())`."""
    _check(TOKENS, "token generator", "pretrain_tokens", _TOKENS_FILES)
    return TOKENS


def _check(folder: Path, what: str, script: str, files: tuple[str, ...] = _FILES) -> None:
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"the shapes {what} in {folder} lacks {', '.join(missing)}, which a complete installation has; install "
            f"rpo again, or train it with `python -m scripts.shapes.{script}` of rpo's repository"
        )
