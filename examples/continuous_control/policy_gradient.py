"""CPG and CPPO: policy gradients in continuous time (Zhao, Tang and Yao, arXiv:2305.18901).

With states seen at times τ ~ Exp(ρ), and q and the entropy weight λ as in `lq`,

    ∇J = 1/ρ E[∇log π(a|X_τ) (q(X_τ, a) - λ log π(a|X_τ))],    a ~ π

The learner knows neither drift nor noise, and estimates q as `rollouts` says.

CPG takes one step of `policy_gradient.plain` per rollout. CPPO takes several on the ratio, within the trust region
C E√KL or C E[KL] around the policy that drew the rollout (`policy_gradient.trust_region`), and adapts C. √KL is what
the paper's bound on the change of J has. In practice it moves by fits and starts: its kink at the old policy holds an
update back entirely or hardly at all, whereas under C KL every update goes some way.

Two terms of the paper are left out. Its further advantage -λ multiplies E[∇log π] = 0. Its surrogate has -λ log of the
*new* policy, ours of the old one: the difference is λ KL(new ‖ old), one more penalty beside an adapted one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from examples.continuous_control.lq import LinearPolicy, LinearQuadratic, objective
from examples.continuous_control.rollouts import Rollout, advantages, draw
from rpo.config.ranges import Count, Positive, Seed
from rpo.config.settings import settings
from rpo.objectives.policy_gradient import adapt_coefficient, clipped_surrogate, plain, trust_region
from rpo.randomness import keyed_generator
from rpo.types import PerSample

Method = Literal["cpg", "cppo_sqrt", "cppo_linear"]
"""CPG, or CPPO with the penalty C √KL or C KL."""

_BETAS = (0.8, 0.9)  # Adam's usual 0.999 would remember the first gradients, far larger than the last ones, to the end


@settings
class ControlConfig:
    """How to learn. With the defaults every method ends within 2 % of the optimum of the default problem."""

    method: Method = "cpg"
    """The update; see the module."""
    updates: Count = 80
    """Rollouts; `reach` and `target` fall linearly to 0 over them."""
    paths: Count = 2000
    """Independent paths per rollout, each giving one state."""
    actions_per_state: Count = 2
    """Actions tried in each of these states, each under a noise and its opposite."""
    path_step: Positive = 0.05
    """Euler step of the paths; it only shifts which states are visited, by O(path_step)."""
    time_step: Positive = 0.005
    """Δt of q-hat, which is biased by O(Δt)."""
    reach: Positive = 0.1
    """About the farthest that an update moves a weight, at the start: the sum of the learning rates of its steps."""
    inner_steps: Count = 10
    """Gradient steps of CPPO per rollout, each shorter than the one before; CPG takes one."""
    target: Positive = 0.05
    """√KL per update that C is adapted to, at the start."""
    coefficient: Positive = 1.0
    """C at the start."""
    exact_q: bool = False
    """Take q from the known dynamics and the exact value instead of estimating it."""
    seed: Seed = 0
    """Of everything random."""


@dataclass(frozen=True)
class Update:
    """Where one update led, and how far it went: E√KL(old ‖ new), what it should have been, and the C it went under."""

    policy: LinearPolicy
    value: float
    sqrt_kl: float
    target: float
    coefficient: float


def cpg_loss(problem: LinearQuadratic, policy: LinearPolicy, rollout: Rollout, advantage: PerSample) -> Tensor:
    """The loss whose gradient is -∇J where `policy` is the one that drew the rollout."""
    log_prob = policy.actions(rollout.x).log_prob(rollout.action)
    return plain(log_prob, rollout.log_prob, advantage, num_dims=1).loss.mean() / problem.discount


def cppo_loss(
    problem: LinearQuadratic,
    policy: LinearPolicy,
    old: LinearPolicy,
    rollout: Rollout,
    advantage: PerSample,
    *,
    coefficient: float,
    power: Literal["sqrt", "linear"],
) -> Tensor:
    """The surrogate of J around the old policy, penalised by the distance from it."""
    log_prob = policy.actions(rollout.x).log_prob(rollout.action)
    surrogate = clipped_surrogate(log_prob, rollout.log_prob, advantage, num_dims=1, clip=math.inf)
    kl = old.kl(policy, rollout.x)
    penalty = trust_region(kl, coefficient) if power == "sqrt" else coefficient * kl
    return surrogate.loss.mean() / problem.discount + penalty.mean()


def learn(problem: LinearQuadratic, start: LinearPolicy, config: ControlConfig) -> Iterator[Update]:
    """Improves a policy, update by update; the exact value that an update reports is not used for learning."""
    policy = start.copy(is_trainable=True)
    optimizer = torch.optim.Adam([policy.weights], betas=_BETAS)
    coefficient = config.coefficient
    for update in range(config.updates):
        remaining = 1 - update / config.updates
        reach, target = config.reach * remaining, config.target * remaining
        old = policy.copy()
        rollout = draw(
            problem,
            old,
            paths=config.paths,
            actions_per_state=config.actions_per_state,
            path_step=config.path_step,
            time_step=config.time_step,
            generator=keyed_generator("control", config.seed, update),
        )
        advantage = advantages(problem, old, rollout, exact_q=config.exact_q)
        if config.method == "cpg":
            _descend(optimizer, partial(cpg_loss, problem, policy, rollout, advantage), [reach])
        else:
            power = "sqrt" if config.method == "cppo_sqrt" else "linear"
            penalised = partial(cppo_loss, coefficient=coefficient, power=power)
            # Every rollout is a problem of its own, which the momentum of the last one would only disturb.
            fresh = torch.optim.Adam([policy.weights], betas=_BETAS)
            steps = range(config.inner_steps, 0, -1)
            rates = [reach * step / sum(steps) for step in steps]
            _descend(fresh, partial(penalised, problem, policy, old, rollout, advantage), rates)
        new = policy.copy()
        sqrt_kl = float(old.kl(new, rollout.x).sqrt().mean())
        yield Update(new, float(objective(problem, new)), sqrt_kl, target, coefficient)
        if config.method != "cpg":
            coefficient = adapt_coefficient(coefficient, sqrt_kl, target=target)


def _descend(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], rates: Sequence[float]) -> None:
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
