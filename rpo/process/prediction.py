"""Predictions: what the network puts out, and what it says about the clean data and the noise.

With x_t = alpha x_0 + sigma eps, every prediction is one linear view of the pair (x_0, eps):

    epsilon       eps
    v_prediction  alpha eps - sigma x_0        (Salimans & Ho, arXiv:2202.00512; needs alpha² + sigma² = 1)
    sample        x_0
    flow          eps - x_0                    (rectified flow; needs alpha + sigma = 1)
    score         -eps / sigma                 (grad log p_t(x_t))

`flow` and `v_prediction` are two different things that the field both calls velocity; here they never share a name.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.errors import InputError
from rpo.types import Node, PredictionType

Reduction = Literal["mean", "sum"]
"""Over dimensions. "sum" leaves them uncounted, as a true log-likelihood does."""

Weight = Float[Tensor, "batch 1 h w"] | None
"""Of each place in an error."""


def to_x0_eps(
    noise_pred: Float[Tensor, "batch c h w"],
    x_t: Float[Tensor, "batch c h w"],
    node: Node,
    prediction_type: PredictionType,
) -> tuple[Float[Tensor, "batch c h w"], Float[Tensor, "batch c h w"]]:
    """Read a raw network output, of whatever type, at x_t as (x0_hat, eps_hat)."""
    alpha, sigma = node.alpha, node.sigma
    if prediction_type == "epsilon":
        return (x_t - sigma * noise_pred) / alpha, noise_pred
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * noise_pred, alpha * noise_pred + sigma * x_t
    if prediction_type == "sample":
        return noise_pred, (x_t - alpha * noise_pred) / sigma
    _require_flow(prediction_type)
    return x_t - sigma * noise_pred, x_t + alpha * noise_pred


def from_x0_eps(
    x_0: Float[Tensor, "batch c h w"], eps: Float[Tensor, "batch c h w"], node: Node, prediction_type: PredictionType
) -> Float[Tensor, "batch c h w"]:
    """The network output that stands for (x_0, eps): with the true pair, this is the training target."""
    alpha, sigma = node.alpha, node.sigma
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return alpha * eps - sigma * x_0
    if prediction_type == "sample":
        return x_0
    _require_flow(prediction_type)
    return eps - x_0


def x0_slope(node: Node, prediction_type: PredictionType) -> Tensor:
    """|∂x0_hat / ∂noise_pred| at x_t, in the shape of the node."""
    if prediction_type == "epsilon":
        return node.sigma / node.alpha
    if prediction_type == "sample":
        return torch.ones_like(node.sigma)
    if prediction_type != "v_prediction":
        _require_flow(prediction_type)
    return node.sigma


def _require_flow(prediction_type: PredictionType) -> None:
    """Refuse what is no view of latents and noise, such as logits."""
    if prediction_type != "flow":
        raise InputError(
            f"the prediction type is {prediction_type}, which says nothing of latents and noise; expected epsilon, "
            "v_prediction, sample or flow: ask `rpo.process.diffusion.diffusion_of`"
        )


def add_noise(
    x_0: Float[Tensor, "batch c h w"], eps: Float[Tensor, "batch c h w"], node: Node
) -> Float[Tensor, "batch c h w"]:
    """The forward process: x_t = alpha x_0 + sigma eps."""
    return node.alpha * x_0 + node.sigma * eps


def squared_error(
    noise_pred: Float[Tensor, "batch c h w"],
    target: Float[Tensor, "batch c h w"],
    weight: Weight = None,
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, " batch"]:
    """Squared error per sample, averaged over its dimensions, in float32 or better.

    Args:
        noise_pred: The prediction.
        target: What it should be.
        weight: Of each place, on the squares before the mean; a weight of 1 everywhere changes no bit.
        reduction: "sum" leaves the dimensions uncounted, as a true log-likelihood does; beta is per dimension then.
    """
    wide = torch.promote_types(noise_pred.dtype, torch.float32)
    squares = (noise_pred.to(wide) - target.to(wide)) ** 2
    if weight is not None:
        squares = weight * squares
    return squares.mean(dim=(1, 2, 3)) if reduction == "mean" else squares.sum(dim=(1, 2, 3))
