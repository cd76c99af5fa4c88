"""Which checkpoint a run from a file trains or draws with, and how it is loaded; see `rpo.adapters.loading`."""

from dataclasses import replace
from typing import ClassVar, Literal

from rpo.config.ranges import Text
from rpo.config.settings import settings

Attention = Literal["sdpa", "xformers"]
"""`sdpa` is torch's scaled-dot-product attention, which picks flash or memory-efficient kernels by itself."""

DType = Literal["float32", "bfloat16", "float16"]

MixedPrecision = Literal["no", "bf16", "fp16"]

HALF_TYPES: dict[str, DType] = {"bf16": "bfloat16", "fp16": "float16"}
"""What is computed in, by the kind of mixed precision."""

FrozenBase = Literal["whole", "int8", "nf4", "offload"]

Sharding = Literal["none", "full", "hybrid"]


@settings
class ModelConfig:
    """Which checkpoint is trained, and how it runs."""

    renamed: ClassVar[dict[str, str]] = {
        "compute_dtype": "what a float32 model computes in is learning.mixed_precision now",
        "channels_last": "convolutions on CUDA have that memory format now without being told",
    }

    source: Text = "shapes"
    """Folder, hub id, single .safetensors / .ckpt file, or "shapes" for the checkpoint inside the package."""
    lora: Text | None = None
    """Folder or file of a LoRA to start from, or to draw with. Training goes on beside it, and what is saved is one
    LoRA of the checkpoint that does what both do."""
    assistant: Text | None = None
    """Of a checkpoint that was distilled to a few steps: folder or file of the LoRA that undoes it. It is in use while
    training, the reference's too, and is left out of what is saved, shown and judged."""
    allow_distilled: bool = False
    """Train a checkpoint that was distilled to a few steps as it is, which undoes it in the long run."""
    dtype: DType = "float32"
    """Of all weights. bfloat16 (float16 on older GPUs) halves memory; adapters stay float32."""
    frozen_base: FrozenBase = "whole"
    """How what a LoRA leaves as it is lies in memory. int8 and nf4 quantise linear layers of the denoiser, and of text
    encoders larger than CLIP's (`pip install 'rpo[lowbit]'`; nf4 needs a GPU). offload fetches its layers from the
    CPU's memory when it computes: exact, slow, and only with `adapter.gradient_checkpointing`."""
    device: Text = "auto"
    """"auto" takes this process's GPU when there is one."""
    single_file_config: Text | None = None
    """For a single file: a diffusers folder or hub id with its architecture; nothing means
    that of its family's first release, from the hub."""
    revision: Text | None = None
    """Of a hub id."""
    variant: Text | None = None
    """File variant, such as "fp16"."""
    attention: Attention = "sdpa"
    """"sdpa" (torch's own), or "xformers", which falls back to sdpa with a warning where it does not run."""
    compile: bool = False
    """Compile the denoiser on first use, block by block where its class allows that; pays off in long runs on CUDA."""

    @property
    def deployed(self) -> "ModelConfig":
        """The same as people draw with it: without the assistant, which is for training alone."""
        return replace(self, assistant=None, allow_distilled=self.allow_distilled or self.assistant is not None)
