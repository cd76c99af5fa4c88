"""`rpo serve-rewards`: what is refused before anything listens. That it serves is shown by runs that ask it."""

import socket

import pytest

from rpo.cli.main import main


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["shapes", "--token"], "RPO_REWARD_TOKEN is not set"),
        (["shapes", "--files", "/no/such/folder"], "no folder"),
        (["http://host:1/shapes"], "served already"),
        (["shpaes"], "nearest is 'shapes'"),
        (["shapes", "--device", "abacus"], "abacus"),
        (["shapes", "--port", "99999"], "0-65535"),
    ],
)
def test_wrong_words_are_one_line(words, told, capsys, monkeypatch):
    monkeypatch.delenv("RPO_REWARD_TOKEN", raising=False)
    assert main(["serve-rewards", "--port", "0", *words]) == 2
    found = capsys.readouterr()
    assert told in found.err and len(found.err.splitlines()) == 1 and not found.out


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve-rewards", "shapes", "--port", str(taken.getsockname()[1])]) == 2
    assert "nothing can listen" in capsys.readouterr().err
