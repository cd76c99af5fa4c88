"""What a learner of control sees: states at random times, actions tried there, and how well each did.

The state of a path at an independent time τ ~ Exp(ρ) is distributed as the discounted return counts states,

    E ∫ e^{-ρt} f(X_t) dt = 1/ρ E[f(X_τ)]

An action is judged by one short step of length Δt (*q-hat*), against a quadratic critic V fitted to the same steps:

    q-hat = r + (e^{-ρΔt} V(x') - V(x)) / Δt,    critic target e^{-ρΔt} V(x') + (r - λ log π) Δt

As Δt → 0 its mean tends to the q of `lq`, but one noise alone makes it vary by |V' noise|/√Δt. Each action is therefore
tried under a noise and its opposite, whose effects of that order cancel, so that a small Δt costs nothing.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from examples.continuous_control.lq import LinearPolicy, LinearQuadratic, Quadratic, policy_value
from rpo.types import PerSample


@dataclass(frozen=True)
class Rollout:
    """States at their own times τ ~ Exp(ρ), actions taken there, and where each led within `time_step`."""

    x: PerSample
    action: PerSample
    log_prob: PerSample
    reward: PerSample
    x_next: PerSample
    time_step: float


def occupation_states(
    problem: LinearQuadratic, policy: LinearPolicy, count: int, *, path_step: float, generator: Generator
) -> PerSample:
    """States of independent paths at independent times τ ~ Exp(ρ), sorted by falling τ.

    Args:
        path_step: Longest Euler-Maruyama step; the last one of a path ends at its τ.
    """
    tau = -torch.log1p(-torch.rand(count, dtype=torch.float64, generator=generator)) / problem.discount
    tau = tau.sort(descending=True).values
    x = problem.start_mean + problem.start_std * torch.randn(count, dtype=torch.float64, generator=generator)
    for t in torch.arange(0.0, float(tau[0]), path_step, dtype=torch.float64):
        running = tau[tau > t]
        now, dt = x[: len(running)], (running - t).clamp(max=path_step)
        mean = policy.actions(now).mean
        xi = torch.randn(len(running), dtype=torch.float64, generator=generator)
        noise = problem.relaxed_noise(now, mean, policy.variance)
        x[: len(running)] = now + problem.drift(now, mean) * dt + noise * dt.sqrt() * xi
    return x


@torch.no_grad()
def draw(
    problem: LinearQuadratic,
    policy: LinearPolicy,
    *,
    paths: int,
    actions_per_state: int,
    path_step: float,
    time_step: float,
    generator: Generator,
) -> Rollout:
    """A rollout of `2 * paths * actions_per_state` samples.

    Args:
        actions_per_state: Actions tried in each of these states, each under a noise and its opposite.
    """
    states = occupation_states(problem, policy, paths, path_step=path_step, generator=generator)
    x = states.repeat(actions_per_state)
    unit, xi = torch.randn(2, len(x), dtype=torch.float64, generator=generator)
    actions = policy.actions(x)
    action = actions.mean + actions.stddev * unit
    log_prob, reward = actions.log_prob(action), problem.reward(x, action)
    moved = x + problem.drift(x, action) * time_step
    spread = problem.noise(x, action) * math.sqrt(time_step) * xi
    x_next = torch.cat([moved + spread, moved - spread])
    return Rollout(x.repeat(2), action.repeat(2), log_prob.repeat(2), reward.repeat(2), x_next, time_step)


def fit_critic(problem: LinearQuadratic, rollout: Rollout) -> Quadratic:
    """The quadratic whose semi-gradient on the rollout is zero: where repeated fits to its own target would end."""
    decay = math.exp(-problem.discount * rollout.time_step)
    features, next_features = _powers(rollout.x), _powers(rollout.x_next)
    income = (rollout.reward - problem.entropy_weight * rollout.log_prob) * rollout.time_step
    solution = torch.linalg.solve(features.T @ (features - decay * next_features), features.T @ income)
    return Quadratic(*solution)


def q_hat(problem: LinearQuadratic, rollout: Rollout, critic: Quadratic) -> PerSample:
    """The rate at which each action of a rollout gained over `critic`."""
    decay = math.exp(-problem.discount * rollout.time_step)
    return rollout.reward + (decay * critic(rollout.x_next) - critic(rollout.x)) / rollout.time_step


def advantages(problem: LinearQuadratic, policy: LinearPolicy, rollout: Rollout, *, exact_q: bool = False) -> PerSample:
    """The excess q - λ log π of every action, whose mean under the policy is 0 in every state.

    Args:
        exact_q: Whether to take q from the problem instead of estimating it.
    """
    if exact_q:
        with torch.no_grad():
            q = problem.q(rollout.x, rollout.action, policy_value(problem, policy))
    else:
        q = q_hat(problem, rollout, fit_critic(problem, rollout))
    return q - problem.entropy_weight * rollout.log_prob


def _powers(x: PerSample) -> Tensor:
    return torch.stack([0.5 * x**2, x, torch.ones_like(x)], dim=1)
