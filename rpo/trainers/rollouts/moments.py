"""What a policy, its reference and its value say about the moments of a rollout.

Everything a trainer asks of the denoiser outside `sample` is asked here, in calls of as many latents as fit: cost is
counted in forwards of one latent, and a call of several time points is cheaper than one call for each.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.process.continuous import running_cost
from rpo.process.prediction import to_x0_eps
from rpo.process.transition import Gaussian, Kernel
from rpo.sampling.sample import predict_at
from rpo.trainers.policy import Policy
from rpo.trainers.rollouts.draw import Rollout
from rpo.trainers.rollouts.points import Points, points_of
from rpo.trainers.value.estimator import Value
from rpo.trainers.value.inputs import ValuePoints
from rpo.training.processes import Processes
from rpo.types import Latents, PerSample

KL_STRIDE = 8
"""Of so many moments one is asked for its KL, where the KL is only logged."""


def transition_of(model: DiffusionModel, noise_pred: Latents, points: Points, kernel: Kernel) -> Gaussian:
    """p(x_s | x_t) of every point, for a guided network output at it."""
    x0_hat, eps_hat = to_x0_eps(noise_pred, points.x_t, points.t, model.prediction_type)
    return kernel(x0_hat, eps_hat, points.t, points.s)


def current_prediction(model: DiffusionModel, points: Points, guidance_scale: float) -> Latents:
    """The guided output of the policy as it is now, with its gradient; the rollout's own where its graph was kept."""
    if points.live is not None:
        return points.live
    return predict_at(
        model,
        points.x_t,
        points.t,
        points.conditioning,
        guidance_scale=guidance_scale,
        negative_pred=points.negative,
    )


def reference_prediction(policy: Policy, points: Points, guidance_scale: float, *, batch_size: int) -> Latents:
    """The guided output of the reference at every point."""
    with policy.reference():
        parts = [
            predict_at(policy.model, part.x_t, part.t, part.conditioning, guidance_scale=guidance_scale)
            for part in batches(points, batch_size)
        ]
    return torch.cat(parts)


def step_cost(
    model: DiffusionModel, noise_pred: Latents, reference_pred: Latents, points: Points, kernel: Kernel
) -> PerSample:
    """½∫|u|² of every point's step: the KL of its transition, or for a step without density its running cost.

    An ODE has no KL along its path; what is charged then is the cost of the same change of score at noise level 1.
    """
    if kernel.has_density:
        policy = transition_of(model, noise_pred, points, kernel)
        return policy.kl(transition_of(model, reference_pred, points, kernel))
    _, eps_hat = to_x0_eps(noise_pred, points.x_t, points.t, model.prediction_type)
    _, eps_reference = to_x0_eps(reference_pred, points.x_t, points.t, model.prediction_type)
    return running_cost(eps_hat, eps_reference, points.t, points.s, eta=0.0)


def measured_kl(
    policy: Policy, rollout: Rollout, kernel: Kernel, guidance_scale: float, *, batch_size: int, processes: Processes
) -> Tensor:
    """KL of the path from the reference's, from every eighth of all its moments: watching costs little.

    Args:
        processes: Which have drawn the rollout together; the mean of what they return is the KL.
    """
    num_steps, images = rollout.trajectory.log_probs.shape
    everyone = num_steps * images * processes.count
    stride = min(KL_STRIDE, everyone)
    is_asked = torch.arange(everyone).view(num_steps, -1) % stride == rollout.index % stride
    every = points_of(rollout, torch.arange(num_steps)[:, None].expand(-1, images), 1.0, is_frozen=False)
    rows = processes.own(is_asked, dim=1).flatten().nonzero().flatten()
    if not len(rows):
        return every.x_t.new_zeros(())
    some = every.select(rows)
    reference = reference_prediction(policy, some, guidance_scale, batch_size=batch_size)
    cost = step_cost(policy.model, some.prediction, reference, some, kernel)
    return num_steps * processes.count * torch.where(cost.isfinite(), cost, 0.0).sum() / int(is_asked.sum())


