"""What an update of a run counts: latents in one call, images decoded at once, and its cost in U.

From settings alone, and from what a backward costs. A U is one latent through the denoiser forward.
"""

from typing import Any

from rpo.models.latents import images_per_decode
from rpo.objectives.endpoint.bound import Bound
from rpo.objectives.reward_gradient import AlongPath
from rpo.objectives.reward_gradient.adjoint_matching import AdjointMatching
from rpo.objectives.reward_gradient.srpo import Srpo
from rpo.runs.train_config import DPORunConfig, EndpointRunConfig, RewardGradientRunConfig
from rpo.sampling.sample import images_at_once
from rpo.trainers.preview import IMAGES, PROMPTS
from rpo.types import Canvas


def price(config: Any, backward: float, *, guided: bool) -> float:
    """U of an update: drawing, reference and training.

    Args:
        backward: U of one latent through the denoiser and back.
        guided: Whether guidance costs a second latent.
    """
    return counts(config, Canvas(8, 8), backward, guided=guided)[-1]  # whose size is a matter of memory alone


def counts(config: Any, canvas: Canvas, backward: float, *, guided: bool) -> tuple[int, int, int, float]:
    """Latents in one call of an update and of drawing, images decoded at once, and the U of an update."""
    pixels = canvas.height * canvas.width
    if isinstance(config, DPORunConfig):
        previewed = min(PROMPTS * IMAGES, images_at_once(canvas)) if config.preview_every else 0
        latents = 2 * config.pairs_per_update
        return (
            2 * config.learning.micro_batch,
            previewed * (2 if guided else 1),
            min(previewed, images_per_decode(pixels)),
            latents * (config.objective.needs_reference + backward),
        )
    if isinstance(config, RewardGradientRunConfig):
        config = config.with_steps()
    elif isinstance(config, EndpointRunConfig):
        config = config.with_times()
    rollout, steps = config.rollout, config.steps
    both = 2 if guided and rollout.guidance_scale > 1 else 1
    trained_both = 2 if guided and config.guidance_scale > 1 and not steps.freeze_negative else 1
    low, high = steps.window or (0.0, 1.0)
    eligible = sum(low <= step / rollout.num_steps < high for step in range(rollout.num_steps))
    trained = rollout.images * (steps.train_steps or eligible) * steps.passes
    asked = both * (2 if rollout.order == "reference" else 1)
    drawn = (rollout.images + config.watched_images / (config.monitor.every or 1)) * rollout.num_steps * asked
    learning = trained * (backward * trained_both + _others(config, guided=guided))
    # With `keep_graph` the graphs of all trained steps are there at once.
    rows = trained if steps.keep_graph else config.learning.micro_batch
    return (
        rows * trained_both,
        min(rollout.batch_size, rollout.images) * both,
        min(images_per_decode(pixels), rollout.images),
        (drawn + learning + _followed(config, both * backward)) / steps.updates_per_rollout,
    )


def _followed(config: Any, backward: float) -> float:
    """U for following the slope of a reward back along the paths of a rollout."""
    if not isinstance(config, RewardGradientRunConfig) or not isinstance(config.objective, AlongPath):
        return 0.0
    networks = 2 if config.kl_weight > 0 and not isinstance(config.objective, AdjointMatching) else 1
    return config.rollout.images * (config.rollout.num_steps - config.first_step - 1) * backward * networks


def _others(config: Any, *, guided: bool) -> int:
    """Predictions besides its own that an objective asks for at every trained moment, without gradient."""
    if isinstance(config, RewardGradientRunConfig):
        return int(config.kl_weight > 0) + isinstance(config.objective, Srpo)
    if not isinstance(config, EndpointRunConfig):
        return 0
    objective = config.objective
    if isinstance(objective, Bound):
        return int(objective.clip is not None)
    return len(objective.needs) + int(guided and (config.reference_guidance or 1) > 1)
