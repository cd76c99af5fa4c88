"""Winner-preserving scaling (SDPO): push the rejected side away only as far as the chosen side can afford it.

DPO may raise the errors of both sides as long as the rejected one rises more. With g = the gradient of a side's error
with respect to its prediction, a step along -g_w + lambda g_l changes the chosen error, where both sides respond alike,
by -|g_w|² + lambda g_l·g_w. This is at most -mu |g_w|² with

    lambda = min(1, (1 - mu) |g_w|² / (g_l·g_w))   if g_l·g_w > 0, else 1

and only the *gradient* of the rejected error is scaled: L_l <- sg(L_l) + lambda (L_l - sg(L_l)).

Differs from the authors' code, which takes one lambda for the whole batch: here every pair has its own, so that the
gradient of an update does not depend on how it is split into micro-batches.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.errors import InputError


@torch.no_grad()
def winner_preserving_scale(
    chosen_residual: Float[Tensor, "batch c h w"],
    rejected_residual: Float[Tensor, "batch c h w"],
    *,
    kept_share: float,
) -> Float[Tensor, " batch"]:
    """Lambda of each pair, in [0, 1].

    Args:
        chosen_residual: Prediction minus target of the chosen side (half the gradient of its summed squared error),
            times the weight of each place if there is one.
        rejected_residual: The same of the rejected side.
        kept_share: mu, 0 to 1: the share of the chosen side's own descent that is kept at least. The authors' script
            for SD 1.5 has 0.9.

    Raises:
        ValueError: `kept_share` is outside its range.
    """
    if not 0 <= kept_share <= 1:
        raise InputError(f"kept_share is {kept_share}, but it must be between 0 and 1; 0.9 is usual")
    wide = torch.promote_types(chosen_residual.dtype, torch.float32)
    chosen, rejected = chosen_residual.to(wide), rejected_residual.to(wide)
    own, shared = (chosen * chosen).sum(dim=(1, 2, 3)), (chosen * rejected).sum(dim=(1, 2, 3))
    bound = (1 - kept_share) * own / torch.where(shared > 0, shared, 1.0)
    return torch.where(shared > 0, bound.clamp(max=1.0), 1.0)
