"""Continuous time: grids of any length over one process, and what a change of score costs along the path.

Backwards from noise to data a whole family of equations has the marginals of x_t = alpha x_0 + sigma eps, one for each
noise level `eta` (the lambda of rectified flow is eta²; Flow-GRPO's noise parameter `a` is a² = 2 lambda):

    dx = [-f x + (1 + eta²)/2 g² score] dtau + eta g dW,    tau = -t.

eta = 0 is the probability-flow ODE, eta = 1 the reverse SDE. A policy that changes the score by Δ controls it with
u = (1 + eta²)/(2 eta) g Δ, and pays ½|u|² per unit time: Girsanov's theorem, by which the total is in expectation the
KL of the two path measures (arXiv:2502.01819; the authors' code has the same weight).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.errors import InputError
from rpo.process.grid import check_grid
from rpo.process.schedule import Process, check_inside
from rpo.process.transition import added_variance
from rpo.types import Grid, Node


def uniform_times(process: Process, num_steps: int) -> Float[Tensor, " nodes"]:
    """Times of `num_steps` equal steps from noise to data."""
    if num_steps < 1:
        raise InputError(f"num_steps is {num_steps}, but a grid needs a step; ask for 1 or more (20 to 50 are usual)")
    return torch.linspace(process.start, process.end, num_steps + 1, dtype=torch.float64, device="cpu")


def jittered_times(
    process: Process, num_steps: int, generator: torch.Generator, *, jitter: float
) -> Float[Tensor, " nodes"]:
    """Equal steps whose inner ends are moved at random, so that training sees the process and not one grid of it.

    Both ends stay where they are.

    Args:
        jitter: How far, in [0, 1): by at most half of this share of a step, so that times still fall strictly.
    """
    if not 0 <= jitter < 1:
        raise InputError(f"jitter is {jitter}, but nodes must not pass each other; give a share of a step in [0, 1)")
    times = uniform_times(process, num_steps)
    cell = (process.start - process.end) / num_steps
    moves = torch.rand(num_steps - 1, generator=generator, dtype=torch.float64, device="cpu") - 0.5
    times[1:-1] += jitter * cell * moves
    return times


def grid_at(
    process: Process,
    times: Float[Tensor, " nodes"],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Grid:
    """The grid of a process at any times that fall; at those of training timesteps it is `vp_grid`'s.

    Timesteps are floating-point numbers of `dtype`, too.
    """
    times = times.double().cpu()
    check_inside(times, process.end, process.start)
    wide = Grid(process.alpha(times), process.sigma(times), process.timestep(times))
    check_grid(wide)
    return Grid(wide.alpha.to(device, dtype), wide.sigma.to(device, dtype), wide.timestep.to(device, dtype))


def cost_weight(eta: float) -> float:
    """((1 + eta²)/(2 eta))², by which ½|u|² exceeds ½ g² |Δscore|²; least, and 1, at eta = 1.

    An ODE (eta = 0) has no path density and an infinite KL to any other; it gets the weight of eta = 1, since a score
    that was tuned at eta = 1 is the one that an ODE may use.
    """
    return 1.0 if eta == 0 else ((1 + eta**2) / 2 / eta) ** 2


def control_cost(
    score: Float[Tensor, "batch c h w"],
    score_ref: Float[Tensor, "batch c h w"],
    *,
    diffusion: Float[Tensor, "..."],
    eta: float,
) -> Float[Tensor, " batch"]:
    """What a change of score costs per unit time: ½|u|² = cost_weight(eta) ½ g² |score - score_ref|²."""
    return (cost_weight(eta) * 0.5 * diffusion * (score - score_ref) ** 2).sum(dim=(1, 2, 3))


def running_cost(
    eps_hat: Float[Tensor, "batch c h w"], eps_ref: Float[Tensor, "batch c h w"], t: Node, s: Node, *, eta: float
) -> Float[Tensor, " batch"]:
    """What a change of prediction costs over one step: `control_cost` with the step's added variance V for ∫g².

    For `euler_maruyama` this is the KL of the two transitions exactly, for other kernels to first order. The two noise
    predictions are the policy's and the reference's at `t`.
    """
    wide = torch.promote_types(eps_hat.dtype, torch.float32)
    score, score_ref = -eps_hat.to(wide) / t.sigma, -eps_ref.to(wide) / t.sigma
    return control_cost(score, score_ref, diffusion=added_variance(t, s), eta=eta)
