"""Entropy-regularised linear-quadratic control in continuous time, where value, optimum and gradient are known exactly.

A state x driven by actions a, each with its own linear drift and noise, for a quadratic reward (Wang, Zariphopoulou and
Zhou, arXiv:1812.01552, section 4):

    dX = (A X + B a) dt + (C X + D a) dW
    r  = -(M/2 x² + R x a + N/2 a² + P x + Q a)
    J  = E ∫ e^{-ρt} [r(X, a) - λ log π(a|X)] dt,    X_0 ~ N(start_mean, start_std²)

Actions are drawn anew at every moment, so the state feels only their mean and variance (the *relaxed* dynamics). Every
policy a ~ N(f_1 x + f_0, v) has a quadratic value V, and the best one of all is of this form. With q the rate at which
an action gains over V,

    q(x, a) = (A x + B a) V' + ½ (C x + D a)² V'' + r - ρ V,    E_{a~π}[q - λ log π] = 0 for the V of π,

and the optimal V* solves the Hamilton-Jacobi-Bellman equation λ log ∫ exp(q/λ) da = 0.

All tensors are float64, and values are differentiable in the policy: `exact_gradient` is the gradient of `objective`.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rpo.errors import InputError
from rpo.types import PerSample

Number = Float[Tensor, ""]


@dataclass(frozen=True)
class Quadratic:
    """The function second/2 x² + first x + constant: the value of a policy, or a critic's guess at it."""

    second: Number
    first: Number
    constant: Number

    def __call__(self, x: PerSample) -> PerSample:
        """The value at every `x`."""
        return 0.5 * self.second * x**2 + self.first * x + self.constant

    def slope(self, x: PerSample) -> PerSample:
        """The derivative at every `x`."""
        return self.second * x + self.first

    def mean(self, center: float, std: float) -> Number:
        """The expectation over x ~ N(center, std²)."""
        return 0.5 * self.second * (center**2 + std**2) + self.first * center + self.constant


@dataclass(frozen=True)
class LinearPolicy:
    """Actions a ~ N(slope x + intercept, variance), with `weights` = (slope, intercept, log standard deviation)."""

    weights: Float[Tensor, "3"]

    @classmethod
    def of(cls, slope: float, intercept: float, variance: float) -> "LinearPolicy":
        """The policy with these numbers."""
        weights = [slope, intercept, 0.5 * math.log(variance)]
        return cls(torch.tensor(weights, dtype=torch.float64))

    @property
    def slope(self) -> Number:
        """Change of the mean action with the state."""
        return self.weights[0]

    @property
    def intercept(self) -> Number:
        """Mean action at x = 0."""
        return self.weights[1]

    @property
    def variance(self) -> Number:
        """Of the action, the same in every state."""
        return (2 * self.weights[2]).exp()

    @property
    def entropy(self) -> Number:
        """-E[log π], the same in every state."""
        return Normal(self.weights[0], self.weights[2].exp()).entropy()

    def actions(self, x: PerSample) -> Normal:
        """The distribution of the action in every state."""
        return Normal(self.slope * x + self.intercept, self.weights[2].exp())

    def kl(self, other: "LinearPolicy", x: PerSample) -> PerSample:
        """KL(self ‖ other) in every state."""
        return kl_divergence(self.actions(x), other.actions(x))

    def copy(self, *, is_trainable: bool = False) -> "LinearPolicy":
        """A policy that does not move with this one.

        Args:
            is_trainable: Whether its weights are a leaf that an optimizer can move.
        """
        return LinearPolicy(self.weights.detach().clone().requires_grad_(is_trainable))


@dataclass(frozen=True)
class LinearQuadratic:
    """The problem. The defaults are a well-conditioned example: V*(0.7) = -0.2244."""

    drift_state: float = -1.0
    """A: < 0 pulls the state back by itself."""
    drift_action: float = 0.5
    """B: what an action does to the state."""
    noise_state: float = 0.2
    """C: noise proportional to the state."""
    noise_action: float = 0.3
    """D: noise proportional to the action, the price of exploring."""
    cost_state: float = 2.0
    """M > 0."""
    cost_cross: float = 0.1
    """R, with R² < M N: the reward is concave."""
    cost_action: float = 1.0
    """N > 0."""
    cost_state_linear: float = 0.5
    """P: moves the best state away from 0."""
    cost_action_linear: float = 0.3
    """Q: moves the best action away from 0."""
    discount: float = 1.0
    """ρ > 0, a rate: the future counts for about 1/ρ units of time."""
    entropy_weight: float = 0.1
    """λ > 0: the variance of the best policy is about λ/N."""
    start_mean: float = 0.0
    """Mean of the initial state."""
    start_std: float = 1.0
    """Standard deviation of the initial state, >= 0."""

    def __post_init__(self) -> None:
        """Refuse problems without a finite optimum."""
        positive = {
            "cost_state": self.cost_state,
            "cost_action": self.cost_action,
            "discount": self.discount,
            "entropy_weight": self.entropy_weight,
        }
        for name, number in positive.items():
            if not number > 0:
                raise InputError(f"{name} is {number}, but it must be > 0; 1 is a good start, 0.1 for entropy_weight")
        if self.start_std < 0:
            raise InputError(f"start_std is {self.start_std}, but it must be >= 0; 0 starts every path at start_mean")
        if self.cost_cross**2 >= self.cost_state * self.cost_action:
            raise InputError(
                f"cost_cross is {self.cost_cross}, but its square must be below cost_state times cost_action = "
                f"{self.cost_state * self.cost_action}; bring it closer to 0, or some direction is rewarded without end"
            )
        if self.discount <= 2 * self.drift_state + self.noise_state**2:
            raise InputError(
                f"discount is {self.discount}, but left alone x² grows at the rate 2 drift_state + noise_state² = "
                f"{2 * self.drift_state + self.noise_state**2}; choose a discount above it, or the value is not finite"
            )

    def drift(self, x: PerSample, action: PerSample) -> PerSample:
        """Drift of the state; with the mean action, that of the relaxed dynamics."""
        return self.drift_state * x + self.drift_action * action

    def noise(self, x: PerSample, action: PerSample) -> PerSample:
        """Diffusion coefficient of the state, with its sign."""
        return self.noise_state * x + self.noise_action * action

    def relaxed_noise(self, x: PerSample, mean: PerSample, variance: Number) -> PerSample:
        """Diffusion coefficient under actions of this mean and variance."""
        return (self.noise(x, mean) ** 2 + self.noise_action**2 * variance).sqrt()

    def reward(self, x: PerSample, action: PerSample) -> PerSample:
        """Reward per unit of time."""
        quadratic = 0.5 * self.cost_state * x**2 + self.cost_cross * x * action + 0.5 * self.cost_action * action**2
        return -(quadratic + self.cost_state_linear * x + self.cost_action_linear * action)

    def q(self, x: PerSample, action: PerSample, value: Quadratic) -> PerSample:
        """The rate at which `action` gains over `value`: the exact q-function where `value` is that of the policy."""
        transport = self.drift(x, action) * value.slope(x) + 0.5 * self.noise(x, action) ** 2 * value.second
        return transport + self.reward(x, action) - self.discount * value(x)


