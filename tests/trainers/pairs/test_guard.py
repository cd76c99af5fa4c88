"""The guard on the chosen side: what it smooths, what it holds a run against, and what it refuses."""

from rpo.trainers.pairs.guard import OWN_START, ChosenGuard


def test_it_smooths_over_updates_and_resumes_where_it_was():
    calm, step = (
        {"dpo/margin": margin, "dpo/chosen_error": error, "dpo/reference_chosen_error": 0.5}
        for margin, error in ((0.0, 0.5), (1.0, 1.0))
    )
    guard = ChosenGuard(1.5)
    assert [guard(calm), guard(step), guard(step)] == [None, None, None]
    resumed = ChosenGuard(1.5)
    resumed.load_state_dict(guard.state_dict())
    # 1 - 0.9^n passes one half at n = 7.
    assert [resumed(step) is None for _ in range(5)] == [True, True, True, True, False]


def test_it_refuses_a_start_that_is_not_the_reference():
    first = {"dpo/margin": 0.7, "dpo/chosen_error": 1.0, "dpo/reference_chosen_error": 1.0}
    assert "before the first update the policy must equal its reference" in ChosenGuard(2.0)(first)


def test_it_holds_a_run_without_reference_against_its_own_start():
    guard = ChosenGuard(1.5, starts_at_zero=False)
    calm, broken = ({"dpo/margin": 3.0, "dpo/chosen_error": error} for error in (0.5, 1.5))
    assert [guard(calm) for _ in range(OWN_START)] == [None] * OWN_START
    resumed = ChosenGuard(1.5, starts_at_zero=False)
    resumed.load_state_dict(guard.state_dict())
    answers = [resumed(broken) for _ in range(4)]
    assert answers[:2] == [None, None]  # 1 + 2 (1 - 0.9^n) passes 1.5 at n = 3
    assert "has risen to 1.54 times that of the first updates (limit 1.5)" in answers[2]
