"""Links: from the argument z of a preference loss (how far the policy favours the chosen side) to what is descended.

    sigmoid       -log sigmoid(z)                 Bradley-Terry likelihood; DPO
    ipo           (z - 1/2)²                      a square around a finite goal; IPO (arXiv:2310.12036)
    hinge         max(0, 1 - z)                   SLiC (arXiv:2305.10425)
    square_hinge  max(0, 1/2 - z)²                IPO that does not pull back what is past its goal
    cauchy        -log(1/2 + arctan(z) / pi)      heavy tails: one wrong label cannot pull for ever
    linear        -z                              every pair pulls alike, for ever

The forms and their scale are those of RainbowPO's code (arXiv:2410.04203): the goal of `ipo` is 1/2 in units of the
argument, where other programs write (z - 1/(2 beta))² of an argument without beta. All have a slope of order 1 at
z = 0, so that a beta that works for one is a place to start for the others.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rpo.errors import InputError

LinkName = Literal["sigmoid", "ipo", "hinge", "square_hinge", "cauchy", "linear"]

Link = Callable[[Float[Tensor, " batch"]], Float[Tensor, " batch"]]


def sigmoid_link(argument: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """-log sigmoid(z)."""
    return -F.logsigmoid(argument)


def ipo_link(argument: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """(z - 1/2)²; with labels that hold with probability p, least at z = p - 1/2."""
    return (argument - 0.5) ** 2


def hinge_link(argument: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """max(0, 1 - z)."""
    return F.relu(1 - argument)


def square_hinge_link(argument: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """max(0, 1/2 - z)²."""
    return F.relu(0.5 - argument) ** 2


def cauchy_link(argument: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """-log of the Cauchy distribution function; arctan2(1, -z) is pi/2 + arctan(z) without cancellation."""
    return -torch.log(torch.atan2(torch.ones_like(argument), -argument) / math.pi)


def linear_link(argument: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """-z."""
    return -argument


LINKS: dict[LinkName, Link] = {
    "sigmoid": sigmoid_link,
    "ipo": ipo_link,
    "hinge": hinge_link,
    "square_hinge": square_hinge_link,
    "cauchy": cauchy_link,
    "linear": linear_link,
}


def smoothed_link(
    argument: Float[Tensor, " batch"], *, link: LinkName, label_smoothing: float
) -> Float[Tensor, " batch"]:
    """The expected loss when each label is the wrong way round with probability `label_smoothing`.

    Args:
        argument: How far the policy favours the chosen side.
        link: Its name.
        label_smoothing: 0 up to but without 1/2; 0 is the link itself, to the bit.

    Raises:
        ValueError: The smoothing is outside its range.
    """
    if not 0 <= label_smoothing < 0.5:  # noqa: PLR2004 - half of the labels wrong is no label
        raise InputError(
            f"label_smoothing is {label_smoothing}; expected 0 up to but without 0.5, where a label says nothing; "
            "0 to 0.2 is usual"
        )
    losses = LINKS[link](argument)
    if label_smoothing == 0:
        return losses
    return (1 - label_smoothing) * losses + label_smoothing * LINKS[link](-argument)
