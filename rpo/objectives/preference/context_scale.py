"""Contextual scaling phi(c) of Mallows-DPO (arXiv:2405.14953): trust a preference more where there is less to doubt.

    phi(c) = -c0 log D(c)        with c0 such that the mean over the set is 1

D is a dispersion between 0 and 1. For language models it is the reference's entropy over that of the uniform
distribution; for images there is no entropy to read off, so D is a prompt's own dispersion in units of twice the
largest of the set (so that no prompt counts nothing), and at least `LEAST`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.errors import InputError

LEAST = 0.01
"""Smallest D: a prompt without any dispersion counts log 100 / log 2 = 6.6 times the most dispersed one, at most."""


def mallows_scale(dispersion: Float[Tensor, " items"]) -> Float[Tensor, " items"]:
    """Phi of each item of a set, positive and of mean 1; larger where the dispersion is smaller.

    Args:
        dispersion: Of each item, >= 0, on any scale: only its ratio to the largest counts.

    Raises:
        ValueError: A dispersion is negative or not finite.
    """
    if not (dispersion.isfinite().all() and (dispersion >= 0).all()):
        raise InputError("a dispersion is negative or not finite; expected finite numbers >= 0: correct the scores")
    largest = dispersion.max()
    relative = dispersion / (2 * torch.where(largest > 0, largest, 1.0))
    scale = -relative.clamp(min=LEAST).log()
    return scale / scale.mean()
