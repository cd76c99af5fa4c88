"""Whether a reward has a slope by the image, before a run follows it."""

import torch

from rpo.randomness import keyed_generator
from rpo.trainers.checks.preflight import Check
from rpo.trainers.rollouts.draw import Rollouts
from rpo.trainers.rollouts.reward_slopes import RewardSlopes

IMAGES = 2


def slope_check(slopes: RewardSlopes, rollouts: Rollouts) -> Check:
    """Follows the rewards back to the latents of two images of noise."""
    model, prompts = rollouts.model, list(rollouts.prompts.shown)[:1] * IMAGES
    shape, generator = (IMAGES, *model.latent_shape(rollouts.canvas)), keyed_generator("preflight slope of the reward")
    latents = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(model.device)
    _, slope = slopes.at(latents, (1.0, prompts), names=[f"preflight, image {index}" for index in range(IMAGES)])
    size = slope.square().mean().sqrt().item()
    return Check(
        "the reward has a slope",
        size > 0,
        f"{size:.3g} per dimension of a latent" if size else "0 for images of noise",
        "nothing can be followed back: look for a detach, a rounding or a threshold in the reward "
        f"({', '.join(rollouts.rewards.weights)}), or take `rpo train endpoint`",
    )
