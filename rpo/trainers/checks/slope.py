"""Whether a reward has a slope by the image, before a run follows it."""

from rpo.randomness import keyed_generator
from rpo.sampling.sample import Keep
from rpo.trainers.checks.preflight import Check
from rpo.trainers.rollouts.draw import Rollouts
from rpo.trainers.rollouts.reward_slopes import RewardSlopes

IMAGES = 2


def slope_check(slopes: RewardSlopes, rollouts: Rollouts) -> Check:
    """Draws a few images, and follows what they earn back to their latents."""
    seed = keyed_generator("preflight slope of the reward").initial_seed()
    few = rollouts.aside(rollouts.config.of_few(1, IMAGES), seed=seed)
    rollout = few.draw(0, lambda grid: Keep())
    _, slope = slopes.at(rollout.trajectory.x_0, (1.0, rollout.prompts), names=rollout.names)
    size = slope.square().mean().sqrt().item()
    return Check(
        "the reward has a slope",
        size > 0,
        f"{size:.3g} per dimension of a latent" if size else f"0 for {IMAGES} images",
        "nothing can be followed back: look for a detach, a rounding or a threshold in the reward "
        f"({', '.join(rollouts.rewards.weights)}), or take `rpo train endpoint`",
    )
