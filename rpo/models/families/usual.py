"""What most families have in common, so that the file of one says only what it does in its own way."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rpo.errors import InputError
from rpo.models import latents as autoencoder
from rpo.models.base import Edits, Guidance, guided
from rpo.types import Embedding, Images, Latents, Output


class UsualFamily:
    """A transformer on the latents of an `AutoencoderKL`, guided by a second call without the prompt.

    A family adds its `name`, `pipelines`, `parts`, and `schedule`, `context`, `embed` and `forward`. What its pipeline
    packs, n x n cells to a token, it packs and unpacks inside `forward`, and says n as `packs`.
    """

    denoiser = "transformer"
    autoencoder = "vae"
    narrows_states = True
    parts: Mapping[str, str]
    embed: Callable[[Any, list[str], torch.device], Embedding]
    text_encoders: tuple[str, ...] = ("text_encoder",)
    prompts_per_call = 256
    load_options: Mapping[str, Any] = {}
    single_file_key = ""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_dialect = "peft"
    lora_preparation: tuple[str, ...] = ()
    widens_autoencoder = False
    guidance: Guidance = "cfg"
    guidance_argument = "guidance_scale"
    guidance_offset = 0.0
    edits: Edits = "never"
    text_sees = False
    packs = 1

    def refuse(self, pipe: Any) -> None:
        """Refuse a network that takes more than noisy latents, such as that of an editing model."""
        taken, expected = self._config(pipe)["in_channels"], self.latent_channels(pipe) * self.packs**2
        if taken != expected:
            raise InputError(
                f"the {self.denoiser} takes {taken} channels, but a text-to-image one takes the {expected} of its "
                "autoencoder's latents; use the text-to-image checkpoint that it was made from"
            )

    def enable_lora(self, pipe: Any) -> None:
        """Nothing: the classes have loaders."""

    def distilled(self, pipe: Any) -> str:
        """Nothing: the name, the scheduler or the pipeline's configuration tell."""
        return ""

    def latent_channels(self, pipe: Any) -> int:
        """Those of the autoencoder."""
        return pipe.vae.config["latent_channels"]

    def cell(self, pipe: Any) -> int:
        """As the autoencoder shrinks images."""
        return int(pipe.vae_scale_factor)

    def patch(self, pipe: Any) -> int:
        """What is packed, times the network's own patches."""
        return self.packs * int(self._config(pipe).get("patch_size") or 1)

    def native(self, pipe: Any) -> tuple[int, int]:
        """As the network's configuration says."""
        size = self._config(pipe)["sample_size"]
        return (size, size) if isinstance(size, int) else size

    def embed_with(self, pipe: Any, prompts: list[str], originals: Images, device: torch.device) -> Embedding:
        """No family's text encoders see an image, but those that say so."""
        return self.embed(pipe, prompts, device)

    def shown(self, pipe: Any, latents: Latents) -> Latents:
        """The latents themselves."""
        return latents

    def encode(self, pipe: Any, images: Images) -> tuple[Latents, Latents]:
        """Scaled by the autoencoder's configuration."""
        return autoencoder.encode(pipe.vae, images)

    def decode(self, pipe: Any, latents: Latents) -> Images:
        """The way back."""
        return autoencoder.decode(pipe.vae, latents)

    def guided(self, negative_pred: Output, prompt_pred: Output, guidance_scale: float) -> Output:
        """Classifier-free guidance."""
        return guided(negative_pred, prompt_pred, guidance_scale)

    def _config(self, pipe: Any) -> Mapping[str, Any]:
        return pipe.components[self.denoiser].config


def where_given(prompts: Sequence[str], embedding: Embedding, negative: Embedding) -> Embedding:
    """Embeddings of which the rows of "" are others: those of a negative prompt, which gets no instruction."""
    is_given = torch.tensor([prompt != "" for prompt in prompts], device=embedding["tokens"].device)
    return {
        name: torch.where(is_given.view(-1, *(1,) * (one.ndim - 1)), one, negative[name])
        for name, one in embedding.items()
    }
