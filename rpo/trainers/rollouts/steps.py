"""The steps of rollouts that are learnt from, laid out flat.

Each was at x_t and went to x_s. Of an image's E steps K are trained, each with probability K/E, and the loss of the
image is their sum, never their mean:

    loss = mean over images  Σ_k (E/K) loss_k  =  mean over steps  E loss_k

so that any cut of the steps into equal micro-batches gives the same gradient, and a finer grid does not shrink it. The
images are those that were judged: steps of the others count 0, and the rest so much more.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rpo.devices import uploaded
from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.process.diffusion import diffusion_of
from rpo.process.transition import Kernel, Transition
from rpo.sampling.step import predict, transition
from rpo.trainers.rollouts.draw import Rollout
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.types import Conditioning, Grid, Node, Output, PerSample, PredictionType, StepOutput


@dataclass(frozen=True)
class Steps:
    """A flat batch of steps; every tensor but `of_images` has one row per step."""

    x_t: Float[Tensor, "steps c h w"]
    x_s: Float[Tensor, "steps c h w"]
    t: Node
    s: Node
    of_images: Conditioning
    """One row per image of the rollout: of all its steps there is one copy, which `image` points into."""
    image: Int[Tensor, " steps"]
    """Which image of the rollout."""
    step: Int[Tensor, " steps"]
    """Which step of its trajectory."""
    weight: Float[Tensor, " steps"]
    """What the step's loss counts in a mean over steps: E of the formula above."""
    counts: Float[Tensor, " steps"]
    """What its image counts in a mean over images: 1, if all could be judged; see `rpo.trainers.rollouts.failed`."""
    names: tuple[str, ...]
    """What a person finds each by."""
    prompts: tuple[str, ...]
    known: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What is known of each step by name, one row per step: what the rollout and the algorithm have found out, such as
    "prediction" (the guided output that drew it), "log_prob" (under the policy that drew it), "advantage"."""
    facts: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict[str, Tensor])
    """What to log of the rollout: the same for all of its steps."""
    live: Float[Tensor, "steps _ h w"] | None = None
    """The prediction with the graph of the rollout, where that was kept."""

    def __len__(self) -> int:
        """Number of steps."""
        return self.x_t.shape[0]

    def __getitem__(self, name: str) -> Tensor:
        """What is known under a name."""
        return self.known[name]

    def __contains__(self, name: str) -> bool:
        """Whether something is known under a name."""
        return name in self.known

    def knowing(self, **known: Tensor) -> "Steps":
        """The same steps, of which more is known."""
        return replace(self, known={**self.known, **known})

    @property
    def conditioning(self) -> Conditioning:
        """One row per step."""
        return self.of_images.select(self.image)

    def select(self, index: Int[Tensor, " picked"], *, on_device: Tensor | None = None) -> "Steps":
        """Some of the steps, in the order asked for; a graph cannot be divided and is left out.

        Args:
            index: Rows, on the CPU: the names are looked up there, and reading them off a device would wait for it.
            on_device: The same on the device, so that many selections need one upload.
        """
        rows = uploaded(index, self.x_t.device) if on_device is None else on_device
        return replace(
            self,
            x_t=self.x_t[rows],
            x_s=self.x_s[rows],
            t=_node_rows(self.t, rows),
            s=_node_rows(self.s, rows),
            image=self.image[rows],
            step=self.step[rows],
            weight=self.weight[rows],
            counts=self.counts[rows],
            names=tuple(self.names[row] for row in index.tolist()),
            prompts=tuple(self.prompts[row] for row in index.tolist()),
            known={name: value[rows] for name, value in self.known.items()},
            live=None,
        )

    def batches(self, size: int) -> Iterator["Steps"]:
        """The steps in order, so many at once."""
        for rows in torch.arange(len(self)).split(size):
            yield self.select(rows)

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain data and tensors."""
        found = {name: value for name, value in vars(self).items() if name != "live"}
        nodes = {name: vars(self.t if name == "t" else self.s) for name in ("t", "s")}
        texts = {"names": list(self.names), "prompts": list(map(str, self.prompts))}
        return {**found, **nodes, **texts, "of_images": vars(self.of_images)}

    @classmethod
    def of_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> "Steps":
        """What `state_dict` gave, on the device that trains: what was read from a file is on the CPU."""
        state = tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(state))
        nodes = {name: Node(**state[name]) for name in ("t", "s")}
        texts = {name: tuple(state[name]) for name in ("names", "prompts")}
        return cls(**{**state, **nodes, **texts, "of_images": Conditioning(**state["of_images"])})


def replayed(
    model: DiffusionModel, steps: Steps, kernel: Kernel, *, guidance_scale: float
) -> tuple[Output, Transition]:
    """The guided output of the policy as it is now and the transition it gives, with their gradient.

    It is the sampler's own step: with unchanged weights, and batches of the size that was drawn in, the log-density at
    `x_s` is the recorded one exactly.
    """
    noise_pred = steps.live
    if noise_pred is None:
        noise_pred = predict(
            model,
            steps.x_t,
            steps.t,
            steps.conditioning,
            guidance_scale=guidance_scale,
            negative_pred=steps.known.get("negative"),
        )
    return noise_pred, transition_by(model, noise_pred, steps, kernel)


def transition_by(model: DiffusionModel, noise_pred: Output, steps: Steps, kernel: Kernel) -> Transition:
    """p(x_s | x_t) of every step by a guided network output at it."""
    return transition(model, noise_pred, steps.x_t, steps.t, steps.s, kernel)


