"""Points: the moments of a rollout that are learnt from, laid out flat.

A point is one step of one trajectory: where it was (x_t), where it went (x_s), and what that step is worth. Of an
image's E steps K are trained, each with probability K/E, and the loss of the image is their sum, never their mean:

    loss = mean over images  Σ_k (E/K) loss_k  =  mean over points  E loss_k

so that any cut of the points into equal micro-batches gives the same gradient, and a finer grid does not shrink it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rpo.errors import InputError
from rpo.process.prediction import add_noise, from_x0_eps
from rpo.trainers.online_config import LearningConfig
from rpo.trainers.rollouts.draw import Rollout
from rpo.types import Conditioning, Grid, Node, PerSample, PredictionType


@dataclass(frozen=True)
class Points:
    """A flat batch of trained moments; every tensor but `of_images` has one row per point."""

    x_t: Float[Tensor, "points c h w"]
    x_s: Float[Tensor, "points c h w"]
    t: Node
    s: Node
    of_images: Conditioning
    """One row per image of the rollout: of all its points there is one copy, which `image` points into."""
    prediction: Float[Tensor, "points c h w"]
    """The guided network output in the rollout."""
    log_prob: Float[Tensor, " points"]
    """Of the step under the policy that drew it."""
    weight: Float[Tensor, " points"]
    """What the point's loss counts in a mean over points: E of the formula above."""
    image: Int[Tensor, " points"]
    """Which image of the rollout."""
    step: Int[Tensor, " points"]
    """Which step of its trajectory."""
    names: tuple[str, ...]
    """What a person finds each by."""
    prompts: tuple[str, ...]
    negative: Float[Tensor, "points c h w"] | None = None
    """The output under the negative conditioning in the rollout, where it is not to be differentiated."""
    reference: Float[Tensor, "points c h w"] | None = None
    """The guided output of the reference."""
    reference_kl: Float[Tensor, " points"] | None = None
    """KL of `prediction`'s transition from the reference's, where the policy's own is bounded by it."""
    advantage: Float[Tensor, " points"] | None = None
    cost_weight: Float[Tensor, " points"] | None = None
    """Weight of the point's KL from the reference, in the unit of its advantage."""
    value_gradient: Float[Tensor, "points c h w"] | None = None
    live: Float[Tensor, "points c h w"] | None = None
    """`prediction` with the graph of the rollout."""
    facts: dict[str, Float[Tensor, ""]] | None = None
    """What to log of the rollout: the same for all of its points."""

    def __len__(self) -> int:
        """Number of points."""
        return self.x_t.shape[0]

    @property
    def conditioning(self) -> Conditioning:
        """One row per point."""
        return self.of_images.select(self.image)

    def select(self, index: Int[Tensor, " picked"], *, on_device: Tensor | None = None) -> "Points":
        """Some of the points, in the order asked for; a graph cannot be divided and is left out.

        Args:
            index: Rows, on the CPU: the names are looked up there, and reading them off a device would wait for it.
            on_device: The same on the device, so that many selections need one upload.
        """
        rows = index.to(self.x_t.device) if on_device is None else on_device
        tensors = {name: None if getattr(self, name) is None else getattr(self, name)[rows] for name in _ROWS}
        return replace(
            self,
            t=_node_rows(self.t, rows),
            s=_node_rows(self.s, rows),
            names=tuple(self.names[row] for row in index.tolist()),
            prompts=tuple(self.prompts[row] for row in index.tolist()),
            live=None,
            **tensors,
        )


_ROWS = (
    *("x_t", "x_s", "prediction", "log_prob", "weight", "image", "step"),
    *("negative", "reference", "reference_kl", "advantage", "cost_weight", "value_gradient"),
)
"""The fields of `Points` that are one tensor with a row per point, or nothing."""


