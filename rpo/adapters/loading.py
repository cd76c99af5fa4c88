"""The checkpoint that a run's settings name, on this process's device, with the LoRA that it starts from."""

import torch
from tqdm.auto import tqdm

from rpo.adapters.lora import load_lora
from rpo.devices import device_named, slow_type_note
from rpo.models.checkpoint import Checkpoint
from rpo.models.config import ModelConfig
from rpo.models.distilled import ASSISTANT


def load_model(config: ModelConfig) -> Checkpoint:
    """Load what a configuration names."""
    device = device_named(config.device)
    if note := slow_type_note(device, getattr(torch, config.compute_dtype or config.dtype)):
        tqdm.write(note)
    model = Checkpoint.load(
        config.source,
        device=device,
        dtype=getattr(torch, config.dtype),
        compute_dtype=getattr(torch, config.compute_dtype) if config.compute_dtype else None,
        config=config.single_file_config,
        revision=config.revision,
        variant=config.variant,
        attention=config.attention,
        channels_last=config.channels_last,
        compile_denoiser=config.compile,
        allow_distilled=config.allow_distilled or config.assistant is not None,
    )
    if config.assistant is not None:
        load_lora(model, config.assistant, name=ASSISTANT)
    if config.lora is not None:
        load_lora(model, config.lora)
    return model