def policy_value(problem: LinearQuadratic, policy: LinearPolicy) -> Quadratic:
    """The value V of a policy in closed form, differentiable in its weights.

    It solves ρ V = E_π[r - λ log π] + E_π[drift] V' + ½ E_π[noise²] V'', one power of x at a time.
    """
    p = problem
    slope, intercept, variance = policy.slope, policy.intercept, policy.variance
    drift_slope = p.drift_state + p.drift_action * slope
    noise_slope = p.noise_state + p.noise_action * slope
    noise_intercept = p.noise_action * intercept
    forgetting = p.discount - 2 * drift_slope - noise_slope**2
    if forgetting <= 0:
        raise InputError(
            f"under a policy of slope {slope.item():.4g}, x² grows faster than the discount {p.discount} forgets, so "
            "that the value is not finite; choose a slope that brings the state back, or smaller updates"
        )

    second = -(p.cost_state + 2 * p.cost_cross * slope + p.cost_action * slope**2) / forgetting
    linear_cost = p.cost_cross * intercept + p.cost_action * slope * intercept
    linear_cost = linear_cost + p.cost_state_linear + p.cost_action_linear * slope
    from_second = second * (p.drift_action * intercept + noise_slope * noise_intercept)
    first = (from_second - linear_cost) / (p.discount - drift_slope)
    constant_cost = 0.5 * p.cost_action * (intercept**2 + variance) + p.cost_action_linear * intercept
    transport = first * p.drift_action * intercept
    transport = transport + 0.5 * second * (noise_intercept**2 + p.noise_action**2 * variance)
    constant = (p.entropy_weight * policy.entropy - constant_cost + transport) / p.discount
    return Quadratic(second, first, constant)


def objective(problem: LinearQuadratic, policy: LinearPolicy) -> Number:
    """J, the expected value of the initial state."""
    return policy_value(problem, policy).mean(problem.start_mean, problem.start_std)


def exact_gradient(problem: LinearQuadratic, policy: LinearPolicy) -> Float[Tensor, "3"]:
    """The gradient of J in the policy's weights: slope, intercept, log standard deviation."""
    trainable = policy.copy(is_trainable=True)
    (gradient,) = torch.autograd.grad(objective(problem, trainable), [trainable.weights])
    return gradient


def optimal_value(problem: LinearQuadratic) -> Quadratic:
    """V*, the solution of the Hamilton-Jacobi-Bellman equation."""
    p = problem
    gain = p.drift_action + p.noise_state * p.noise_action
    forgetting = p.discount - 2 * p.drift_state - p.noise_state**2
    square = gain**2 + forgetting * p.noise_action**2
    linear = forgetting * p.cost_action + 2 * gain * p.cost_cross - p.noise_action**2 * p.cost_state
    rest = p.cost_cross**2 - p.cost_state * p.cost_action
    # The root of square k² - linear k + rest = 0 with k < 0, in the form that does not divide by `square`.
    second = 2 * rest / (linear + math.sqrt(linear**2 - 4 * square * rest))
    curvature = p.cost_action - second * p.noise_action**2
    slope = (second * gain - p.cost_cross) / curvature
    linear_cost = p.cost_state_linear + slope * p.cost_action_linear
    first = -linear_cost / (p.discount - p.drift_state - p.drift_action * slope)
    push = first * p.drift_action - p.cost_action_linear
    log_partition = 0.5 * p.entropy_weight * math.log(2 * math.pi * p.entropy_weight / curvature)
    constant = (0.5 * push**2 / curvature + log_partition) / p.discount
    second, first, constant = torch.tensor([second, first, constant], dtype=torch.float64)
    return Quadratic(second, first, constant)


def optimal_policy(problem: LinearQuadratic) -> LinearPolicy:
    """π*, proportional to exp(q/λ) with the q of V*: a Gaussian, since q is quadratic in the action."""
    value = optimal_value(problem)
    curvature = problem.cost_action - float(value.second) * problem.noise_action**2
    gain = problem.drift_action + problem.noise_state * problem.noise_action
    slope = (float(value.second) * gain - problem.cost_cross) / curvature
    intercept = (float(value.first) * problem.drift_action - problem.cost_action_linear) / curvature
    return LinearPolicy.of(slope, intercept, problem.entropy_weight / curvature)
