"""What a sampler does to a Gaussian, by drawing from it and by exact propagation of its moments.

With Gaussian data and an affine correction every kernel's step is affine in x_t, so two points show all of it, and the
moments of a chain of any number of steps are exact: what `draw` estimates through the package's sampler.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpo.process.continuous import running_cost
from rpo.process.prediction import to_x0_eps
from rpo.process.schedule import Process
from rpo.process.transition import Gaussian, Kernel
from rpo.sampling.sample import sample
from rpo.types import Grid, Latents, Node
from tests.analytic.toys import ToyModel


@dataclass(frozen=True)
class StartAt:
    """A kernel for `grid_from`: draws the first state from N(mean, variance) instead of unit noise, then steps."""

    kernel: Kernel
    mean: float
    variance: float

    @property
    def has_density(self) -> bool:
        return self.kernel.has_density

    def __call__(self, x0_hat: Latents, eps_hat: Latents, t: Node, s: Node) -> Gaussian:
        if t.alpha > 0:
            return self.kernel(x0_hat, eps_hat, t, s)
        return Gaussian(torch.full_like(x0_hat, self.mean), torch.tensor(self.variance, dtype=x0_hat.dtype).sqrt())


def grid_from(grid: Grid) -> Grid:
    """The grid with a node of pure noise before it, from which `StartAt` jumps to where sampling starts."""
    first = grid.alpha.new_tensor([0.0]), grid.alpha.new_tensor([1.0]), grid.timestep[:1]
    return Grid(*(torch.cat(pair) for pair in zip(first, vars(grid).values(), strict=True)))


def even_times(
    process: Process, num_steps: int, clock: Callable[[Tensor, Tensor], Tensor], *, last: float, start: float
) -> Tensor:
    """Times from `start` to data, of which all but the data end are even in clock(alpha, sigma) up to `last`."""
    ends = torch.tensor([start, process.end], dtype=torch.float64)
    first = clock(process.alpha(ends[:1]), process.sigma(ends[:1])).item()
    wanted = torch.linspace(first, last, num_steps, dtype=torch.float64)[1:]
    low, high = ends[1].expand_as(wanted).clone(), ends[0].expand_as(wanted).clone()
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        is_before = clock(process.alpha(middle), process.sigma(middle)) < wanted
        low, high = torch.where(is_before, low, middle), torch.where(is_before, middle, high)
    return torch.cat([ends[:1], high, ends[1:]])


def snr_times(process: Process, num_steps: int, *, last: float = 6.0, start: float | None = None) -> Tensor:
    """Times even in log(alpha/sigma): fine near both ends."""
    start = process.start if start is None else start
    return even_times(process, num_steps, lambda alpha, sigma: (alpha / sigma).log(), last=last, start=start)


def angle_times(process: Process, num_steps: int) -> Tensor:
    """Times even in the angle between noise and data: fine where the two mix."""
    last = math.pi / 2 * (1 - 1 / num_steps)
    return even_times(process, num_steps, torch.atan2, last=last, start=process.start)


def draw(
    model: ToyModel,
    grid: Grid,
    kernel: Kernel,
    *,
    count: int,
    nodes: Sequence[int] = (),
    seed: int = 0,
    width: int = 20_000,
) -> list[Tensor]:
    """x at some nodes and at the data end, `count` samples each in float64, through the package's sampler."""
    wide = ToyModel(
        model.prior,
        model.process,
        model.denoiser.correction,
        model.prediction_type,
        latent_shape=(1, 1, width),
    )
    cond = wide.encode_prompts([""])
    kept = []
    for chunk in range(math.ceil(count / width)):
        generator = torch.Generator().manual_seed(1000 * seed + chunk)
        trajectory = sample(wide, cond, grid, kernel, guidance_scale=1.0, generators=[generator])
        kept.append(torch.stack([trajectory.latents[node].flatten().double() for node in (*nodes, -1)]))
    return list(torch.cat(kept, dim=1)[:, :count])


@dataclass(frozen=True)
class Chain:
    """x_s = offset + slope x_t + std noise for every step, and the moments of every node."""

    slope: Tensor
    offset: Tensor
    std: Tensor
    mean: Tensor
    variance: Tensor

    def memory(self, node: int) -> tuple[float, float]:
        """(Phi, C): x_0 given x at a node has slope Phi and variance C."""
        phi = self.slope[node:].prod().item()
        return phi, self.variance[-1].item() - phi**2 * self.variance[node].item()


def all_nodes(grid: Grid) -> tuple[Node, Node]:
    """Both ends of all steps at once."""
    column = (slice(None), None, None, None)
    ends = [(values[:-1][column], values[1:][column]) for values in vars(grid).values()]
    return Node(*(t for t, _ in ends)), Node(*(s for _, s in ends))


def affine(function_of: Tensor) -> tuple[Tensor, Tensor]:
    """(slope, offset) per step of what was evaluated at x = 0 and at x = 1."""
    at_zero, at_one = function_of.double().flatten().chunk(2)
    return at_one - at_zero, at_zero


def predictions(model: ToyModel, grid: Grid) -> tuple[Tensor, Tensor, Node, Node]:
    """(x0_hat, eps_hat) at x = 0 and at x = 1 of every step, and the nodes they belong to."""
    t, s = (Node(*(torch.cat([v, v]) for v in vars(node).values())) for node in all_nodes(grid))
    x_t = torch.arange(2, dtype=torch.float64).repeat_interleave(grid.num_steps)[:, None, None, None]
    noise_pred = model.predict(x_t, t.timestep.flatten(), model.encode_prompts([""]))
    return *to_x0_eps(noise_pred, x_t, t, model.prediction_type), t, s


@torch.no_grad()
def chain(model: ToyModel, grid: Grid, kernel: Kernel, *, start: tuple[float, float]) -> Chain:
    """Exact moments of what the package's kernel does with the model's predictions, from N(*start) on.

    Args:
        model: With a single Gaussian as prior and an affine correction.
        grid: In float64.
        kernel: Any whose mean is affine in its prediction.
        start: Mean and variance at the first node.
    """
    x0_hat, eps_hat, t, s = predictions(model, grid)
    transition = kernel(x0_hat, eps_hat, t, s)
    slope, offset = affine(transition.mean)
    std = transition.std.flatten()[: grid.num_steps]
    mean, variance = [start[0]], [start[1]]
    for a, b, width in zip(slope.tolist(), offset.tolist(), std.tolist(), strict=True):
        mean.append(a * mean[-1] + b)
        variance.append(a**2 * variance[-1] + width**2)
    return Chain(slope, offset, std, *(torch.tensor(x, dtype=torch.float64) for x in (mean, variance)))


@torch.no_grad()
def path_cost(model: ToyModel, grid: Grid, moments: Chain, *, eta: float) -> float:
    """Expected running cost along a chain: a square of what is affine in x, per the package's `running_cost`."""
    reference = ToyModel(model.prior, model.process, None, model.prediction_type)
    (_, eps_hat, t, s), (_, eps_ref, _, _) = predictions(model, grid), predictions(reference, grid)
    slope, offset = affine(eps_hat - eps_ref)
    unit = running_cost(torch.ones_like(eps_hat), torch.zeros_like(eps_hat), t, s, eta=eta)[: grid.num_steps]
    square = (slope * moments.mean[:-1] + offset) ** 2 + slope**2 * moments.variance[:-1]
    return (unit * square).sum().item()
