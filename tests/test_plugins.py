"""Names for what lies in modules."""

import pytest

from rpo.errors import InputError
from rpo.plugins import load_plugin, nearest, place_of

KNOWN = {"join": "os.path:join", "broken": "no_such_module:x", "lost": "os.path:jion"}


def test_a_name_or_a_place_is_imported_when_asked_for() -> None:
    import os.path

    assert load_plugin("join", KNOWN, "tool") is os.path.join
    assert load_plugin("os.path:exists", KNOWN, "tool") is os.path.exists
    assert place_of("join", KNOWN, "tool") == "os.path:join"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jion", "no tool 'jion'.*nearest is 'join'"),
        ("broken", "tool 'broken' cannot be imported.*no_such_module"),
        ("lost", "tool 'lost'.*nearest is 'join'"),
        ("a/b.py:c", "no place in a module"),
        (":", "no place in a module"),
        ("os.path:", "no place in a module"),
    ],
)
def test_what_is_not_there_is_told(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_plugin(name, KNOWN, "tool")


def test_the_nearest_name() -> None:
    assert nearest("clipscore", ["shapes", "clip-score"]) == "clip-score"
