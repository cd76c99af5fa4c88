"""How a denoiser is executed: attention kernels, memory format, compilation. None of it changes what is computed."""

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.attention_processor import XFormersAttnProcessor
from torch import Tensor

from rpo.models.base import ORIGINAL, Family
from rpo.models.config import Attention
from rpo.models.frozen import device_of, dtype_of
from rpo.types import Embedding, Images, Latents, Output


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, matrix products and convolutions are of this type; of float32 nothing is changed."""
    is_mixed = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if is_mixed else None, enabled=is_mixed)


def embedded(
    family: Family, pipe: Any, prompts: list[str], device: torch.device, originals: Images | None = None
) -> Embedding:
    """What a denoiser is told of prompts, and of the images that they edit, on the autoencoder's device."""
    if originals is None:
        return family.embed(pipe, prompts, device)
    shown = family.shown(pipe, family.encode(pipe, originals)[0])
    return {**family.embed_with(pipe, prompts, originals, device), ORIGINAL: shown}


def call(
    family: Family,
    pipe: Any,
    network: Any,
    x_t: Latents,
    timestep: Tensor,
    embedding: Embedding,
    *,
    compute_dtype: torch.dtype,
    guidance_scale: float = 1.0,
) -> Output:
    """One call of a denoiser of the pipeline, in float32 again; the scale is told to one that is guided by it."""
    dtype, device = dtype_of(network), device_of(network)
    told = {name: one.to(dtype) if one.is_floating_point() else one for name, one in embedding.items()}
    if family.guidance == "embedded":
        told["guidance"] = torch.full((len(x_t),), guidance_scale, dtype=dtype, device=device)
    with computing_in(compute_dtype, device):
        x_t = x_t.to(device, dtype if family.narrows_states else None)
        return family.forward(pipe, network, x_t, timestep.to(device), told).float()


def prepare_denoiser(
    denoiser: Any,
    *,
    compute_dtype: torch.dtype,
    attention: Attention = "sdpa",
    compile_denoiser: bool = False,
) -> None:
    """Set up how `denoiser` runs, in place; convolutions on CUDA get the memory format that they are fastest in.

    Args:
        compute_dtype: What it computes in. xformers is probed in this type: newer GPUs have no kernel for float32.
        compile_denoiser: Compile it on first use: its repeated blocks, where its class names them, or else its whole
            forward, which takes far longer. In place, so that parameters keep their names.
    """
    if attention == "xformers":
        fault = xformers_fault(denoiser.device, compute_dtype)
        if fault is None:
            denoiser.set_attn_processor(XFormersAttnProcessor())
        else:
            warnings.warn(f"xformers was asked for but does not run here ({fault}); using torch's SDPA", stacklevel=2)
    if denoiser.device.type == "cuda" and denoiser.config.get("block_out_channels"):
        denoiser.to(memory_format=torch.channels_last)
    if compile_denoiser and denoiser._repeated_blocks:
        denoiser.compile_repeated_blocks()
    elif compile_denoiser:
        denoiser.compile()


def xformers_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why xformers' attention cannot run on this device in this type; None when it can.

    A wheel may install and import without kernels for the GPU or the CUDA at hand, so only a trial call tells.
    """
    try:
        import xformers.ops  # noqa: PLC0415
    except (ImportError, OSError) as error:
        return f"{error}; pip install 'rpo[xformers]'"
    trial = torch.zeros(1, 2, 1, 40, device=device, dtype=dtype)
    try:
        xformers.ops.memory_efficient_attention(trial, trial, trial)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
