"""Diffusion-DPO (Wallace et al., arXiv:2311.12908, eq. 14) and its family: denoise what is preferred ever better.

With e the squared error of one noisy latent, *averaged* over its dimensions, at a noise and a time that the two sides
share, and Delta the chosen side's minus the rejected one's:

    z    = w(t) {-1/2 Delta[e_policy] + 1/2 alpha Delta[e_reference]} - (1 - alpha) gamma
    loss = f(beta phi(c) z) + sft_weight beta/2 (e_policy,w - alpha e_reference,w)

These are the seven directions of RainbowPO (arXiv:2410.04203) carried from tokens to denoising errors: normalisation
(the mean over dimensions, and w), link f, margin gamma, reference mixing alpha, contextual scaling phi and the SFT term
are arguments; the seventh, which pairs to learn from, is `rpo.data.rejection_sampling`. No paper is known that carries
all of them to diffusion. Without any of them it is Diffusion-DPO, `diffusion_dpo`, to the bit:

    Delta_w = e_policy(x_w) - e_reference(x_w),   Delta_l likewise
    loss    = -log sigmoid(-beta/2 (Delta_w - Delta_l))

This is `beta` as the authors' code counts it. The flow-matching form (Flow-GRPO's SD3 script) is the same function of
errors whose target is eps - x_0; only the size of a sensible beta differs.

Because e is a mean, beta depends on the size of the latents: the paper's 5000 on the 4·64·64 = 16,384 dimensions of SD
1.5 is 0.305 per dimension, which is 78 on 256 dimensions. `beta_for_dims` converts.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.errors import InputError
from rpo.objectives.preference_links import LinkName, smoothed_link
from rpo.objectives.preference_metrics import pair_output
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
    noise_pred: Float[Tensor, "batch c h w"],
    target: Float[Tensor, "batch c h w"],
    weight: Float[Tensor, "batch 1 h w"] | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
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


def preference_loss(
    chosen_error: Float[Tensor, " batch"],
    rejected_error: Float[Tensor, " batch"],
    reference_chosen_error: Float[Tensor, " batch"] | None = None,
    reference_rejected_error: Float[Tensor, " batch"] | None = None,
    *,
    beta: float,
    link: LinkName = "sigmoid",
    time_weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | float = 0.0,
    is_margin_mixed: bool = False,
    reference_weight: float = 1.0,
    context_scale: Float[Tensor, " batch"] | None = None,
    rejected_gradient_scale: Float[Tensor, " batch"] | None = None,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> StepOutput:
    """A preference loss of four errors, with what a person needs to see whether it works.

    Args:
        chosen_error: Error of the policy on the preferred side, carrying the gradient.
        rejected_error: Error of the policy on the other side, at the same noise and time.
        reference_chosen_error: Error of the frozen reference on the preferred side; none for `reference_weight` 0.
        reference_rejected_error: Error of the frozen reference on the other side.
        beta: Pull to the reference, > 0; larger stays closer. Depends on the latent size (see the module).
        link: f, by name.
        time_weight: w(t) >= 0 of each pair's time; None is 1.
        margin: gamma, in units of z (beta and phi multiply it too); a tensor is logged.
        is_margin_mixed: Whether gamma counts (1 - alpha) times, as the second reference of RainbowPO's mixture.
        reference_weight: alpha, 0 to 1: 1 is DPO, 0 is free of the reference, as SimPO.
        context_scale: phi > 0 of each pair's prompt, as in Mallows-DPO; None is 1.
        rejected_gradient_scale: Factor on the gradient of the rejected error; see `winner_preserving_scale`.
        label_smoothing: Probability that a label is wrong, 0 up to but without 1/2.
        sft_weight: Weight of the chosen side's denoising loss, in units of `beta`/2, >= 0; 0.05 … 0.5 keeps it in
            place, where DPO alone may let the errors of both sides grow as long as the gap does.
    """
    _check(beta, sft_weight, reference_weight)
    pushed = rejected_error
    if rejected_gradient_scale is not None:
        pushed = with_gradient_scaled(rejected_error, rejected_gradient_scale)
    chosen_change = _change(chosen_error, reference_chosen_error, reference_weight)
    favour = -0.5 * beta * (chosen_change - _change(pushed, reference_rejected_error, reference_weight))  # eq. 14
    advantage = beta * (1 - reference_weight if is_margin_mixed else 1.0) * margin
    favour = favour if time_weight is None else favour * time_weight
    if context_scale is not None:
        favour, advantage = favour * context_scale, advantage * context_scale
    losses = smoothed_link(favour - advantage, link=link, label_smoothing=label_smoothing)
    sft = sft_weight * 0.5 * beta * chosen_change
    references = (reference_chosen_error, reference_rejected_error)
    output = pair_output(losses, sft, favour, (chosen_error, rejected_error), references)
    return replace(output, metrics=output.metrics | _part_metrics(margin, advantage, rejected_gradient_scale))


def with_gradient_scaled(error: Float[Tensor, " batch"], scale: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The same numbers, to the bit, with `scale` times their gradient."""
    value = error.detach()
    return value + scale * (error - value)


def diffusion_dpo(
    chosen_error: Float[Tensor, " batch"],
    rejected_error: Float[Tensor, " batch"],
    reference_chosen_error: Float[Tensor, " batch"],
    reference_rejected_error: Float[Tensor, " batch"],
    *,
    beta: float,
    sft_weight: float = 0.0,
) -> StepOutput:
    """The Diffusion-DPO loss of a batch of pairs: `preference_loss` with nothing added.

    Args:
        chosen_error: Error of the policy on the preferred side, carrying the gradient.
        rejected_error: Error of the policy on the other side, at the same noise and time.
        reference_chosen_error: Error of the frozen reference on the preferred side.
        reference_rejected_error: Error of the frozen reference on the other side.
        beta: Pull to the reference, > 0; larger stays closer. Depends on the latent size (see the module).
        sft_weight: Weight of the chosen side's plain denoising loss; see `preference_loss`.
    """
    return preference_loss(
        chosen_error,
        rejected_error,
        reference_chosen_error,
        reference_rejected_error,
        beta=beta,
        sft_weight=sft_weight,
    )


def _check(beta: float, sft_weight: float, reference_weight: float) -> None:
    if not beta > 0:
        raise InputError(f"beta is {beta}, but it must be > 0; 5000 is usual for SD 1.5 (see beta_for_dims for others)")
    if not sft_weight >= 0:
        raise InputError(f"sft_weight is {sft_weight}, but it must be >= 0; give 0 for plain Diffusion-DPO")
    if not 0 <= reference_weight <= 1:
        raise InputError(
            f"reference_weight is {reference_weight}, but it must be between 0 (no reference) and 1 (DPO); give 1"
        )


def _change(
    error: Float[Tensor, " batch"], reference_error: Float[Tensor, " batch"] | None, reference_weight: float
) -> Float[Tensor, " batch"]:
    if reference_weight == 0:
        return error
    if reference_error is None:
        raise InputError(
            f"reference_weight is {reference_weight}, but the reference's errors are missing; expected both: give "
            "them, or reference_weight=0"
        )
    return error - reference_weight * reference_error


def _part_metrics(
    margin: Tensor | float, advantage: Tensor | float, rejected_gradient_scale: Tensor | None
) -> dict[str, Float[Tensor, ""]]:
    metrics: dict[str, Tensor] = {}
    if isinstance(margin, Tensor):
        metrics["dpo/home_advantage"] = torch.as_tensor(advantage).mean()
    if rejected_gradient_scale is not None:
        metrics["dpo/rejected_scale"] = rejected_gradient_scale.mean()
    return metrics
