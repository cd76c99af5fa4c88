"""A LoRA from its file onto a checkpoint, refused unless every layer of it is used."""

from pathlib import Path

from rpo.adapters.lora import adapter_layers
from rpo.adapters.lora_file import inspect_lora
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint


def load_lora(model: Checkpoint, path: str | Path) -> None:
    """Load a LoRA into a checkpoint's pipeline, at full strength."""
    found = inspect_lora(path)
    try:
        model.pipe.load_lora_weights(str(found.path.parent), weight_name=found.path.name)
        used = sum(len(adapter_layers(network)) for network in (model.denoiser, *model.text_encoders.values()))
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        used = 0
    if used != found.num_layers:
        model.pipe.unload_lora_weights()
        raise InputError(
            f"{found.path} adapts {found.num_layers} layers of {' and '.join(found.parts)}, of which this checkpoint "
            f"has {used} in that size; expected a LoRA trained on it: give another file, or the checkpoint that it "
            "belongs to"
        )
