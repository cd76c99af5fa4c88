"""One process at a time in a run's folder: who comes second is told who is there, and the dead leave nothing."""

import multiprocessing
import os
import signal
import threading

import pytest

from rpo.errors import InputError
from rpo.files.lock import LOCK, sole_owner, taken_if_free

FORK = multiprocessing.get_context("fork")


def hold(folder, is_held):
    with sole_owner(folder):
        is_held.set()
        signal.pause()


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    is_held = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "run", is_held))
    process.start()
    is_held.wait(30)
    yield process
    process.kill()
    process.join()


def test_the_second_is_told_who_is_there_and_writes_nothing(tmp_path, other):
    before = (tmp_path / "run/.lock").read_bytes()
    message = f"run is in use by process {other.pid} on {os.uname().nodename}; expected"
    with pytest.raises(ValueError, match=message), sole_owner(tmp_path / "run"):
        pass
    assert (tmp_path / "run/.lock").read_bytes() == before


def test_a_killed_owner_leaves_no_lock(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with sole_owner(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run/.lock").read_text()
    assert (tmp_path / "run/.lock").read_text() == ""


def test_only_the_main_process_of_a_run_holds_it(tmp_path, other):
    with sole_owner(tmp_path / "run", is_main=False):
        pass
    with sole_owner(tmp_path / "elsewhere", is_main=False):
        assert not (tmp_path / "elsewhere").exists()


def test_who_holds_it_may_ask_again_by_any_name_of_the_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with sole_owner(tmp_path / "run"):
        with sole_owner(tmp_path / "link"):
            pass
        with pytest.raises(ValueError, match="is in use by"):  # still held
            in_thread(tmp_path / "run")
    in_thread(tmp_path / "run")


def test_an_error_lets_go(tmp_path):
    with pytest.raises(KeyError), sole_owner(tmp_path):
        raise KeyError
    in_thread(tmp_path)


def in_thread(folder):
    errors = []

    def work():
        try:
            with sole_owner(folder):
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_a_child_that_was_forked_does_not_hold_what_its_parent_holds(tmp_path):
    with sole_owner(tmp_path):
        child = FORK.Process(target=_enter, args=(tmp_path,))
        child.start()
        child.join()
    assert child.exitcode == 7


def _enter(folder):
    try:
        with sole_owner(folder):
            os._exit(0)
    except ValueError:
        os._exit(7)


def test_what_is_held_is_left_alone_and_what_is_free_is_taken(tmp_path, other):
    with taken_if_free(tmp_path / "run" / LOCK) as is_ours:
        assert not is_ours
    with taken_if_free(tmp_path / "new" / "folder" / LOCK) as is_ours:
        assert is_ours
        with taken_if_free(tmp_path / "new" / "folder" / LOCK) as is_ours_too:
            assert not is_ours_too
    with taken_if_free(tmp_path / "new" / "folder" / LOCK) as is_ours_again:
        assert is_ours_again


def test_an_error_inside_is_no_lock_of_another(tmp_path):
    with pytest.raises(InputError, match="of its own"), taken_if_free(tmp_path / LOCK):
        raise InputError("of its own")
