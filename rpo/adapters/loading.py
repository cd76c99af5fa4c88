"""The checkpoint that a run's settings name, on this process's device, with the LoRA that it starts from."""

import torch
from tqdm.auto import tqdm

from rpo.adapters.lora import load_lora
from rpo.devices import device_named, slow_type_note
from rpo.models.checkpoint import Checkpoint
from rpo.models.config import HALF_TYPES, MixedPrecision, ModelConfig
from rpo.models.distilled import ASSISTANT


def load_model(config: ModelConfig, *, mixed_precision: MixedPrecision = "no") -> Checkpoint:
    """Load what a configuration names; float32 weights may compute in a half type."""
    device = device_named(config.device)
    computing = HALF_TYPES.get(mixed_precision, config.dtype) if config.dtype == "float32" else config.dtype
    if note := slow_type_note(device, getattr(torch, computing)):
        tqdm.write(note)
    model = Checkpoint.load(
        config.source,
        device=device,
        dtype=getattr(torch, config.dtype),
        compute_dtype=getattr(torch, computing),
        config=config.single_file_config,
        revision=config.revision,
        variant=config.variant,
        attention=config.attention,
        frozen_base=config.frozen_base,
        compile_denoiser=config.compile,
        allow_distilled=config.allow_distilled or config.assistant is not None,
    )
    if config.assistant is not None:
        load_lora(model, config.assistant, name=ASSISTANT)
    if config.lora is not None:
        load_lora(model, config.lora)
    return model
