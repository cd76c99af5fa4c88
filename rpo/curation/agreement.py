"""How far two judges agree beyond chance: Cohen's kappa with an interval.

κ = (p_o − p_e) / (1 − p_e), with p_o the share of pairs on which both say the same and p_e = Σ_k p_k q_k what two
judges with these habits would reach by chance (J. Cohen, Educ. Psychol. Meas. 1960, eq. 1).

The interval is that of p_o carried over, p_e taken as known, as in Cohen's own standard error (eq. 7); but p_o has
Wilson's interval over prompts instead of the normal one, so that full agreement on few pairs still has a width.
"""

from collections import Counter
from collections.abc import Sequence

from rpo.errors import InputError
from rpo.evaluation.intervals import Interval, accuracy


def cohen_kappa(first: Sequence[str], second: Sequence[str], *, groups: Sequence[object]) -> Interval | None:
    """The agreement of two judges on the same pairs.

    Returns:
        κ and its 95 % interval: 1 is full agreement, 0 is chance. None where chance alone would agree on everything,
        since both always say the same word, or where there are no pairs.

    Example:
        >>> cohen_kappa(["first", "second"] * 10, ["first", "second"] * 10, groups=range(20)).value
        1.0
    """
    if len(first) != len(second):
        raise InputError(
            f"the first judge has {len(first)} verdicts and the second {len(second)}; expected one each per pair; "
            "leave out the pairs that one of them could not judge"
        )
    if not first:
        return None
    counts_first, counts_second = Counter(first), Counter(second)
    by_chance = sum(counts_first[one] * counts_second[one] for one in counts_first) / len(first) ** 2
    if by_chance == 1:
        return None
    observed = accuracy([one == other for one, other in zip(first, second, strict=True)], groups=groups)
    value, low, high = (
        (share - by_chance) / (1 - by_chance) for share in (observed.value, observed.low, observed.high)
    )
    return Interval(value, low, high)
