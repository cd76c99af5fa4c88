"""What the images of a rollout are worth at moments that no rollout passed through: `endpoint`'s part of the judging.

Every image is noised afresh, to times anywhere on the process, and each such moment gets an advantage of its own:

    A(t, x_t) = r(x_0) - baseline,      baseline = what the other images of the prompt earned, or V(t, x_t)

V has the smaller variance. Close to the data x_t shows how it will end, so V takes away nearly all of what r - m says
there, which is noise: the step could not change it. And since E[A | x_t] = 0 with the right V, images that turned out
badly do not push the policy away from everything that looked like them. On `shapes` the two trained equally well: most
of what V explains lies where nothing is left to decide.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rpo.diffusion.continuous import grid_at, jittered_times
from rpo.diffusion.prediction import to_x0_eps
from rpo.randomness import keyed_generator
from rpo.trainers.judging import scaled
from rpo.trainers.moments import (
    batches,
    current_prediction,
    node_time,
    others_mean,
    reference_prediction,
    required_others_mean,
    step_cost,
    transition_of,
)
from rpo.trainers.online import OnlineRun
from rpo.trainers.points import Points, noised_points, per_image
from rpo.trainers.rollouts import JITTER, Rollout
from rpo.trainers.score_as_action_config import ScoreAsActionConfig
from rpo.trainers.value import Critic
from rpo.trainers.value_points import ValuePoints
from rpo.types import Latents, PerSample


@dataclass(frozen=True)
class NoisedJudgement:
    """The trained points of `endpoint`, and what V is to be fitted to."""

    points: Points
    nodes: ValuePoints | None
    """The points as V sees them."""
    returns: PerSample
    """What came of each point: the reward of its image, less what its path costs."""


def judge_noised(
    rollout: Rollout, run: OnlineRun, critic: Critic | None, config: ScoreAsActionConfig
) -> NoisedJudgement:
    """Noise the images of a rollout, and say what every such moment is worth.

    Args:
        rollout: The one in use.
        run: Which has drawn it.
        critic: V, if it is the baseline.
        config: The settings.
    """
    points = _noised(rollout, run, config)
    predictions = _current(points, run) if critic is not None or config.kl_weight > 0 else None
    rewards = rollout.rewards
    if config.kl_weight > 0 or config.bound_clip is not None:
        reference = reference_prediction(run.policy, points, run.guidance_scale, batch_size=run.batch_size)
        points = replace(points, reference=reference)
    if config.bound_clip is not None:
        points = replace(points, reference_kl=_reference_kl(points, run, config))
    if config.kl_weight > 0:
        assert predictions is not None
        rewards = rewards - config.kl_weight * _path_cost(predictions, points, rollout.num_images, run, config)
    returns = rewards[points.image]
    nodes = None
    if critic is None:
        baseline = required_others_mean(rewards, rollout.group)[points.image]
    else:
        assert predictions is not None
        nodes = critic.ask_reward(_seen(predictions, points, rollout, run), batch_size=run.batch_size)
        baseline = critic.evaluate(nodes, batch_size=run.batch_size)
    advantage, scale = scaled((returns - baseline)[None], config)
    points = replace(points, advantage=advantage[0], cost_weight=config.kl_weight / scale[0])
    return NoisedJudgement(points, nodes, returns)


def _noised(rollout: Rollout, run: OnlineRun, config: ScoreAsActionConfig) -> Points:
    model = run.model
    generator = keyed_generator("noise", config.seed, rollout.index, run.processes.index)
    times = jittered_times(model.process, run.settings.rollout.num_steps, generator, jitter=JITTER)
    grid = grid_at(model.process, times, device=model.device)
    return noised_points(
        rollout, grid, run.steps, run.stands_for, prediction_type=model.prediction_type, generator=generator
    )


@torch.no_grad()
def _current(points: Points, run: OnlineRun) -> Latents:
    parts = [current_prediction(run.model, part, run.guidance_scale) for part in batches(points, run.batch_size)]
    return torch.cat(parts)


def _reference_kl(points: Points, run: OnlineRun, config: ScoreAsActionConfig) -> PerSample:
    """KL of what x_0 says of the step from what the reference says."""
    assert points.reference is not None
    kernel = config.rollout_kernel
    posterior = transition_of(run.model, points.prediction, points, kernel)
    return posterior.kl(transition_of(run.model, points.reference, points, kernel))


def _path_cost(
    predictions: Latents, points: Points, num_images: int, run: OnlineRun, config: ScoreAsActionConfig
) -> Tensor:
    """The cost of a path to each image, as its noised points tell it."""
    assert points.reference is not None
    cost = step_cost(run.model, predictions, points.reference, points, config.rollout_kernel)
    return per_image(points.weight * cost / (len(points) / num_images), points, num_images)


def _seen(predictions: Latents, points: Points, rollout: Rollout, run: OnlineRun) -> ValuePoints:
    x0_hat, _ = to_x0_eps(predictions, points.x_t, points.t, run.model.prediction_type)
    baseline = others_mean(rollout.rewards, rollout.group)
    return ValuePoints(
        points.x_t,
        x0_hat,
        node_time(run.model, points.t.timestep.flatten()),
        points.conditioning.prompt_embeds,
        points.prompts,
        baseline=None if baseline is None else baseline[points.image],
    )
