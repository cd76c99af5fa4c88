"""How far the policy of a rollout is from the reference: at its steps, and along its path."""

import torch
from torch import Tensor

from rpo.devices import uploaded
from rpo.models.base import DiffusionModel
from rpo.process.diffusion import diffusion_of
from rpo.process.transition import Kernel
from rpo.sampling.step import predict
from rpo.trainers.policy import Policy
from rpo.trainers.rollouts.draw import Rollout
from rpo.trainers.rollouts.steps import Steps, all_steps_of, transition_by
from rpo.training.processes import Processes
from rpo.types import Output, PerSample

KL_STRIDE = 8
"""Of so many steps one is asked for its KL, where the KL is only logged."""


def reference_prediction(policy: Policy, steps: Steps, *, guidance_scale: float, batch_size: int) -> Output:
    """The guided output of the reference at every step."""
    with policy.reference():
        parts = [
            predict(policy.model, part.x_t, part.t, part.conditioning, guidance_scale=guidance_scale)
            for part in steps.batches(batch_size)
        ]
    return torch.cat(parts)


def step_cost(
    model: DiffusionModel, noise_pred: Output, reference_pred: Output, steps: Steps, kernel: Kernel
) -> PerSample:
    """½∫|u|² of every step: the KL of its transition, or for a step without density its running cost."""
    if kernel.has_density:
        policy = transition_by(model, noise_pred, steps, kernel)
        return policy.kl(transition_by(model, reference_pred, steps, kernel))
    return diffusion_of(model.prediction_type).running_cost(noise_pred, reference_pred, steps.x_t, steps.t, steps.s)


def measured_kl(
    policy: Policy, rollout: Rollout, kernel: Kernel, *, guidance_scale: float, batch_size: int, processes: Processes
) -> Tensor:
    """KL of the path from the reference's, from every eighth of all its steps: watching costs little.

    Args:
        processes: Which have drawn the rollout together; the mean of what they return is the KL.
    """
    num_steps, images = rollout.trajectory.log_probs.shape
    everyone = num_steps * images * processes.count
    stride = min(KL_STRIDE, everyone)
    is_asked = torch.arange(everyone).view(num_steps, -1) % stride == rollout.index % stride
    every = all_steps_of(rollout)
    own = processes.own(is_asked, dim=1).flatten()
    # Every process asks as often, the last steps of those with fewer for nothing, so that none waits for a forward.
    most = int(torch.stack([part.sum() for part in is_asked.chunk(processes.count, dim=1)]).max())
    rows = (~own).int().argsort(stable=True)[:most]
    some = every.select(rows)
    reference = reference_prediction(policy, some, guidance_scale=guidance_scale, batch_size=batch_size)
    cost = step_cost(policy.model, some["prediction"], reference, some, kernel)
    counts = cost.isfinite() & uploaded(own[rows], cost.device)
    return num_steps * processes.count * torch.where(counts, cost, 0.0).sum() / int(is_asked.sum())