def choose_steps(
    grid: Grid, num_images: int, config: LearningConfig, generator: torch.Generator, *, skips_clean_end: bool
) -> tuple[Int[Tensor, "trained images"], float]:
    """Which steps of each trajectory are trained, in order, and what each counts.

    Args:
        config: How many steps and from which part; with `keep_graph` all trajectories share theirs.
        skips_clean_end: Leave out a last step to perfectly clean data, to which DDIM adds no noise.

    Returns:
        Indices of steps, on the CPU, and the number of steps that they stand for, E.
    """
    low, high = config.window or (0.0, 1.0)
    steps = range(grid.num_steps - 1 if skips_clean_end and float(grid.sigma[-1]) == 0 else grid.num_steps)
    eligible = torch.tensor([step for step in steps if low <= step / grid.num_steps < high])
    wanted = config.train_steps or len(eligible)
    if not 1 <= wanted <= len(eligible):
        raise InputError(
            f"learning.train_steps is {config.train_steps}, but a trajectory has {len(eligible)} steps to train "
            f"({grid.num_steps} in all, window {low:g} to {high:g}); train fewer, draw more or widen the window"
        )
    rows = 1 if config.keep_graph else num_images
    draws = (
        torch.rand(rows, len(eligible), generator=generator, dtype=torch.float32, device="cpu")
        .argsort(dim=1)[:, :wanted]
        .sort(dim=1)
        .values
    )
    return eligible[draws.T].expand(-1, num_images), float(len(eligible))


def points_of(rollout: Rollout, steps: Int[Tensor, "trained images"], weight: float, *, is_frozen: bool) -> Points:
    """The chosen moments of a rollout, step by step: first all images at their first trained step.

    Args:
        is_frozen: Whether the negative branch of guidance is taken from the rollout.
    """
    trajectory, grid = rollout.trajectory, rollout.trajectory.grid
    assert trajectory.predictions is not None
    trained, images = steps.shape
    step = steps.flatten().to(trajectory.latents.device)
    image = torch.arange(images, device=step.device).repeat(trained)
    negatives = trajectory.negatives if is_frozen else None
    return Points(
        x_t=trajectory.latents[step, image],
        x_s=trajectory.latents[step + 1, image],
        t=_node_at(grid, step),
        s=_node_at(grid, step + 1),
        of_images=trajectory.conditioning,
        prediction=trajectory.predictions[step, image],
        log_prob=trajectory.log_probs[step, image],
        weight=torch.full((len(step),), weight, device=step.device),
        image=image,
        step=step,
        names=rollout.names * trained,
        prompts=rollout.prompts * trained,
        negative=None if negatives is None else negatives[step, image],
    )


def noised_points(
    rollout: Rollout,
    grid: Grid,
    steps: Int[Tensor, "trained images"],
    weight: float,
    *,
    prediction_type: PredictionType,
    generators: Sequence[torch.Generator],
) -> Points:
    """Moments that lead to the images of a rollout though no rollout passed through them: x_0 noised afresh.

    Their `prediction` is that of a network that knows x_0: its transition is the forward process's q(x_s | x_t, x_0).

    Args:
        grid: Where on the process, from noise to data; need not be the rollout's.
    """
    x_0 = rollout.trajectory.x_0
    trained, images = steps.shape
    step = steps.flatten().to(x_0.device)
    image = torch.arange(images, device=step.device).repeat(trained)
    t, s = _node_at(grid, step), _node_at(grid, step + 1)
    noise = [
        torch.randn(trained, *x_0.shape[1:], generator=one, dtype=torch.float32, device="cpu") for one in generators
    ]
    eps = torch.stack(noise, dim=1).flatten(0, 1).to(x_0)
    return Points(
        x_t=add_noise(x_0[image], eps, t),
        x_s=add_noise(x_0[image], eps, s),
        t=t,
        s=s,
        of_images=rollout.trajectory.conditioning,
        prediction=from_x0_eps(x_0[image], eps, t, prediction_type),
        log_prob=torch.full((len(step),), torch.nan, device=step.device),
        weight=torch.full((len(step),), weight, device=step.device),
        image=image,
        step=step,
        names=rollout.names * trained,
        prompts=rollout.prompts * trained,
    )


def _node_at(grid: Grid, index: Int[Tensor, " points"]) -> Node:
    rows = (slice(None), None, None, None)
    return Node(grid.alpha[index][rows], grid.sigma[index][rows], grid.timestep[index][rows])


def _node_rows(node: Node, index: Int[Tensor, " picked"]) -> Node:
    return Node(node.alpha[index], node.sigma[index], node.timestep[index])


def per_image(values: Float[Tensor, " points"], points: Points, num_images: int) -> PerSample:
    """Sum a quantity over the points of each image."""
    return values.new_zeros(num_images).index_add(0, points.image, values)
