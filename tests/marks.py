"""Which cases of a test every run of the tests asks; the others are for `-m slow`."""

import pytest


def slow_but(quick, names):
    """The names, or tuples by name, of which all but the quick ones are slow."""
    given = [one if isinstance(one, tuple) else (one,) for one in names]
    if strange := set(quick) - set(names):
        raise ValueError(f"{sorted(strange)} are none of the cases")
    return [
        pytest.param(*one, marks=[] if name in quick else [pytest.mark.slow])
        for name, one in zip(names, given, strict=True)
    ]
