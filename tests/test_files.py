"""Files that are whole or not there, and lines that survive a kill."""

import errno
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from rpo.files.partial import OLD_SECONDS, sweep
from rpo.files.whole import (
    append_line,
    mend_last_line,
    name_full_disk,
    numbered_lines,
    parse_line,
    read_lines,
    replace_folder,
    write_whole,
    written_whole,
)


def test_lines_come_back_with_their_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    append_line(path, {"text": "ein Käse\nzwei"})
    with path.open("a") as file:
        file.write("\n")
    append_line(path, {"number": 1})
    assert list(read_lines(path)) == [{"text": "ein Käse\nzwei"}, {"number": 1}]
    assert [name for name, _ in numbered_lines(path)] == ["a.jsonl:1", "a.jsonl:3"]


@pytest.mark.parametrize("kept", [b"", b'{"a": 1}\n'])
def test_a_half_written_last_line_is_cut_off(tmp_path, kept):
    path = tmp_path / "a.jsonl"
    path.write_bytes(kept + b'{"prompt": "a r')
    mend_last_line(path)
    assert path.read_bytes() == kept


def test_a_whole_last_line_without_end_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    mend_last_line(path)
    append_line(path, {"a": 3})
    assert [row["a"] for row in read_lines(path)] == [1, 2, 3]


def test_what_is_no_object_is_named():
    with pytest.raises(ValueError) as error:
        parse_line("[1]", "a.jsonl:4")
    assert str(error.value) == "a.jsonl:4: a JSON list; expected one object a line; mend or remove the line"
    with pytest.raises(ValueError, match=r"^a\.jsonl:5: not JSON \(.*\); expected one object a line; mend or remove"):
        parse_line('{"a":', "a.jsonl:5")


def test_a_full_disk_is_named_and_other_errors_are_left_alone(tmp_path):
    full = name_full_disk(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), tmp_path / "x.png")
    assert full.errno == errno.ENOSPC
    assert f"no space left for {tmp_path}/x.png (" in str(full)
    other = PermissionError(errno.EACCES, "no")
    assert name_full_disk(other, tmp_path / "x.png") is other


def write_until_full(path, queue):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
    try:
        append_line(path, {"text": "longer than what is left"})
    except OSError as error:
        queue.put((error.errno, str(error)))


def test_a_line_written_in_part_is_an_error_and_is_mended(tmp_path):
    path = tmp_path / "a.jsonl"
    append_line(path, {"a": 1})
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    process = fork.Process(target=write_until_full, args=(path, queue))
    process.start()
    number, message = queue.get(timeout=60)
    process.join()
    assert number == errno.ENOSPC
    assert f"no space left for {path}" in message
    assert path.read_bytes() == b'{"a": 1}\n{"text": "'
    mend_last_line(path)
    assert list(read_lines(path)) == [{"a": 1}]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_appending_to_a_full_disk_says_so():
    with pytest.raises(OSError, match=r"no space left for /dev/full \(.* MiB free\)"):
        append_line(Path("/dev/full"), {"a": 1})


@pytest.mark.parametrize("text", [r'{"a": "x \ud800 y"}', r'{"\uDFFF": 1}', r'{"a": {"b": ["\uda00\uda00"]}}'])
def test_half_of_a_character_is_refused_wherever_it_stands(text):
    with pytest.raises(
        ValueError, match="^m.jsonl:3: a text of it holds half of a surrogate pair.*mend or remove the line"
    ):
        parse_line(text, "m.jsonl:3")


def test_whole_characters_beyond_the_first_plane_are_taken():
    assert parse_line(r'{"a": "\ud83d\ude00 \\ud800"}', "m.jsonl:3") == {"a": "😀 \\ud800"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "made" / "a.txt"
    write_whole(file, "old")
    with pytest.raises(KeyError), written_whole(file) as partial:
        partial.write_text("half")
        raise KeyError
    assert file.read_text() == "old"
    write_whole(file, "new")
    assert file.read_text() == "new" and list(file.parent.iterdir()) == [file]


def test_a_folder_takes_the_place_of_another(tmp_path):
    draft, folder = tmp_path / "draft", tmp_path / "folder"
    for text in ("old", "new"):
        draft.mkdir()
        (draft / "a.txt").write_text(text)
        replace_folder(draft, folder)
        assert (folder / "a.txt").read_text() == text and list(tmp_path.iterdir()) == [folder]


def write_half_and_die(path):
    with written_whole(path) as partial:
        partial.write_bytes(b"ha")
        os.kill(os.getpid(), signal.SIGKILL)


def write_half_and_wait(path, is_half, may_end):
    with written_whole(path) as partial:
        partial.write_bytes(b"ha")
        is_half.set()
        may_end.wait(60)
        partial.write_bytes(b"whole")


def test_a_sweep_takes_what_the_dead_have_left_and_nothing_of_the_living(tmp_path):
    fork = multiprocessing.get_context("fork")
    is_half, may_end = fork.Event(), fork.Event()
    dead = fork.Process(target=write_half_and_die, args=(tmp_path / "in/dead.json",))
    alive = fork.Process(target=write_half_and_wait, args=(tmp_path / "in/alive.json", is_half, may_end))
    for process in (dead, alive):
        process.start()
    dead.join()
    assert is_half.wait(60)
    left = sorted(path.name for path in (tmp_path / "in").iterdir())
    assert len(left) == 2 and left[1].startswith(".dead.json.")
    long_ago = time.time() - 10 * OLD_SECONDS
    os.utime(tmp_path / "in" / left[0], (long_ago, long_ago))
    assert sweep(tmp_path) == 0, "it lies deeper"
    assert sweep(tmp_path, is_deep=True) == 1
    assert [path.name for path in (tmp_path / "in").iterdir()] == left[:1]
    may_end.set()
    alive.join()
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["alive.json"]
    assert (tmp_path / "in/alive.json").read_text() == "whole"


def test_of_other_machines_only_what_is_old_is_swept(tmp_path):
    elsewhere = tmp_path / f".a.json.{'0' * 12}-{os.getpid()}.partial"
    others = [tmp_path / name for name in (".mine.partial", "x.partial", ".a.json.42.partial", "a.json")]
    for path in (elsewhere, *others):
        path.touch()
    for age, swept in ((OLD_SECONDS - 60, 0), (OLD_SECONDS + 60, 1)):
        for path in (elsewhere, *others):
            os.utime(path, (time.time() - age,) * 2)
        assert sweep(tmp_path) == swept
    assert sorted(tmp_path.iterdir()) == sorted(others) and sweep(tmp_path / "none") == 0
