"""The guard on both sides: what it smooths, what it holds a run against, what it refuses, and what it saves."""

import math

import pytest
import torch

from rpo.objectives.preference.dpo import preference_loss
from rpo.trainers.pairs.guard import OWN_START, ErrorGuard

EVEN = {"dpo/margin": 0.0, **{f"dpo/{name}_error": 0.5 for name in ("chosen", "rejected")}}
REFERENCE = {f"dpo/reference_{name}_error": 0.5 for name in ("chosen", "rejected")}


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_it_smooths_over_updates_and_resumes_where_it_was(side):
    limits = {"chosen": math.inf, "rejected": math.inf, side: 1.5}
    calm, step = EVEN | REFERENCE, EVEN | REFERENCE | {f"dpo/{side}_error": 1.0}
    guard = ErrorGuard(**limits)
    assert [guard(calm), guard(step), guard(step)] == [None, None, None]
    resumed = ErrorGuard(**limits)
    resumed.load_state_dict(guard.state_dict())
    # 1 - 0.9^n passes one half at n = 7.
    assert [resumed(step) is None for _ in range(5)] == [True, True, True, True, False]


def test_it_refuses_a_start_that_is_not_the_reference():
    first = EVEN | REFERENCE | {"dpo/margin": 0.7}
    answer = ErrorGuard(chosen=2.0, rejected=4.0)(first)
    assert "before the first update the policy must equal its reference" in answer


def test_it_holds_a_run_without_reference_against_its_own_start():
    calm, broken = EVEN | {"dpo/margin": 3.0}, EVEN | {"dpo/margin": 3.0, "dpo/chosen_error": 1.5}
    guard = ErrorGuard(chosen=1.5, rejected=4.0, starts_at_zero=False)
    assert [guard(calm) for _ in range(OWN_START)] == [None] * OWN_START
    resumed = ErrorGuard(chosen=1.5, rejected=4.0, starts_at_zero=False)
    resumed.load_state_dict(guard.state_dict())
    answers = [resumed(broken) for _ in range(4)]
    assert answers[:2] == [None, None]  # 1 + 2 (1 - 0.9^n) passes 1.5 at n = 3
    assert "has risen to 1.54 times that of the first updates (limit 1.5)" in answers[2]


def test_a_run_that_starts_off_its_reference_is_held_against_its_own_start():
    start = EVEN | REFERENCE | {"dpo/margin": 3.0, "dpo/chosen_error": 2.0}
    guard = ErrorGuard(chosen=1.5, rejected=4.0, starts_at_reference=False)
    assert [guard(start) for _ in range(OWN_START)] == [None] * OWN_START
    answers = [guard(start | {"dpo/chosen_error": 6.0}) for _ in range(4)]
    assert answers[:2] == [None, None]
    assert "1.54 times that of the first updates" in answers[2]


def spiky_run(margin_cap, guard=None):
    """Both errors at the end, in units of the reference's, of a toy whose rejected side is steep in what moves both.

    The chosen error has its least at 0.2; the rejected one grows six times as fast beyond.
    """
    theta, one = torch.zeros(1, requires_grad=True), torch.ones(1)
    for _ in range(3000):
        chosen, rejected = ((0.2 - theta) / 0.2) ** 2, (1 + 6 * theta) ** 2
        output = preference_loss(chosen, rejected, one, one, beta=1.0, margin_cap=margin_cap)
        if guard is not None and guard({name: value.item() for name, value in output.metrics.items()}):
            break
        (slope,) = torch.autograd.grad(output.loss, theta)
        theta = (theta - 0.01 * slope).detach().requires_grad_()
    return chosen.item(), rejected.item()


@pytest.mark.slow
def test_a_run_that_wrecks_both_sides_is_held_by_a_cap_on_its_margin_and_ended_by_the_guard():
    chosen, rejected = spiky_run(None)
    assert chosen > 1.5
    assert rejected > 10
    chosen, rejected = spiky_run(1.0)
    assert chosen < 1
    assert rejected < 3
    chosen, rejected = spiky_run(None, ErrorGuard(chosen=1.5, rejected=4.0))
    assert chosen < 1
    assert 4 < rejected < 8
