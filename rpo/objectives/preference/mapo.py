"""MaPO (Hong et al., arXiv:2406.06424): margin-aware preference optimisation without a reference.

    f(e)     = s e / (exp(s e) - 1)          an odds of the image from its error e, falling from f(0) = 1
    loss     = e_w - beta log sigmoid(T (f(e_w) - f(e_l)))

The first term is plain denoising of the chosen image, the second widens the odds. Both sides share noise and time.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rpo.config.ranges import Positive
from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.objectives.preference.base import Comparison, Statistics, pair_output
from rpo.types import StepOutput

PAPER_MAPO_BETA, PAPER_TEMPERATURE, SDXL_NUM_DIMS = 0.1, 1000.0, 4 * 128 * 128
"""Of the authors' SDXL run, and the dimensions of its latents."""

_SERIES_BELOW = 1e-3
"""Of |s e|: there 1 - x/2 + x²/12 is f to 1e-15, and x / expm1(x) has no gradient at 0."""


@settings
class Mapo:
    """MaPO: no reference, a forward pass cheaper."""

    kind: Literal["mapo"] = "mapo"

    beta: Positive | None = None
    """Weight of the odds term against the denoising term. Nothing takes the authors' 0.1."""

    slope: Positive = 0.5
    """How fast the odds fall with the error."""

    temperature: Positive | None = None
    """How small a difference of odds counts, > 0. Nothing takes the authors' 1000 for the 65,536 dimensions of SDXL,
    and for smaller latents, whose errors scatter more, in proportion to the root of their number."""

    title: ClassVar[str] = "MaPO"
    needs_reference: ClassVar[bool] = False
    starts_at_zero: ClassVar[bool] = False
    bins: ClassVar[int] = 0
    decay: ClassVar[float] = 0.0
    needs_scores: ClassVar[str] = ""
    reduction: ClassVar[Literal["mean"]] = "mean"

    def default_beta(self, num_dims: int) -> float:
        """The authors', at any size."""
        return PAPER_MAPO_BETA

    def __call__(self, pairs: Comparison, statistics: Statistics | None) -> StepOutput:
        """The loss of a micro-batch of pairs."""
        temperature = self.temperature or PAPER_TEMPERATURE * (pairs.num_dims / SDXL_NUM_DIMS) ** 0.5
        return mapo(pairs.chosen, pairs.rejected, beta=pairs.beta, slope=self.slope, temperature=temperature)


def odds(error: Float[Tensor, " batch"], *, slope: float) -> Float[Tensor, " batch"]:
    """f(e) = s e / (exp(s e) - 1), with its limit 1 and slope -s/2 at 0.

    Args:
        error: e >= 0.
        slope: s > 0.
    """
    x = slope * error
    is_small = x.abs() < _SERIES_BELOW
    safe = torch.where(is_small, 1.0, x)  # also for the gradient, which torch.where takes of both branches
    return torch.where(is_small, 1 - x / 2 + x**2 / 12, safe / torch.expm1(safe))


def mapo(
    chosen_error: Float[Tensor, " batch"],
    rejected_error: Float[Tensor, " batch"],
    *,
    beta: float = 0.1,
    slope: float = 0.5,
    temperature: float = 1000.0,
) -> StepOutput:
    """The MaPO loss of a batch of pairs; the defaults are those of the authors' SDXL run.

    Args:
        chosen_error: Error of the policy on the preferred side, mean over dimensions.
        rejected_error: Error of the policy on the other side, at the same noise and time.
        beta: Weight of the odds term against the denoising term, >= 0.
        slope: s of the odds, > 0.
        temperature: T > 0: how small a difference of odds counts.

    Raises:
        ValueError: A number is outside its range.
    """
    if not (beta >= 0 and slope > 0 and temperature > 0):
        raise InputError(
            f"beta is {beta}, slope {slope} and temperature {temperature}, but beta must be >= 0 and the others > 0; "
            "the paper has 0.1, 0.5 and 1000"
        )
    favour = temperature * (odds(chosen_error, slope=slope) - odds(rejected_error, slope=slope))
    return pair_output(beta * -F.logsigmoid(favour), chosen_error, favour, (chosen_error, rejected_error))