def mean_loss(per_step: PerSample, steps: Steps, facts: dict[str, Tensor]) -> StepOutput:
    """The loss of a micro-batch, to which only the steps of judged images contribute.

    Args:
        per_step: Of every step, finite, with what it counts besides.
        facts: What to log.
    """
    counted = steps.counts * per_step
    return StepOutput(counted.mean(), counted.detach(), facts)


def choose_steps(
    grid: Grid,
    num_images: int,
    config: StepsConfig,
    generator: torch.Generator,
    *,
    skips_clean_end: bool,
    skips_last: bool = False,
) -> tuple[Int[Tensor, "trained images"], float]:
    """Which steps of each trajectory are trained, in order, and what each counts.

    Args:
        config: How many steps and from which part; with `keep_graph` all trajectories share theirs.
        skips_clean_end: Leave out a last step to perfectly clean data, to which DDIM adds no noise.
        skips_last: Leave out the last step wherever it leads.

    Returns:
        Indices of steps, on the CPU, and the number of steps that they stand for, E.
    """
    low, high = config.window or (0.0, 1.0)
    skips_end = skips_last or (skips_clean_end and float(grid.sigma[-1]) == 0)
    steps = range(grid.num_steps - 1 if skips_end else grid.num_steps)
    eligible = torch.tensor([step for step in steps if low <= step / grid.num_steps < high])
    wanted = config.train_steps or len(eligible)
    if not 1 <= wanted <= len(eligible):
        raise InputError(
            f"steps.train_steps is {config.train_steps}, but a trajectory has {len(eligible)} steps to train "
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


def steps_of(rollout: Rollout, steps: Int[Tensor, "trained images"], weight: float, *, is_frozen: bool) -> Steps:
    """The chosen steps of a rollout, in order: first all images at their first trained step.

    Args:
        is_frozen: Whether the negative branch of guidance is taken from the rollout.
    """
    trajectory, grid = rollout.trajectory, rollout.trajectory.grid
    assert trajectory.predictions is not None
    trained, images = steps.shape
    step = uploaded(steps.flatten(), trajectory.latents.device)
    image = torch.arange(images, device=step.device).repeat(trained)
    known = {"prediction": trajectory.predictions[step, image], "log_prob": trajectory.log_probs[step, image]}
    if is_frozen and trajectory.negatives is not None:
        known["negative"] = trajectory.negatives[step, image]
    return Steps(
        x_t=trajectory.latents[step, image],
        x_s=trajectory.latents[step + 1, image],
        t=_node_at(grid, step),
        s=_node_at(grid, step + 1),
        of_images=trajectory.conditioning,
        image=image,
        step=step,
        weight=torch.full((len(step),), weight, device=step.device),
        counts=rollout.counts.to(step.device)[image],
        names=rollout.names * trained,
        prompts=rollout.prompts * trained,
        known=known,
    )


def all_steps_of(rollout: Rollout) -> Steps:
    """Every step of a rollout, step by step."""
    num_steps, images = rollout.trajectory.log_probs.shape
    return steps_of(rollout, torch.arange(num_steps)[:, None].expand(-1, images), 1.0, is_frozen=False)


def noised_steps(
    rollout: Rollout,
    grid: Grid,
    steps: Int[Tensor, "trained images"],
    weight: float,
    *,
    prediction_type: PredictionType,
    generators: Sequence[torch.Generator],
) -> Steps:
    """Steps that lead to the images of a rollout though no rollout took them: x_0 noised afresh.

    Their "prediction" is that of a network that knows x_0: its transition is the forward process's q(x_s | x_t, x_0).

    Args:
        grid: Where on the process, from noise to data; need not be the rollout's.
    """
    x_0 = rollout.trajectory.x_0
    diffusion, (trained, images) = diffusion_of(prediction_type), steps.shape
    step = uploaded(steps.flatten(), x_0.device)
    image = torch.arange(images, device=step.device).repeat(trained)
    t, s = _node_at(grid, step), _node_at(grid, step + 1)
    noise = [
        torch.randn(trained, *x_0.shape[1:], generator=one, dtype=torch.float32, device="cpu") for one in generators
    ]
    eps = uploaded(torch.stack(noise, dim=1).flatten(0, 1), x_0.device)
    return Steps(
        x_t=diffusion.noised(x_0[image], eps, t),
        x_s=diffusion.noised(x_0[image], eps, s),
        t=t,
        s=s,
        of_images=rollout.trajectory.conditioning,
        image=image,
        step=step,
        weight=torch.full((len(step),), weight, device=step.device),
        counts=rollout.counts.to(step.device)[image],
        names=rollout.names * trained,
        prompts=rollout.prompts * trained,
        known={"prediction": diffusion.target(x_0[image], eps, t)},
    )


def _node_at(grid: Grid, index: Int[Tensor, " steps"]) -> Node:
    rows = (slice(None), None, None, None)
    return Node(grid.alpha[index][rows], grid.sigma[index][rows], grid.timestep[index][rows])


def _node_rows(node: Node, index: Int[Tensor, " picked"]) -> Node:
    return Node(node.alpha[index], node.sigma[index], node.timestep[index])


def per_image(values: Float[Tensor, " steps"], steps: Steps, num_images: int) -> PerSample:
    """Sum a quantity over the steps of each image."""
    return values.new_zeros(num_images).index_add(0, steps.image, values)
