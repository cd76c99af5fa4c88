"""The seam between algorithms and checkpoints: everything rpo needs from a model, and guidance.

A trainer or sampler sees a `DiffusionModel` and nothing below it; a new model family is one more file beside this one.
Classifier-free guidance (Ho & Salimans, arXiv:2207.12598) is a formula over two predictions and lives here, once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rpo.process.schedule import Process
from rpo.types import Conditioning, Grid, Images, Latents, Node, PredictionType


class DiffusionModel(Protocol):
    """A text-to-image diffusion checkpoint, as the rest of rpo sees it."""

    denoiser: nn.Module
    """The trainable network."""

    prediction_type: PredictionType
    num_train_timesteps: int

    @property
    def process(self) -> Process:
        """The noise schedule in continuous time, of which every grid is a sample."""
        ...

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Configuration of the checkpoint's diffusers scheduler, from which another one can be made."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent at the checkpoint's native resolution."""
        ...

    @property
    def image_size(self) -> int:
        """Side of a native image in pixels."""
        ...

    def grid(self, num_steps: int) -> Grid:
        """The nodes of a sampler of `num_steps` steps, spaced as the checkpoint's own scheduler says."""
        ...

    def node(self, timestep: Tensor) -> Node:
        """Schedule values at one training timestep per sample, shaped to broadcast over latents."""
        ...

    def encode_prompts(self, prompts: Sequence[str], *, negative_prompt: str = "") -> Conditioning:
        """Conditioning of each prompt; a repeated prompt is encoded once."""
        ...

    def predict(self, x_t: Latents, timestep: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Latents:
        """Raw network output (`noise_pred`) in float32; `guidance_scale` 1 means none."""
        ...

    def encode_moments(self, images: Images) -> tuple[Latents, Latents]:
        """Mean and standard deviation of the scaled latents' posterior, float32."""
        ...

    def decode(self, latents: Latents) -> Images:
        """Images of scaled latents."""
        ...


def guided(negative_pred: Latents, prompt_pred: Latents, guidance_scale: float) -> Latents:
    """Classifier-free guidance: away from the negative prediction, past the prompt's (arXiv:2207.12598, eq. 6)."""
    return negative_pred + guidance_scale * (prompt_pred - negative_pred)
