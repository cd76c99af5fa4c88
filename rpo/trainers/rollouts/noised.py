"""What the images of a rollout are worth at moments that no rollout passed through: `endpoint`'s part of the judging.

Every image is noised afresh, to times anywhere on the process, and each such moment gets an advantage of its own:

    A(t, x_t) = r(x_0) - baseline,      baseline = what the other images of the prompt earned, or V(t, x_t)

V has the smaller variance. Close to the data x_t shows how it will end, so V takes away nearly all of what r - m says
there, which is noise: the step could not change it. And since E[A | x_t] = 0 with the right V, images that turned out
badly do not push the policy away from everything that looked like them. On `shapes` the two trained equally well: most
of what V explains lies where nothing is left to decide.

With a KL weight the reward of an image loses kl_weight log p(x_0) / p_reference(x_0). Of both only bounds are known,
which miss the same where policy and reference reverse the noising process: their difference is the log-ratio.

    log p(x_0) / p_reference(x_0) = Σ_k KL(q ‖ p_reference) - KL(q ‖ p),    q = q(x_s | x_t, x_0)

The mean of this over the policy's images is the KL of the path. The KL of the steps at noised moments has that mean,
too, and is no function of x_0 alone: to weigh the gradient of an image with it optimises something else. The moments
that tell the log-ratio are not the trained ones, whose noise would be in both factors of that product.
"""

from dataclasses import dataclass, replace

import torch

from rpo.process.continuous import grid_at, jittered_times
from rpo.process.prediction import to_x0_eps
from rpo.randomness import keyed_generator
from rpo.trainers.online import OnlineRun
from rpo.trainers.rollouts.draw import JITTER, Rollout
from rpo.trainers.rollouts.judging import scaled
from rpo.trainers.rollouts.moments import (
    batches,
    current_prediction,
    node_time,
    others_mean,
    reference_prediction,
    required_others_mean,
    transition_of,
)
from rpo.trainers.rollouts.points import Points, noised_points, per_image
from rpo.trainers.score_as_action_config import ScoreAsActionConfig
from rpo.trainers.value.estimator import Critic
from rpo.trainers.value.inputs import ValuePoints
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
    """Noise the images of a rollout, and say what every such moment is worth."""
    points = _noised(rollout, run, config, "trained")
    if run.freezes_negative:
        points = replace(points, negative=_negative(points, run))
    if config.bound_clip is not None:
        points = replace(points, reference_kl=_kl(_reference(points, run), points, run, config))
    rewards = rollout.rewards
    if config.kl_weight > 0:
        rewards = rewards - config.kl_weight * _log_ratio(rollout, run, config)
    returns = rewards[points.image]
    nodes = None
    if critic is None:
        baseline = required_others_mean(rewards, rollout.group)[points.image]
    else:
        nodes = critic.ask_reward(_seen(_current(points, run), points, rollout, run), batch_size=run.batch_size)
        baseline = critic.evaluate(nodes, batch_size=run.batch_size)
    advantage, scale = scaled((returns - baseline)[None], config, run.processes)
    points = replace(points, advantage=advantage[0], cost_weight=config.kl_weight / scale[0])
    return NoisedJudgement(points, nodes, returns)


def _noised(rollout: Rollout, run: OnlineRun, config: ScoreAsActionConfig, use: str) -> Points:
    model = run.model
    moved = keyed_generator("times", use, config.seed, rollout.index)
    times = jittered_times(model.process, run.settings.rollout.num_steps, moved, jitter=JITTER)
    grid = grid_at(model.process, times, device=model.device)
    noise = [keyed_generator("noise", use, config.seed, *visit) for visit in rollout.visits]
    return noised_points(
        rollout, grid, run.steps, run.stands_for, prediction_type=model.prediction_type, generators=noise
    )


@torch.no_grad()
def _current(points: Points, run: OnlineRun) -> Latents:
    parts = [current_prediction(run.model, part, run.guidance_scale) for part in batches(points, run.batch_size)]
    return torch.cat(parts)


@torch.no_grad()
def _negative(points: Points, run: OnlineRun) -> Latents:
    """The output under the negative conditioning, which no rollout has at these moments."""
    parts = batches(points, run.batch_size)
    return torch.cat(
        [run.model.predict(one.x_t, one.t.timestep.flatten(), one.conditioning.only_negative(), 1.0) for one in parts]
    )


def _reference(points: Points, run: OnlineRun) -> Latents:
    return reference_prediction(run.policy, points, run.guidance_scale, batch_size=run.batch_size)


def _kl(prediction: Latents, points: Points, run: OnlineRun, config: ScoreAsActionConfig) -> PerSample:
    """KL of what x_0 says of the step from what a prediction says: a term of the bound on -log p(x_0)."""
    kernel = config.rollout_kernel
    posterior = transition_of(run.model, points.prediction, points, kernel)
    return posterior.kl(transition_of(run.model, prediction, points, kernel))


def _log_ratio(rollout: Rollout, run: OnlineRun, config: ScoreAsActionConfig) -> PerSample:
    """The log-ratio log p(x_0) / p_reference(x_0) of every image: by how much the policy's bound is the better one."""
    points = _noised(rollout, run, config, "log-ratio")
    gap = _kl(_reference(points, run), points, run, config) - _kl(_current(points, run), points, run, config)
    return per_image(points.weight * gap / len(run.steps), points, rollout.num_images)


def _seen(predictions: Latents, points: Points, rollout: Rollout, run: OnlineRun) -> ValuePoints:
    x0_hat, _ = to_x0_eps(predictions, points.x_t, points.t, run.model.prediction_type)
    baseline = others_mean(rollout.rewards, rollout.group)
    return ValuePoints(
        points.x_t,
        x0_hat,
        node_time(run.model, points.t.timestep.flatten()),
        points.conditioning.tokens,
        points.prompts,
        baseline=None if baseline is None else baseline[points.image],
    )
