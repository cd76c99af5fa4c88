"""Signals that end a run: delivered at the end of a commit, raised as exceptions elsewhere, put back afterwards."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from rpo.cli import main as cli
from rpo.cli.main import main
from rpo.interrupts import Terminated, ended_in_order, uninterrupted

ENDING = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated)]


@pytest.mark.parametrize(("number", "raised"), ENDING)
def test_the_block_ends_before_the_signal_arrives(number, raised):
    done = []
    with pytest.raises(raised), ended_in_order(), uninterrupted():
        signal.raise_signal(number)
        done.append("whole")
    assert done == ["whole"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_handlers_are_put_back_after_an_error(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyError), ended_in_order(), uninterrupted():
        raise KeyError
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_handler_of_the_callers_own_stays(number):
    arrived = []
    before = signal.signal(number, lambda number, _frame: arrived.append(number))
    try:
        with ended_in_order():
            signal.raise_signal(number)
        signal.signal(number, signal.SIG_IGN)  # nohup
        with ended_in_order(), uninterrupted():
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert arrived == [number]


def test_one_of_several_processes_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with ended_in_order():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_other_threads_may_use_it():
    done = []

    def work():
        with ended_in_order(), uninterrupted():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_program_that_lets_it_pass_ends_with_the_usual_code(number, code):
    script = f"import signal\nfrom rpo.interrupts import *\nwith ended_in_order(): signal.raise_signal({int(number)})"
    assert subprocess.run([sys.executable, "-c", script], cwd=os.getcwd()).returncode == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_command_says_how_to_go_on(monkeypatch, capsys, number, code):
    asked = cli.COMMANDS["quickstart"]
    monkeypatch.setitem(
        cli.COMMANDS,
        "quickstart",
        asked.__class__(asked.summary, asked.add_arguments, lambda _: signal.raise_signal(number)),
    )
    assert main(["quickstart"]) == code
    assert "interrupted; run the same command with --resume" in capsys.readouterr().err
