"""Processes: a noise schedule as a function of continuous time, of which every grid is a sample.

With t = 1 noise and t = 0 data, x_t = alpha x_0 + sigma eps is the law of dx = f x dt + g dW, where

    f = d log(alpha) / dt,    g² = d sigma² / dt - 2 f sigma².                                 (arXiv:2011.13456)
"""

from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.errors import InputError

FEWEST_TIMESTEPS = 3
"""Of a schedule that can be interpolated: less one with zero terminal SNR, they leave two slopes."""


@runtime_checkable  # for the tests, which check the types of arguments when functions run
class Process(Protocol):
    """A noise schedule as a function of continuous time; tensors of times are float64, on the CPU, of any shape."""

    @property
    def start(self) -> float:
        """The noise end: the largest time that has a finite log-SNR, or 1."""
        ...

    @property
    def end(self) -> float:
        """The data end, where the checkpoint reads its image: 0, or above where its last node is still noisy."""
        ...

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Scale of the data in x_t."""
        ...

    def sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Scale of the noise in x_t."""
        ...

    def drift(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rate f = d log(alpha) / dt of the forward process; not positive."""
        ...

    def diffusion(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The variance g² that the forward process adds per unit time; g², not g."""
        ...

    def timestep(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """What the network is fed at `t`: its own unit, between the training timesteps where need be."""
        ...


@final
class VariancePreserving:
    """The process of which a discrete variance-preserving schedule is a sample: alpha² + sigma² = 1, g² = -2 f.

    Training timestep i is the moment t = (i + 1) / T, and t = 0 is clean data. Between them log(alpha) is a cubic with
    continuous slope: three-point slopes, which makes the linear-beta schedule (a parabola) exact, limited so that it
    never rises (Fritsch & Carlson, 1980).

    Attributes:
        start: 1; with zero terminal SNR (abar = 0 at the last timestep) the timestep before it, since log(alpha), f and
            g² are infinite at pure noise.
        end: 0 where the last node is clean data, 1 / T where it is the first training timestep (Stable Diffusion).
    """

    def __init__(self, alphas_cumprod: Float[Tensor, " train_timesteps"], final_alpha_cumprod: float):
        """Interpolate a checkpoint's abar, read at the final one: 1, or abar of the first timestep."""
        abar = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()])
        self.num_train_timesteps = len(abar) - 1
        if final_alpha_cumprod not in (1, float(abar[1])):
            raise InputError(
                f"final_alpha_cumprod is {final_alpha_cumprod}, but the image is read at clean data or at the first "
                f"timestep; give 1 or alphas_cumprod[0] = {float(abar[1])}"
            )
        if abar[-1] == 0:
            abar = abar[:-1]  # zero terminal SNR
        if self.num_train_timesteps < FEWEST_TIMESTEPS or not bool((abar[1:] < abar[:-1]).all() and abar[-1] > 0):
            raise InputError(
                f"alphas_cumprod has {self.num_train_timesteps} values that do not fall strictly from below 1 to 0 or "
                f"above, or are fewer than {FEWEST_TIMESTEPS}; check the betas of the checkpoint's scheduler"
            )
        self.start = (len(abar) - 1) / self.num_train_timesteps
        self.end = 0.0 if final_alpha_cumprod == 1 else 1 / self.num_train_timesteps
        self._log_alpha = 0.5 * abar.log()
        self._slopes = _monotone_slopes(self._log_alpha)  # per timestep

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Scale of the data in x_t."""
        return self._curve(t)[0].exp()

    def sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Scale of the noise in x_t."""
        return (-torch.expm1(2 * self._curve(t)[0])).sqrt()

    def drift(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rate f = d log(alpha) / dt."""
        return self._curve(t)[1]

    def diffusion(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The variance g² per unit time."""
        return -2 * self._curve(t)[1]

    def timestep(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The training timestep T t - 1; 0 between clean data and the first of them."""
        check_inside(t, 0.0, self.start)
        return (t * self.num_train_timesteps - 1).clamp_min(0)

    def _curve(self, t: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """log(alpha) and its derivative: a cubic Hermite interpolation."""
        check_inside(t, 0.0, self.start)
        position = t * self.num_train_timesteps
        left = position.long().clamp_max(len(self._log_alpha) - 2)
        u = position - left
        low, high = self._log_alpha[left], self._log_alpha[left + 1]
        low_slope, high_slope = self._slopes[left], self._slopes[left + 1]
        quadratic = 3 * (high - low) - 2 * low_slope - high_slope
        cubic = low_slope + high_slope - 2 * (high - low)
        value = low + u * (low_slope + u * (quadratic + u * cubic))
        slope = low_slope + u * (2 * quadratic + 3 * u * cubic)
        return value, slope * self.num_train_timesteps


@final
class RectifiedFlow:
    """The straight-line process alpha = 1 - t, sigma = t (arXiv:2209.03003).

    f and g² are infinite at t = 1, pure noise: `euler_maruyama`, which integrates them, needs a start below it, such as
    0.98; `ddim` does not.
    """

    def __init__(self, num_train_timesteps: int = 1000, *, start: float = 1.0, end: float = 0.0):
        """Describe a flow-matching checkpoint, whose network is fed t times `num_train_timesteps`."""
        if not 0 <= end < start <= 1:
            raise InputError(f"start is {start} and end {end}, but time runs from noise 1 to data 0; start above end")
        self.num_train_timesteps, self.start, self.end = num_train_timesteps, start, end

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Scale of the data in x_t."""
        check_inside(t, 0.0, 1.0)
        return 1 - t

    def sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Scale of the noise in x_t."""
        check_inside(t, 0.0, 1.0)
        return t

    def drift(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rate f = -1 / (1 - t)."""
        return -1 / self.alpha(t)

    def diffusion(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The variance per unit time, g² = 2 t / (1 - t)."""
        return 2 * t / self.alpha(t)

    def timestep(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The time in units of the training timestep."""
        check_inside(t, 0.0, 1.0)
        return t * self.num_train_timesteps


def check_inside(t: Float[Tensor, "..."], end: float, start: float) -> None:
    """Refuse times outside a process."""
    if not bool(((t >= end) & (t <= start)).all()):
        low, high = float(t.min()), float(t.max())
        raise InputError(
            f"times span [{low:.6g}, {high:.6g}], but this process runs from noise at {start:.6g} to data at "
            f"{end:.6g}; stay between them (a checkpoint with zero terminal SNR starts just below 1)"
        )


def _monotone_slopes(values: Float[Tensor, " knots"]) -> Float[Tensor, " knots"]:
    rise = values.diff()
    inner = (rise[1:] + rise[:-1]) / 2
    slopes = torch.cat([1.5 * rise[:1] - 0.5 * rise[1:2], inner, 1.5 * rise[-1:] - 0.5 * rise[-2:-1]])
    # A cubic between slopes of 0 to 3 times its chord does not turn.
    steepest = 3 * torch.maximum(torch.cat([rise[:1], rise]), torch.cat([rise, rise[-1:]]))
    return slopes.clamp_max(0).maximum(steepest)
