"""What a value sees of a moment of a rollout, and how much of what it says is the reward of the predicted image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.models.latents import followed
from rpo.process.prediction import to_x0_eps
from rpo.sampling.step import predict
from rpo.trainers.rollouts.draw import Rollout
from rpo.trainers.rollouts.steps import Steps
from rpo.types import PerSample

TIME_BINS = (
    "value/explained_variance_1",
    "value/explained_variance_2",
    "value/explained_variance_3",
    "value/explained_variance_4",
)
"""Equal parts of the process in which the quality of V is told apart, from the data end on."""


@dataclass(frozen=True)
class ValuePoints:
    """Moments of rollouts as a value sees them; every row is one."""

    x_t: Float[Tensor, "points c h w"]
    x0_hat: Float[Tensor, "points c h w"]
    """The predicted clean latents; at the data end the clean latents themselves."""
    time: Float[Tensor, " points"]
    """1 at the noise end … 0 at the data end."""
    tokens: Float[Tensor, "points tokens dim"]
    prompts: tuple[str, ...]
    x0_reward: Float[Tensor, " points"] | None = None
    """What the reward says of `x0_hat`, where it has been asked already; see `ValueEstimator.ask_reward`. NaN where it
    could not judge it."""
    baseline: Float[Tensor, " points"] | None = None
    """What the other images of the prompt earned in the same rollout, where there are others; NaN is as nothing."""

    def __len__(self) -> int:
        """Number of points."""
        return self.x_t.shape[0]

    def select(self, index: Int[Tensor, " picked"]) -> "ValuePoints":
        """Some of the points, in the order asked for.

        Args:
            index: Rows, on the CPU: the prompts are looked up there, and reading them off a device would wait for it.
        """
        rows = index.to(self.x_t.device)
        return ValuePoints(
            self.x_t[rows],
            self.x0_hat[rows],
            self.time[rows],
            self.tokens[rows],
            tuple(self.prompts[row] for row in index.tolist()),
            None if self.x0_reward is None else self.x0_reward[rows],
            None if self.baseline is None else self.baseline[rows],
        )


def skip_weights(time: Float[Tensor, " points"]) -> tuple[PerSample, PerSample]:
    """(c_skip, c_out): the weights of the reward of x0_hat and of the learnt part, as the authors chose them.

    They go from (1, 0) at the data end to (0, 1) at the noise end.
    """
    return torch.cos(0.5 * math.pi * time), torch.sin(0.5 * math.pi * time)


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
    """For each image the mean reward of the other images of its prompt; nothing if an image is alone.

    A reward that is NaN is in no mean; NaN is the mean of none.
    """
    sizes = group.bincount()
    if bool((sizes[group] == 1).any()):
        return None
    is_judged = ~rewards.isnan()
    known, ones = torch.where(is_judged, rewards, 0.0), is_judged.to(rewards)
    sums, counts = (rewards.new_zeros(len(sizes)).index_add(0, group, each)[group] - each for each in (known, ones))
    return sums / counts


def compared_with_others(rewards: PerSample, group: Int[Tensor, " batch"]) -> PerSample:
    """The same where every image must have others to be compared with; itself where none of these was judged."""
    others = others_mean(rewards, group)
    if others is None:
        raise InputError(
            "images are compared with the others of their prompt, but there is one image per prompt; give "
            "rollout.images_per_prompt of 2 or more, or another baseline"
        )
    return torch.where(others.isnan(), rewards, others)


def node_time(model: DiffusionModel, timestep: Tensor) -> Tensor:
    """Time in [0, 1] of what the network is told, 0 at the data end."""
    return timestep.float() / model.num_train_timesteps


def value_gradient(
    model: DiffusionModel,
    value: Callable[[ValuePoints], PerSample],
    rollout: Rollout,
    steps: Steps,
    *,
    guidance_scale: float,
    batch_size: int,
) -> Float[Tensor, "steps c h w"]:
    """Gradient of V with respect to x_s, where each step led; x0_hat(x_s) is followed back through the denoiser.

    It is 0 for images that could not be judged.
    """
    trajectory = rollout.trajectory
    baseline = others_mean(rollout.rewards, rollout.group)
    gradients = []
    for part in steps.batches(batch_size):
        x_s = part.x_s.detach().requires_grad_()
        is_data = part.step == trajectory.grid.num_steps - 1
        with torch.enable_grad(), followed(model):
            noise_pred = predict(model, x_s, part.s, part.conditioning, guidance_scale=guidance_scale)
            x0_hat, _ = to_x0_eps(noise_pred, x_s, part.s, model.prediction_type)
            x0_hat = torch.where(is_data[:, None, None, None], x_s, x0_hat)
            time = torch.where(is_data, 0.0, node_time(model, part.s.timestep.flatten()))
            others = None if baseline is None else baseline[part.image]
            seen = ValuePoints(x_s, x0_hat, time, part.conditioning.tokens, part.prompts, baseline=others)
            (gradient,) = torch.autograd.grad(value(seen).sum(), x_s)
        gradients.append(gradient)
    return torch.where(rollout.judged[steps.image][:, None, None, None], torch.cat(gradients), 0.0)