def value_nodes(model: DiffusionModel, rollout: Rollout, nodes: Sequence[int]) -> ValuePoints:
    """Some nodes of a rollout as the value network sees them, node by node; at the data end x0_hat is the image."""
    trajectory = rollout.trajectory
    grid, latents, predictions = trajectory.grid, trajectory.latents, trajectory.predictions
    assert predictions is not None
    end = grid.num_steps
    x0_hats = [
        latents[end]
        if node == end
        else to_x0_eps(predictions[node], latents[node], grid[node], model.prediction_type)[0]
        for node in nodes
    ]
    # Some checkpoints end where the network would still be told a timestep.
    times = [0.0 * grid.timestep[0] if node == end else node_time(model, grid.timestep[node]) for node in nodes]
    baseline = others_mean(rollout.rewards, rollout.group)
    return ValuePoints(
        x_t=latents[list(nodes)].flatten(0, 1),
        x0_hat=torch.cat(x0_hats),
        time=torch.stack([time.float() for time in times]).repeat_interleave(rollout.num_images),
        tokens=trajectory.conditioning.tokens.repeat(len(nodes), 1, 1),
        prompts=rollout.prompts * len(nodes),
        baseline=None if baseline is None else baseline.repeat(len(nodes)),
    )


def others_mean(rewards: PerSample, group: Int[Tensor, " batch"]) -> PerSample | None:
    """For each image the mean reward of the other images of its prompt; nothing if an image is alone."""
    sizes = group.bincount()
    if bool((sizes[group] == 1).any()):
        return None
    sums = rewards.new_zeros(len(sizes)).index_add(0, group, rewards)
    return (sums[group] - rewards) / (sizes[group] - 1)


def required_others_mean(rewards: PerSample, group: Int[Tensor, " batch"]) -> PerSample:
    """The same where every image must have others to be compared with."""
    others = others_mean(rewards, group)
    if others is None:
        raise InputError(
            'advantage is "group" with one image per prompt, but a group is the images of one prompt; give '
            "rollout.images_per_prompt of 2 or more, or another advantage"
        )
    return others


def node_time(model: DiffusionModel, timestep: Tensor) -> Tensor:
    """Time in [0, 1] of what the network is told, 0 at the data end."""
    return timestep.float() / model.num_train_timesteps


def value_gradient(
    model: DiffusionModel,
    value: Value,
    rollout: Rollout,
    points: Points,
    *,
    guidance_scale: float,
    through_denoiser: bool,
    batch_size: int,
) -> Float[Tensor, "points c h w"]:
    """Gradient of V with respect to x_s, where each point's step led.

    Args:
        through_denoiser: Whether x0_hat(x_s) is followed back through the network; otherwise its noise is held fixed.
    """
    trajectory = rollout.trajectory
    assert trajectory.predictions is not None
    baseline = others_mean(rollout.rewards, rollout.group)
    gradients = []
    for part in batches(points, batch_size):
        x_s = part.x_s.detach().requires_grad_()
        is_data = part.step == trajectory.grid.num_steps - 1
        with torch.enable_grad():
            if through_denoiser:
                noise_pred = predict_at(model, x_s, part.s, part.conditioning, guidance_scale=guidance_scale)
            else:
                following = (part.step + 1).clamp(max=trajectory.grid.num_steps - 1)
                noise_pred = trajectory.predictions[following, part.image]
            x0_hat, _ = to_x0_eps(noise_pred, x_s, part.s, model.prediction_type)
            x0_hat = torch.where(is_data[:, None, None, None], x_s, x0_hat)
            time = torch.where(is_data, 0.0, node_time(model, part.s.timestep.flatten()))
            others = None if baseline is None else baseline[part.image]
            seen = ValuePoints(x_s, x0_hat, time, part.conditioning.tokens, part.prompts, baseline=others)
            (gradient,) = torch.autograd.grad(value(seen).sum(), x_s)
        gradients.append(gradient)
    return torch.cat(gradients)


def batches(points: Points, size: int) -> Iterator[Points]:
    """The points in order, so many at once."""
    for rows in torch.arange(len(points)).split(size):
        yield points.select(rows)
