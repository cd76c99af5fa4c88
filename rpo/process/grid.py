"""Grids: where on the noise schedule a sampler stops, and what the process is there.

A checkpoint's schedule is a curve t → (alpha, sigma) with x_t = alpha x_0 + sigma eps. A grid picks nodes of it, from
noise to data. For a variance-preserving process (Song et al., arXiv:2010.02502, whose alpha-bar is our alpha²):

    alpha = sqrt(abar),    sigma = sqrt(1 - abar),    alpha² + sigma² = 1;

for rectified flow (Liu et al., arXiv:2209.03003) alpha = 1 - sigma. Curves are held in float64 and cast once at the
end, since 1 - abar loses most of its float32 digits near the data.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rpo.errors import InputError
from rpo.types import Grid, Node


def vp_node(
    alphas_cumprod: Float[Tensor, " train_timesteps"],
    timestep: Int[Tensor, " batch"],
    *,
    dtype: torch.dtype = torch.float32,
) -> Node:
    """The moments of a discrete variance-preserving schedule at one training timestep per sample, `[batch, 1, 1, 1]`.

    Timesteps are indices into the checkpoint's abar, 0 (data) … train_timesteps - 1 (noise).
    """
    abar = alphas_cumprod.double()[timestep][:, None, None, None]
    return Node(abar.sqrt().to(dtype), (1 - abar).sqrt().to(dtype), timestep[:, None, None, None])


def vp_grid(
    alphas_cumprod: Float[Tensor, " train_timesteps"],
    timesteps: Int[Tensor, " steps"],
    final_alpha_cumprod: float,
    *,
    dtype: torch.dtype = torch.float32,
) -> Grid:
    """A grid over a discrete variance-preserving schedule.

    Args:
        timesteps: Where the network is asked, noisiest first.
        final_alpha_cumprod: abar of the last node, where the image is read: 1 for clean data, abar[0] for Stable
            Diffusion (its scheduler has `set_alpha_to_one=False`).
    """
    final = torch.tensor([final_alpha_cumprod], dtype=torch.float64, device=alphas_cumprod.device)
    abar = torch.cat([alphas_cumprod.double()[timesteps], final])
    grid = Grid(abar.sqrt(), (1 - abar).clamp_min(0).sqrt(), torch.cat([timesteps, timesteps.new_zeros(1)]))
    check_grid(grid)
    return Grid(grid.alpha.to(dtype), grid.sigma.to(dtype), grid.timestep)


def flow_grid(
    sigmas: Float[Tensor, " nodes"], *, num_train_timesteps: int = 1000, dtype: torch.dtype = torch.float32
) -> Grid:
    """A grid of rectified flow, alpha = 1 - sigma, from the sigmas of a flow-matching scheduler (its last one is 0)."""
    wide = sigmas.double()
    check_grid(Grid(1 - wide, wide, wide * num_train_timesteps))
    return Grid((1 - wide).to(dtype), wide.to(dtype), (wide * num_train_timesteps).to(dtype))


def check_grid(grid: Grid) -> None:
    """Refuse a grid that does not run strictly from noise to data: sigma/alpha has to fall at every step.

    Ask before it goes to an accelerator, as values are read.
    """
    if grid.num_steps < 1:
        raise InputError(f"a grid has {grid.alpha.shape[0]} nodes, but a step needs two; ask for num_steps >= 1")
    noise_to_signal = grid.sigma.double() / grid.alpha.double()  # infinite at pure noise, which is still larger
    is_falling = noise_to_signal[1:] < noise_to_signal[:-1]  # which what is no number does not
    if not bool(is_falling.all()):
        step = int(is_falling.double().argmin())
        raise InputError(
            f"a grid must run from noise to data, but sigma/alpha goes from {noise_to_signal[step]:.6g} to "
            f"{noise_to_signal[step + 1]:.6g} at step {step} (timestep {grid.timestep[step]:g}); give the timesteps "
            "noisiest first and without repeats (too many steps for the schedule also repeat, and one alone is no grid "
            "with shift_terminal)"
        )
