"""Diffusion-DPO (Wallace et al., arXiv:2311.12908, eq. 14): prefer the chosen image by denoising it better than before.

With e the squared error of one noisy latent, *averaged* over its dimensions, at a noise and a time that the two sides
share:

    Delta_w = e_policy(x_w) - e_reference(x_w),   Delta_l likewise
    inside  = -beta/2 (Delta_w - Delta_l)
    loss    = -log sigmoid(inside)

This is `beta` as the authors' code counts it. The flow-matching form (Flow-GRPO's SD3 script) is the same function of
errors whose target is eps - x_0; only the size of a sensible beta differs.

Because e is a mean, beta depends on the size of the latents: the paper's 5000 on the 4·64·64 = 16,384 dimensions of SD
1.5 is 0.305 per dimension, which is 78 on 256 dimensions. `beta_for_dims` converts.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rpo.types import StepOutput

PAPER_BETA = 5000.0
"""The paper's beta for SD 1.5 and SDXL."""

PAPER_NUM_DIMS = 4 * 64 * 64
"""Latent dimensions of SD 1.5 at 512 px, where `PAPER_BETA` was tuned."""


def beta_for_dims(num_dims: int, *, beta: float = PAPER_BETA, tuned_dims: int = PAPER_NUM_DIMS) -> float:
    """The beta that regularises latents of `num_dims` dimensions as `beta` does those of `tuned_dims`.

    Args:
        num_dims: Dimensions of one latent, c·h·w.
        beta: A beta known to work.
        tuned_dims: Dimensions of the latents it is known to work on.

    Example:
        >>> beta_for_dims(4 * 8 * 8)
        78.125
    """
    return beta * num_dims / tuned_dims


def squared_error(
    noise_pred: Float[Tensor, "batch c h w"], target: Float[Tensor, "batch c h w"]
) -> Float[Tensor, " batch"]:
    """Squared error per sample, averaged over its dimensions, in float32 or better."""
    wide = torch.promote_types(noise_pred.dtype, torch.float32)
    return ((noise_pred.to(wide) - target.to(wide)) ** 2).mean(dim=(1, 2, 3))


def diffusion_dpo(
    chosen_error: Float[Tensor, " batch"],
    rejected_error: Float[Tensor, " batch"],
    reference_chosen_error: Float[Tensor, " batch"],
    reference_rejected_error: Float[Tensor, " batch"],
    *,
    beta: float,
    sft_weight: float = 0.0,
) -> StepOutput:
    """The Diffusion-DPO loss of a batch of pairs, with what a person needs to see whether it works.

    Args:
        chosen_error: Error of the policy on the preferred side, carrying the gradient.
        rejected_error: Error of the policy on the other side, at the same noise and time.
        reference_chosen_error: Error of the frozen reference on the preferred side.
        reference_rejected_error: Error of the frozen reference on the other side.
        beta: Pull to the reference, > 0; larger stays closer. Depends on the latent size (see the module).
        sft_weight: Weight of the chosen side's plain denoising loss, in units of `beta`/2, >= 0. DPO alone may lower
            the likelihood of both sides as long as the gap grows; 0.05 … 0.5 keeps the chosen side in place.

    Raises:
        ValueError: If `beta` is not positive or `sft_weight` is negative.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}, but it must be > 0; 5000 is usual for SD 1.5 (see beta_for_dims for others)")
    if sft_weight < 0:
        raise ValueError(f"sft_weight is {sft_weight}, but it must be >= 0; give 0 for plain Diffusion-DPO")
    chosen_change = chosen_error - reference_chosen_error
    rejected_change = rejected_error - reference_rejected_error
    inside = -0.5 * beta * (chosen_change - rejected_change)  # eq. 14
    preference_losses = -F.logsigmoid(inside)
    sample_losses = preference_losses + sft_weight * 0.5 * beta * chosen_change
    metrics = {
        "dpo/loss": preference_losses.mean(),
        "dpo/implicit_accuracy": (inside > 0).float().mean(),
        "dpo/margin": inside.mean(),
        "dpo/chosen_error": chosen_error.mean(),
        "dpo/rejected_error": rejected_error.mean(),
        "dpo/reference_chosen_error": reference_chosen_error.mean(),
        "dpo/chosen_error_ratio": chosen_error.mean() / reference_chosen_error.mean(),
        "dpo/rejected_error_ratio": rejected_error.mean() / reference_rejected_error.mean(),
    }
    detached = {name: value.detach() for name, value in metrics.items()}
    return StepOutput(sample_losses.mean(), sample_losses.detach(), detached)
