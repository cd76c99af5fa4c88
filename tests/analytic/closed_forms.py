"""What is known of a one-dimensional problem: its laws, its optimum and how far a start is remembered.

Data are a mixture of Gaussians N(m_i, S_i), so that x_t = alpha x_0 + sigma eps is a mixture too, of N(alpha m_i,
Sigma_i) with Sigma = alpha² S + sigma². Under the reference at noise level eta, x_0 given x_t = x of one component is
Gaussian around m + Phi (x - alpha m) with variance C, for every process, where

    Phi = (S / Sigma)^((1 + eta²)/2) alpha^(eta²),    C = S - Phi² Sigma.

For a reward r and KL weight beta the optimal value is V*(x_t) = beta log E[exp(r(x_0)/beta) | x_t], and the optimum of
E r - beta KL(p ‖ data) is the data's law tilted by exp(r/beta).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def column(x_t: Tensor, values: Sequence[float]) -> Tensor:
    """One value per component, before the dimensions of x_t."""
    return torch.tensor(values, dtype=x_t.dtype).view(-1, *(1,) * x_t.ndim)


@dataclass(frozen=True)
class Mixture:
    """Data: Σ w_i N(m_i, S_i). One component is a plain Gaussian."""

    means: tuple[float, ...]
    variances: tuple[float, ...]
    weights: tuple[float, ...] = (1.0,)

    def components(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of x_t: the distance to each mean and each Sigma, with the components first, and log responsibilities."""
        m, S, w = (column(x_t, values) for values in (self.means, self.variances, self.weights))
        total = alpha**2 * S + sigma**2
        distance = x_t - alpha * m
        log_joint = w.log() - 0.5 * total.log() - 0.5 * distance**2 / total
        return distance, total, log_joint.log_softmax(dim=0)

    def score(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """∇log p_t."""
        if len(self.means) == 1:  # the same, faster
            return (alpha * self.means[0] - x_t) / (alpha**2 * self.variances[0] + sigma**2)
        distance, total, log_share = self.components(x_t, alpha, sigma)
        return (log_share.exp() * -distance / total).sum(0)

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t], which does not divide by alpha."""
        if len(self.means) == 1:
            (m,), (S,) = self.means, self.variances
            return m + alpha * S / (alpha**2 * S + sigma**2) * (x_t - alpha * m)
        distance, total, log_share = self.components(x_t, alpha, sigma)
        m, S = column(x_t, self.means), column(x_t, self.variances)
        return (log_share.exp() * (m + alpha * S / total * distance)).sum(0)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance."""
        mean = sum(w * m for w, m in zip(self.weights, self.means, strict=True))
        rows = zip(self.weights, self.means, self.variances, strict=True)
        return mean, sum(w * (S + m**2) for w, m, S in rows) - mean**2


def normal(mean: float, variance: float) -> Mixture:
    """A Gaussian prior."""
    return Mixture((mean,), (variance,))


@dataclass(frozen=True)
class Linear:
    """The reward r(x) = a x."""

    a: float

    def __call__(self, x: Any) -> Any:
        return self.a * x

    def value(self, mu: Any, variance: Any, beta: float) -> Any:
        """beta log E exp(r/beta) of N(mu, variance)."""
        return self.a * mu + self.a**2 * variance / (2 * beta)

    def slope(self, mu: Any, variance: Any, beta: float) -> Any:
        """Its derivative by mu."""
        return self.a + 0 * mu + 0 * variance

    def tilted(self, mean: float, variance: float, beta: float) -> tuple[float, float]:
        """Moments of the density proportional to N(mean, variance) exp(r/beta)."""
        return mean + variance * self.a / beta, variance


@dataclass(frozen=True)
class Quadratic:
    """The reward r(x) = -q/2 (x - c)²."""

    q: float
    c: float

    def __call__(self, x: Any) -> Any:
        return -0.5 * self.q * (x - self.c) ** 2

    def value(self, mu: Any, variance: Any, beta: float) -> Any:
        widened = 1 + variance * self.q / beta
        log = widened.log() if isinstance(widened, Tensor) else math.log(widened)
        return self(mu) / widened - beta / 2 * log

    def slope(self, mu: Any, variance: Any, beta: float) -> Any:
        return -self.q * (mu - self.c) / (1 + variance * self.q / beta)

    def tilted(self, mean: float, variance: float, beta: float) -> tuple[float, float]:
        tilted = 1 / (1 / variance + self.q / beta)
        return tilted * (mean / variance + self.q * self.c / beta), tilted


Reward = Linear | Quadratic


def tilted_mixture(prior: Mixture, reward: Reward, beta: float) -> Mixture:
    """The optimum of E r - beta KL(p ‖ prior): each component tilted, its weight times exp(log Z)."""
    rows = list(zip(prior.weights, prior.means, prior.variances, strict=True))
    moments = [reward.tilted(m, S, beta) for _, m, S in rows]
    weights = [w * math.exp(reward.value(m, S, beta) / beta) for w, m, S in rows]
    return Mixture(*zip(*moments, strict=True), weights=tuple(weight / sum(weights) for weight in weights))


def memory(variance: Any, alpha: Any, sigma: Any, eta: float) -> tuple[Any, Any, Any]:
    """(Phi, C, Sigma) of a Gaussian component: what x_0 keeps of x_t under the reference at a noise level."""
    total = alpha**2 * variance + sigma**2
    phi = (variance / total) ** ((1 + eta**2) / 2) * alpha ** (eta**2)
    return phi, variance - phi**2 * total, total


def optimal_value(
    x_t: Tensor, alpha: Tensor, sigma: Tensor, *, prior: Mixture, reward: Reward, beta: float, eta: float
) -> Tensor:
    """V*(x_t) of the reference at noise level `eta`; for more than one component eta must be 1."""
    assert eta == 1 or len(prior.means) == 1
    distance, _, log_share = prior.components(x_t, alpha, sigma)
    m, S = column(x_t, prior.means), column(x_t, prior.variances)
    phi, variance, _ = memory(S, alpha, sigma, eta)
    values = reward.value(m + phi * distance, variance, beta)
    return beta * (log_share + values / beta).logsumexp(0)


@dataclass(frozen=True)
class Problem:
    """The constants of one fine-tuning problem."""

    prior: Mixture
    beta: float
    linear: Linear
    quadratic: Quadratic
    betas: tuple[float, float]
    """First and last of the linear-beta schedule."""


PRINTED = Problem(normal(0.7, 0.4), 0.5, Linear(0.8), Quadratic(1.5, 1.2), (0.1, 20.0))
"""The constants at which reference values are written down."""

OTHER = Problem(normal(-0.5, 1.3), 0.8, Linear(-0.6), Quadratic(0.7, 0.9), (0.3, 14.0))
"""Constants of no significance, with a variance above 1."""

PROBLEMS = {"printed": PRINTED, "other": OTHER}
