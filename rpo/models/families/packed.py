"""What FLUX.1 and its relatives have in common: 2 x 2 cells of the latents are one token, outside of the network."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from rpo.models.families.usual import UsualFamily
from rpo.models.schedules import FlowSchedule, even_sigmas
from rpo.types import Latents

TWO_STREAM_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
"""What is adapted: attention in all blocks, and the feed-forward layers of those that have text and image apart."""


class PackedFamily(UsualFamily):
    """A transformer on tokens of 2 x 2 cells, whose steps move towards the noise with the number of tokens."""

    packs = 2

    def schedule(self, pipe: Any) -> FlowSchedule:
        """Rectified flow on even sigmas, with the scheduler's shift."""
        return FlowSchedule(pipe.scheduler, sigmas=even_sigmas, max_shift=1.15)

    def patch(self, pipe: Any) -> int:
        """What is packed: where the network's configuration has a patch, too, it is this one."""
        return self.packs

    def native(self, pipe: Any) -> tuple[int, int]:
        """As the pipeline says, since the network's configuration does not."""
        return pipe.default_sample_size, pipe.default_sample_size


def pack(x_t: Latents) -> Tensor:
    """Tokens `[b, hw / 4, 4 c]` of latents `[b, c, h, w]`, row by row."""
    return pixel_unshuffle(x_t, 2).flatten(2).mT


def unpack(tokens: Tensor, like: Latents) -> Latents:
    """The way back, to the height and width of `like`; what comes after its tokens is left out."""
    height, width = (side // 2 for side in like.shape[-2:])
    return pixel_shuffle(tokens[:, : height * width].mT.unflatten(2, (height, width)), 2)


def positions(x_t: Latents) -> Tensor:
    """(0, row, column) of every token of an image."""
    sides = (1, x_t.shape[-2] // 2, x_t.shape[-1] // 2)
    return torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32, device=x_t.device) for side in sides))


def with_original(x_t: Latents, original: Latents | None) -> tuple[Tensor, Tensor]:
    """Tokens and positions of an image, and after them those of the image that it is an edit of, told by a 1."""
    if original is None:
        return pack(x_t), positions(x_t)
    second = positions(original)
    second[:, 0] = 1
    return torch.cat([pack(x_t), pack(original)], dim=1), torch.cat([positions(x_t), second])


def no_positions(tokens: Tensor) -> Tensor:
    """(0, 0, 0) for every token of a text."""
    return torch.zeros(tokens.shape[1], 3, dtype=torch.float32, device=tokens.device)
