"""The nearest plain LoRA of a rank to any change of weights: of a DoRA, a full fine-tune, or a LoRA of a higher rank.

    dW ≈ B A = (U √S)(√S Vᵀ)          the first singular directions of dW (Eckart and Young, 1936)

The error is told as |dW - B A| / |dW|, over all layers, and with what a LoRA cannot have: norms and biases.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from rpo.adapters.formats.layers import Layers
from rpo.errors import InputError

EXACT_UP_TO = 1024
"""Sides of the largest matrix whose singular values are all computed; of a larger one by a randomised method."""

Change = tuple[str, Tensor]
"""The name of a weight, and what is added to it."""


@torch.no_grad()
def nearest(changes: Iterable[Change], rank: int, *, beside: float = 0.0) -> tuple[Layers, float]:
    """The LoRA of this rank, and its relative error.

    Args:
        beside: The sum of squares of what changed and is in no layer.
    """
    if rank < 1:
        raise InputError(f"rank is {rank}, but a LoRA needs rank >= 1; 16 to 128 are usual for a whole fine-tune")
    layers: Layers = {}
    missed = total = beside
    for name, change in changes:
        matrix = change.float().flatten(1)
        down, up = _directions(matrix, min(rank, *matrix.shape))
        missed += (matrix - up @ down).square().sum().item()
        total += matrix.square().sum().item()
        if change.dim() > 2:  # noqa: PLR2004 - a convolution
            down, up = down.unflatten(1, change.shape[1:]), up[:, :, None, None]
        layers[name] = (down, up)
    if not total:
        raise InputError("nothing was changed, so there is no LoRA to make; expected other weights than the base's")
    if not layers:
        raise InputError("no layer was changed that a LoRA can change; expected linear layers or convolutions")
    return layers, (missed / total) ** 0.5


def _directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if max(matrix.shape) <= EXACT_UP_TO:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        left, right = left[:, :rank], right[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=6)
        left, right = left[:, :rank], right.T[:rank]
    root = values[:rank].sqrt()
    return (root[:, None] * right).contiguous(), (left * root).contiguous()
