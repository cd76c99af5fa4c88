"""Cohen's kappa against its definition, against chance, and its interval against simulation."""

import numpy as np
import pytest

from rpo.curation.agreement import cohen_kappa

WORDS = ("first", "second", "tie")


def test_a_table_worked_out_by_hand():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    first = ["first"] * 25 + ["second"] * 25
    second = ["first"] * 20 + ["second"] * 5 + ["first"] * 10 + ["second"] * 15
    kappa = cohen_kappa(first, second, groups=range(50))
    assert kappa is not None and kappa.value == pytest.approx(0.4)
    assert kappa.low < 0.4 < kappa.high and kappa.low > 0.1 and kappa.high < 0.7


def test_full_agreement_opposition_and_chance():
    words = list(WORDS) * 10
    full = cohen_kappa(words, words, groups=range(30))
    assert full is not None and full.value == full.high == 1 and 0.6 < full.low < 1, (
        "thirty pairs prove nothing for ever"
    )
    opposed = cohen_kappa(["first", "second"] * 15, ["second", "first"] * 15, groups=range(30))
    assert opposed is not None and opposed.value == pytest.approx(-1)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(200):
        one, other = (rng.choice(WORDS, 100, p=[0.6, 0.3, 0.1]).tolist() for _ in range(2))
        kappa = cohen_kappa(one, other, groups=range(100))
        values.append(kappa.low < 0 < kappa.high)
    assert 0.9 <= np.mean(values) <= 0.99


def test_the_interval_holds_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    habits, follow = np.array([0.5, 0.4, 0.1]), 0.6  # the second says what the first says, or else what it pleases
    hits = []
    for _ in range(300):
        one = rng.choice(WORDS, 120, p=habits)
        other = np.where(rng.random(120) < follow, one, rng.choice(WORDS, 120, p=habits))
        kappa = cohen_kappa(one.tolist(), other.tolist(), groups=range(120))
        hits.append(kappa.low <= follow <= kappa.high)
    assert 0.91 <= np.mean(hits) <= 0.985


def test_pairs_of_one_prompt_count_less():
    words = ["first", "second"] * 20
    other = ["first", "second"] * 15 + ["second", "first"] * 5
    apart = cohen_kappa(words, other, groups=range(40))
    together = cohen_kappa(words, other, groups=[index // 10 for index in range(40)])
    assert apart.value == together.value and together.high - together.low > apart.high - apart.low


def test_where_it_is_not_defined():
    assert cohen_kappa([], [], groups=[]) is None
    assert cohen_kappa(["tie"] * 5, ["tie"] * 5, groups=range(5)) is None
    one_sided = cohen_kappa(["first"] * 5, ["first"] * 4 + ["tie"], groups=range(5))
    assert one_sided is not None and one_sided.value == pytest.approx(0)
    with pytest.raises(
        ValueError, match="^the first judge has 1 verdicts and the second 2; expected one each per pair"
    ):
        cohen_kappa(["tie"], ["tie", "tie"], groups=[0])
