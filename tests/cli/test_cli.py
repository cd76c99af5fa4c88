"""The `rpo` command: dispatch, help, and what a person sees when something is wrong."""

import argparse
import os
import runpy
import subprocess
import sys
from collections.abc import Callable

import pytest

from rpo import __version__
from rpo.cli.command import overrides
from rpo.cli.main import COMMANDS, Command, main
from rpo.errors import InputError


def put_in_place(monkeypatch: pytest.MonkeyPatch, name: str, run: Callable[[argparse.Namespace], None]) -> None:
    known = COMMANDS[name]
    monkeypatch.setitem(COMMANDS, name, Command(known.summary, known.add_arguments, run, known.config))


def raiser(error: BaseException) -> Callable[[argparse.Namespace], None]:
    def run(_: argparse.Namespace) -> None:
        raise error

    return run


def seen(monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    """The arguments that the handler of the named command gets."""
    caught: list[argparse.Namespace] = []
    for name in COMMANDS:
        put_in_place(monkeypatch, name, caught.append)
    assert main(words) == 0
    return caught[0]


HELP = "import sys, time, rpo.cli.main\ntry: rpo.cli.main.main(['--help'])\nfinally: "


def test_help_imports_no_torch() -> None:
    code = HELP + "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("quickstart", "train", "data", "shapes"):
        assert word in done.stdout


@pytest.mark.slow  # by the clock: for an idle machine
def test_help_is_fast() -> None:
    code = HELP + "assert time.process_time() < 1"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As in `rpo config list | head -1`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "rpo.cli", "config", "list"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_of_no_command_loads_what_it_would_run() -> None:
    code = f"""
import contextlib, rpo.cli.main, sys
for name in {list(COMMANDS)}:
    with contextlib.suppress(SystemExit):
        rpo.cli.main.main([*name.split(), "--help"])
    heavy = {{"diffusers", "transformers", "peft", "accelerate", "datasets"}}
    print([name, *sorted(heavy & set(sys.modules))], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [str([name]) for name in COMMANDS]


@pytest.mark.parametrize(("given", "expected"), [({}, "passive 1000"), ({"OMP_WAIT_POLICY": "active"}, "active None")])
def test_waiting_threads_sleep_after_a_moment_unless_the_person_chose(given: dict[str, str], expected: str) -> None:
    code = """
import os, rpo.cli.main
try: rpo.cli.main.main(["--version"])
except SystemExit: print(os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT"))
"""
    free = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], env=free | given, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == expected


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"rpo {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_describes_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rpo.config.settings import describe_fields

    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert COMMANDS[name].summary in shown
    if module_and_class := COMMANDS[name].config:
        module, _, class_name = module_and_class.partition(":")
        config = vars(sys.modules[module])[class_name]
        for setting in describe_fields(config):
            assert f"{setting.key}={setting.default}" in shown
            assert setting.doc, f"{setting.key} has no docstring"


def test_overrides_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    args = seen(monkeypatch, "train", "dpo", "run.yaml", "a=1", "--resume", "b.c=2", "--output", "runs/x", "d=3")
    assert (args.config, args.overrides, args.resume, args.output) == (
        "run.yaml",
        ["a=1", "b.c=2", "d=3"],
        True,
        "runs/x",
    )


def test_overrides_of_one_call_do_not_leak_into_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, "quickstart", "--resume", "a=1").overrides == ["a=1"]
    assert seen(monkeypatch, "quickstart").overrides == []


def test_output_is_an_override(monkeypatch: pytest.MonkeyPatch) -> None:
    args = seen(monkeypatch, "quickstart", "a=1", "--output", "7")
    assert overrides(args) == ["a=1", 'output="7"']


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstart", "--rsume"], "unrecognized arguments: --rsume"),
        (["data", "check", "x", "a=1"], "unrecognized arguments: a=1"),
        (["data", "check"], "the following arguments are required: PATH"),
        (["trian"], "invalid choice: 'trian'"),
    ],
)
def test_wrong_words_exit_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        InputError("beta is -1, but a positive number is needed;\n  use 80"),
        PermissionError(13, "Permission denied", "pairs"),
        OSError(28, "No space left on device"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_in_place(monkeypatch, "quickstart", raiser(error))
    assert main(["quickstart"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"rpo: error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize("words", [["--debug", "quickstart"], ["quickstart", "--debug"]])
def test_debug_shows_the_traceback(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_in_place(monkeypatch, "quickstart", raiser(InputError("no")))
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("InputError: no\n")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch, "quickstart", raiser(TypeError("a defect")))
    with pytest.raises(TypeError, match="a defect"):
        main(["quickstart"])


def test_interrupt_says_how_to_resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    put_in_place(monkeypatch, "quickstart", raiser(KeyboardInterrupt()))
    assert main(["quickstart"]) == 130
    expected = "\nrpo: interrupted; run the same command with --resume to continue from the last checkpoint\n"
    assert capsys.readouterr().err == expected


def test_interrupt_of_what_cannot_resume_promises_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_in_place(monkeypatch, "data check", raiser(KeyboardInterrupt()))
    assert main(["data", "check", "x"]) == 130
    assert capsys.readouterr().err == "\nrpo: interrupted\n"


def test_misspelt_key_is_an_error_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "ruonds=3"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "ruonds" in line and "'rounds'" in line


def test_every_wrong_key_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "ruonds=3", "batch_size=-1", "seed=x"]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith("rpo: error: 3") and [line[:2] for line in lines] == ["- "] * 3


def test_exit_code_reaches_the_shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rpo", "quickstart", "ruonds=3"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("rpo.cli", run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("rpo: error: ")
