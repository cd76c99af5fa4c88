"""How well an image compresses: the size of its JPEG file in kB, negated for compressibility (DDPO, arXiv:2305.13301).

A kB is 1000 bytes and the quality is 95, as in the paper's own experiments. The prompt does not matter. A reward that
needs no model and that every policy can raise: of use to see whether training works at all.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image

from rpo.types import Images, PerSample

QUALITY = 95
BYTES_PER_KB = 1000


@dataclass(frozen=True)
class JpegReward:
    """Size of the JPEG file in kB: negated, so that what compresses well is good, or as it is.

    Example:
        >>> flat, noise = torch.zeros(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
        >>> smooth, rough = JpegReward(is_small_good=True)(torch.cat([flat, noise]), ["", ""])
        >>> bool(smooth > rough)
        True
    """

    is_small_good: bool
    """True rewards compressible images, False incompressible ones."""

    is_differentiable: ClassVar[bool] = False

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Encode every image once."""
        pixels = (images.detach().float() * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        sign = -1 if self.is_small_good else 1
        sizes = []
        for image in pixels:
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, format="JPEG", quality=QUALITY)
            sizes.append(sign * stream.tell() / BYTES_PER_KB)
        return torch.tensor(sizes, device=images.device)


COMPRESSIBILITY = JpegReward(is_small_good=True)
INCOMPRESSIBILITY = JpegReward(is_small_good=False)
