"""Multistep ODE solvers of diffusers as kernels: a second-order solver gets from noise to data in half the steps.

A solver such as DPM-Solver++ (arXiv:2211.01095) is taken as it is, a black box: it brings its own grid and remembers
its last predictions, so that one object draws one batch of trajectories, step after step. It is deterministic, has no
transition density, and must not be asked for a step out of order.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.models.schedules import check_steps
from rpo.process.diffusion import require_gaussian
from rpo.process.grid import check_grid, flow_grid
from rpo.process.prediction import from_x0_eps
from rpo.process.transition import Gaussian
from rpo.types import Canvas, Grid, Latents, Node, PredictionType

SOLVERS: Mapping[str, type[Any]] = {
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    "UniPCMultistepScheduler": UniPCMultistepScheduler,
    "DEISMultistepScheduler": DEISMultistepScheduler,
}
"""Those that step latents alpha x_0 + sigma eps, call the network once per step, and can do without noise."""

DETERMINISTIC = {"DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++"}}
"""What must be set where a checkpoint's own scheduler may be configured for a stochastic variant."""


@final
class BlackBoxSolver:
    """A kernel for one batch of trajectories on its own grid.

    Example:
        >>> solver = BlackBoxSolver(model, 10)                                            # doctest: +SKIP
        >>> sample(model, cond, solver.grid, solver, guidance_scale=3.0, generators=...)  # doctest: +SKIP

    Attributes:
        grid: Where it steps: the only grid that it can be used with.
        has_density: Never.
    """

    has_density = False

    def __init__(
        self,
        model: DiffusionModel,
        num_steps: int,
        *,
        name: str = "DPMSolverMultistepScheduler",
        canvas: Canvas | None = None,
    ):
        """Set up a solver for one sampling.

        Args:
            model: The checkpoint; its scheduler's configuration says how the solver spaces its steps.
            canvas: Size of the images, by which some flow models shift their steps.
        """
        if name not in SOLVERS:
            raise InputError(f"solver is {name!r}, but only some of diffusers' fit here; give {', '.join(SOLVERS)}")
        require_gaussian(model, f"the solver {name}", "tokens are drawn by `rpo.process.categorical.Unmasking`")
        check_steps(num_steps, model.num_train_timesteps)
        options = DETERMINISTIC.get(name, {})
        if model.prediction_type == "flow":  # whose own scheduler's words a solver does not know
            self._scheduler = SOLVERS[name](
                num_train_timesteps=model.num_train_timesteps,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=model.flow_shift(num_steps, canvas),
                **options,
            )
        else:
            self._scheduler = SOLVERS[name].from_config(model.scheduler_config, **options)
        self._scheduler.set_timesteps(num_steps)
        self._scheduler.set_begin_index(0)  # or it would look its step up by timestep
        self._prediction_type: PredictionType = model.prediction_type
        self._step = 0
        self.grid = _grid(self._scheduler, model)

    def __call__(self, x0_hat: Latents, eps_hat: Latents, t: Node, s: Node) -> Gaussian:
        """The solver's next step: a Gaussian without width."""
        self._check_order(t, s)
        x_t = t.alpha * x0_hat + t.sigma * eps_hat
        noise_pred = from_x0_eps(x0_hat, eps_hat, t, self._prediction_type)
        x_s = self._scheduler.step(noise_pred, self._scheduler.timesteps[self._step], x_t, return_dict=False)[0]
        self._step += 1
        return Gaussian(x_s, torch.zeros((), device=x_s.device, dtype=x_s.dtype))

    def _check_order(self, t: Node, s: Node) -> None:
        if self._step == self.grid.num_steps:
            raise InputError(
                f"this solver has done its {self._step} steps, but was asked for another; it remembers one trajectory, "
                "so make a new BlackBoxSolver for each call of sample"
            )
        expected = self.grid[self._step], self.grid[self._step + 1]
        if t.sigma.ndim or not (_are_same(t, expected[0]) and _are_same(s, expected[1])):
            raise InputError(
                f"step {self._step} of this solver goes from sigma {expected[0].sigma:.6g} to {expected[1].sigma:.6g}, "
                f"but it was asked for {t.sigma.tolist()} to {s.sigma.tolist()}; sample on solver.grid, in order, with "
                "a new BlackBoxSolver for each call"
            )


def _are_same(node: Node, expected: Node) -> bool:
    """Whether it is that node; only a copy of it has to be compared, for which the host waits for the device."""
    return node.sigma.data_ptr() == expected.sigma.data_ptr() or torch.equal(node.sigma, expected.sigma)


def _grid(scheduler: Any, model: DiffusionModel) -> Grid:
    wide = scheduler.sigmas.double()
    if model.prediction_type == "flow":  # whose timesteps the solver would round
        return flow_grid(wide, num_train_timesteps=model.num_train_timesteps).to(model.device)
    alpha = (1 + wide**2).rsqrt()
    sigma = wide * alpha
    timestep = torch.cat([scheduler.timesteps, scheduler.timesteps.new_zeros(1)])
    check_grid(Grid(alpha, sigma, timestep))
    return Grid(alpha.float(), sigma.float(), timestep).to(model.device)
