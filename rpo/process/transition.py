"""Reverse transitions p(x_s | x_t) of the process x_t = alpha x_0 + sigma eps.

Going forward from s to t multiplies by alpha_t / alpha_s and adds noise of variance

    V = sigma_t² - (alpha_t / alpha_s)² sigma_s².

`ddim` is exact when the clean data behind x_t is known to be x0_hat; `euler_maruyama` integrates the reverse-time
stochastic differential equation of the same marginals to first order. Both keep the marginals for any `eta` in the
limit of small steps: eta = 0 is the probability-flow ODE, eta = 1 is ancestral sampling.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.errors import InputError
from rpo.types import Latents, Node, PerSample


@dataclass(frozen=True)
class Gaussian:
    """Isotropic Gaussian over latents; `std` is the standard deviation of the step, 0 for a deterministic one."""

    mean: Float[Tensor, "batch c h w"]
    std: Float[Tensor, "..."]

    @property
    def num_dims(self) -> int:
        """Dimensions of one sample."""
        return self.mean[0].numel()

    def sample(self, noise: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """The point that unit Gaussian `noise` selects."""
        return self.mean + self.std * noise

    def log_prob(self, x_s: Float[Tensor, "batch c h w"]) -> Float[Tensor, " batch"]:
        """Joint log-density, summed over all dimensions; divide by `num_dims` before taking a clipped ratio.

        A deterministic step (`std` = 0) has no density: the answer is NaN there, never a number that looks like one.
        """
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        mean, std, x_s = self.mean.to(wide), self.std.to(wide), x_s.to(wide)
        per_dim = -0.5 * ((x_s - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        return torch.where(std > 0, per_dim, torch.nan).sum(dim=(1, 2, 3))

    def kl(self, other: "Gaussian") -> Float[Tensor, " batch"]:
        """KL(self ‖ other) of two transitions from the same node, which share their std; summed over dimensions."""
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        gap = (self.mean.to(wide) - other.mean.to(wide)) / self.std.to(wide)
        return 0.5 * (gap**2).sum(dim=(1, 2, 3))


@runtime_checkable  # for the tests, which check the types of arguments when functions run
class Transition(Protocol):
    """The law p(x_s | x_t) of one reverse step."""

    @property
    def num_dims(self) -> int:
        """Dimensions of one sample."""
        ...

    def sample(self, noise: Latents) -> Latents:
        """The state that unit Gaussian noise selects."""
        ...

    def log_prob(self, x_s: Latents) -> PerSample:
        """Joint log-density; NaN where there is none."""
        ...

    def kl(self, other: Any) -> PerSample:
        """KL(self ‖ other) of two transitions from the same state."""
        ...


Step = Callable[[Latents, Latents, Node, Node], Transition]
"""What a kernel is when nobody asks it for densities: any function of a prediction and two nodes."""


@runtime_checkable
class Kernel(Protocol):
    """A rule for one reverse step from node `t` to the less noisy node `s`: what a sampler is built around."""

    @property
    def has_density(self) -> bool:
        """Whether its steps have a transition density, which `log_prob`, ratios and path KLs need.

        A step that ends where sigma = 0 may still be deterministic: `Ddim` arrives there without noise.
        """
        ...

    def __call__(self, x0_hat: Latents, eps_hat: Latents, /, t: Node, s: Node) -> Transition:
        """The transition p(x_s | x_t) that the prediction (x0_hat, eps_hat) at `t` gives.

        Of a model of tokens it is given the log-probabilities and x_t.
        """
        ...


def added_variance(t: Node, s: Node) -> Float[Tensor, "..."]:
    """Variance V that the forward process adds on its way from `s` to `t`."""
    return t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2


def ddim(
    x0_hat: Float[Tensor, "batch c h w"], eps_hat: Float[Tensor, "batch c h w"], t: Node, s: Node, *, eta: float
) -> Gaussian:
    """Generalised DDIM step (arXiv:2010.02502, eq. 12 and 16), written for any (alpha, sigma).

    Equals `DDIMScheduler.step`, and at `eta` = 0 on a flow grid `FlowMatchEulerDiscreteScheduler.step`.

    Args:
        x0_hat: Predicted clean latents.
        eps_hat: Predicted noise.
        t: The noisier node, where the prediction was made.
        s: The node to go to; at `eta` 0 it may be the noisier one.
        eta: 0 is deterministic (for flow models the Euler step), 1 is ancestral sampling.
    """
    ratio = s.sigma / t.sigma
    std = eta * ratio * added_variance(t, s).sqrt() if eta else torch.zeros_like(ratio)  # eq. 16
    mean = s.alpha * x0_hat + (s.sigma**2 - std**2).sqrt() * eps_hat  # eq. 12
    return Gaussian(mean, std)


def euler_maruyama(
    x0_hat: Float[Tensor, "batch c h w"], eps_hat: Float[Tensor, "batch c h w"], t: Node, s: Node, *, eta: float
) -> Gaussian:
    """First-order step of dx = [f x - (1 + eta²)/2 g² score] dt + eta g dW, run backwards from `t` to `s`.

    The drift f and the diffusion g² of the forward process enter through what they do over the step:
    ∫f = log(alpha_t / alpha_s) and ∫g² = V to first order (arXiv:2011.13456, eq. 6 and 13). Needs alpha > 0 at both
    nodes.
    """
    x_t = t.alpha * x0_hat + t.sigma * eps_hat
    score = -eps_hat / t.sigma
    variance = added_variance(t, s)
    mean = x_t - (t.alpha / s.alpha).log() * x_t + 0.5 * (1 + eta**2) * variance * score
    return Gaussian(mean, eta * variance.sqrt())


def mean_of(transition: Transition) -> Latents:
    """Where a step of latents leads without its noise."""
    assert isinstance(transition, Gaussian), "only latents have a mean; see `require_gaussian`"
    return transition.mean


def check_noise_level(eta: float) -> None:
    """Refuse a negative noise level."""
    if not 0 <= eta < math.inf:
        raise InputError(
            f"eta is {eta}, but a noise level is finite and >= 0; 0 is deterministic, 1 ancestral sampling"
        )


@dataclass(frozen=True)
class _AtNoiseLevel:
    """What a kernel with a noise level has."""

    eta: float

    def __post_init__(self) -> None:
        """Refuse a negative noise level."""
        check_noise_level(self.eta)

    @property
    def has_density(self) -> bool:
        """True with noise: `eta` > 0."""
        return self.eta > 0


@dataclass(frozen=True)
class Ddim(_AtNoiseLevel):
    """The kernel `ddim` at one noise level.

    `eta` 0 is deterministic, 1 ancestral sampling; above 1 only on fine grids, where eta² V stays below sigma_t².

    Example:
        >>> Ddim(eta=1.0).has_density, Ddim(eta=0.0).has_density
        (True, False)
    """

    def __call__(
        self, x0_hat: Float[Tensor, "batch c h w"], eps_hat: Float[Tensor, "batch c h w"], t: Node, s: Node
    ) -> Gaussian:
        """The step of `ddim`."""
        return ddim(x0_hat, eps_hat, t, s, eta=self.eta)


@dataclass(frozen=True)
class EulerMaruyama(_AtNoiseLevel):
    """The kernel `euler_maruyama` at one noise level.

    `eta` 0 is the probability-flow ODE, 1 the reverse SDE; larger values shake more.

    Example:
        >>> EulerMaruyama(eta=1.0).has_density
        True
    """

    def __call__(
        self, x0_hat: Float[Tensor, "batch c h w"], eps_hat: Float[Tensor, "batch c h w"], t: Node, s: Node
    ) -> Gaussian:
        """The step of `euler_maruyama`."""
        return euler_maruyama(x0_hat, eps_hat, t, s, eta=self.eta)
