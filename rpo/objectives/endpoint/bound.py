"""The endpoint gradient: what the likelihood gradient is on average over the paths that end in one image."""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.config.ranges import NotNegative, Positive
from rpo.config.settings import settings


@settings
class Bound:
    """Score as action's likelihood gradient, by the bound on the likelihood of whole images."""

    kind: Literal["score_as_action"] = "score_as_action"

    baseline: Literal["group", "value"] = "group"
    """What an image's reward is compared with: the other images of its prompt, or V(t, x_t)."""

    scale: Literal["none", "batch"] = "batch"
    """What the difference is divided by: the spread of the whole rollout, or nothing."""

    consistency: NotNegative = 0.0
    """Weight of fitting every image as it came out, whatever its reward. For a policy that
    reverses the noising process this has no gradient on average; it holds the policy to being one. 0.1 to 0.5 where
    `clip` is not to be used; more is noisier and trains the policy on its own images."""

    clip: Positive | None = 0.3
    """How far an image may be pushed or pulled, as a share of what the reference has: where the
    bound of its likelihood has moved that far, a point says no more. 0.1 to 0.5; nothing for no limit, and then low
    rewards push without bound until the images break (watch `policy/kl` and `loop/grad_norm` rise together)."""

    title: ClassVar[str] = "Endpoint"


def endpoint(
    kl_of_posterior: Float[Tensor, " points"],
    advantage: Float[Tensor, " points"],
    *,
    reference_kl: Float[Tensor, " points"] | None = None,
    clip: float = math.inf,
) -> Float[Tensor, " points"]:
    """The likelihood gradient of a step averaged over the paths that end in x_0, a plain advantage before it.

    If the policy is the reversal of the noising process, then given x_0 and x_t its next point is distributed as the
    forward process says, q(x_s | x_t, x_0), and the mean of d log p(x_s | x_t) is -d KL(q ‖ p): the gradient of the
    evidence lower bound on log p(x_0), term by term (arXiv:2006.11239, eq. 5). What is averaged away is the noise of
    the path, which says nothing about x_0. Noising x_0 afresh then stands for the path, at whatever times. For such a
    policy a constant added to all advantages changes nothing on average, and holds it to being one: with a KL weight
    the advantages vanish at the optimum, and without that hold a policy drifts among all that draw the same images.

    An image can be pushed away without bound, and then the policy is the reversal of nothing. With `clip`, a point says
    no more once its KL lies that share of the reference's beyond it, in the direction it asked for.

    Args:
        kl_of_posterior: KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)), with gradient.
        advantage: Of the point.
        reference_kl: The same KL under the reference; without it nothing is clipped.
        clip: Share of `reference_kl`, > 0.
    """
    advantage = advantage.detach()
    if reference_kl is None:
        return advantage * kl_of_posterior
    nearest, farthest = (1 - clip) * reference_kl, (1 + clip) * reference_kl
    wanted = torch.where(advantage > 0, kl_of_posterior.maximum(nearest), kl_of_posterior.minimum(farthest))
    return advantage * wanted
