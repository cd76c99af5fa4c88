"""Diffusion-KTO (Li et al., arXiv:2404.04465): learn from images that are each labelled good or bad, without pairs.

With y = 1 for a desirable image and -1 for an undesirable one, and how much better the policy denoises it than the
reference does:

    g    = e_reference - e_policy
    h    = sigmoid(y beta (g - kl))
    loss = mean of weight_y (1 - h)

The utility h is flat far from its reference point kl >= 0, so that an image which is already won, or hopeless, pulls
little. The authors take the mean of g over the micro-batches of all GPUs as kl, clamped at 0; here it is an argument,
which the trainer fills with a running mean over past updates: the gradient then does not depend on how an update is
split over micro-batches and processes, and nobody waits for the others in the middle of a loss.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rpo.config.ranges import NotNegative, Positive
from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.objectives.preference.base import Comparison, Statistics, beta_for_dims, pair_output
from rpo.types import StepOutput

PAPER_KTO_BETA = 1000.0
"""The authors' beta for SD 1.5; without the factor 1/2 of DPO's."""

KL_DECAY = 0.9
"""Of the running mean that stands for kl: it looks back ten updates."""


@settings
class Kto:
    """Diffusion-KTO: each side of a pair is an image that is labelled good or bad."""

    kind: Literal["kto"] = "kto"

    beta: Positive | None = None
    """How fast the utility saturates, > 0. Nothing takes the paper's 1000 for the 16,384 dimensions of SD 1.5, and in
    proportion for other sizes."""

    desirable_weight: NotNegative = 1.0
    """Weight of chosen images."""

    undesirable_weight: NotNegative = 1.0
    """Weight of rejected images."""

    title: ClassVar[str] = "Diffusion-KTO"
    needs_reference: ClassVar[bool] = True
    starts_at_zero: ClassVar[bool] = True
    bins: ClassVar[int] = 1
    decay: ClassVar[float] = KL_DECAY
    needs_scores: ClassVar[str] = ""
    reduction: ClassVar[Literal["mean"]] = "mean"

    def default_beta(self, num_dims: int) -> float:
        """The paper's, for latents of `num_dims` dimensions."""
        return beta_for_dims(num_dims, beta=PAPER_KTO_BETA)

    def __call__(self, pairs: Comparison, statistics: Statistics | None) -> StepOutput:
        """The loss of a micro-batch of pairs, a mean over their images."""
        assert pairs.reference is not None and statistics is not None
        errors, reference_errors = torch.cat(pairs.errors), torch.cat(pairs.reference)
        is_chosen = torch.arange(len(errors), device=errors.device) < len(pairs.chosen)
        baseline = statistics.mean()
        losses = kto_losses(
            errors,
            reference_errors,
            is_chosen,
            beta=pairs.beta,
            baseline=baseline,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        gain = (reference_errors - errors).detach()
        statistics.observe(gain, torch.zeros_like(is_chosen, dtype=torch.long))
        favour = pairs.beta * (gain.chunk(2)[0] - gain.chunk(2)[1])
        output = pair_output(losses.view(2, -1).mean(dim=0), 0.0, favour, pairs.errors, pairs.reference)
        return replace(output, metrics=output.metrics | {"dpo/kl_baseline": pairs.beta * baseline.clamp(min=0)})


def kto_losses(
    error: Float[Tensor, " images"],
    reference_error: Float[Tensor, " images"],
    is_desirable: Bool[Tensor, " images"],
    *,
    beta: float,
    baseline: Float[Tensor, ""] | float | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " images"]:
    """The KTO loss of each labelled image, between 0 and its weight; half the weight where policy is reference.

    Args:
        error: Error of the policy, mean over dimensions, carrying the gradient.
        reference_error: Error of the frozen reference at the same noise and time.
        is_desirable: The labels.
        beta: How fast the utility saturates, > 0; depends on the latent size as DPO's does.
        baseline: kl before the clamp at 0; None is the mean of g over these images.
        desirable_weight: Weight of the desirable images, >= 0.
        undesirable_weight: Weight of the others, >= 0.

    Raises:
        ValueError: A number is outside its range.
    """
    if not beta > 0:
        raise InputError(f"beta is {beta}, but it must be > 0; 1000 is usual for SD 1.5, 16 for shapes")
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise InputError(
            f"desirable_weight is {desirable_weight} and undesirable_weight {undesirable_weight}, but both must be "
            ">= 0; 1 and 1 is usual for balanced labels"
        )
    gain = reference_error - error
    kl = gain.mean() if baseline is None else torch.as_tensor(baseline, dtype=gain.dtype, device=gain.device)
    kl = kl.detach().clamp(min=0)
    sign = torch.where(is_desirable, 1.0, -1.0).to(gain.dtype)
    weight = torch.where(is_desirable, desirable_weight, undesirable_weight).to(gain.dtype)
    return weight * (1 - torch.sigmoid(sign * beta * (gain - kl)))
