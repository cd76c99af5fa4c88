"""What Qwen-Image and its relatives have in common: an autoencoder of videos, to which an image is one frame."""

from typing import Any

from rpo.models import latents as autoencoder
from rpo.models.families.packed import PackedFamily
from rpo.types import Images, Latents


class OneFrameFamily(PackedFamily):
    """A transformer on packed latents of an `AutoencoderKLQwenImage`."""

    def latent_channels(self, pipe: Any) -> int:
        """Those of the autoencoder."""
        return pipe.vae.config["z_dim"]

    def encode(self, pipe: Any, images: Images) -> tuple[Latents, Latents]:
        """Scaled by a mean and a standard deviation for each channel."""
        mean, std = autoencoder.encode(pipe.vae, images[:, :, None])
        return mean[:, :, 0], std[:, :, 0]

    def decode(self, pipe: Any, latents: Latents) -> Images:
        """The way back, cut off at [0, 1] by the autoencoder itself."""
        return autoencoder.decode(pipe.vae, latents[:, :, None])[:, :, 0]
