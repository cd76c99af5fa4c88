"""`rpo config` gives what configs/ holds, from a clone and from a wheel alike."""

import json
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import setuptools

from rpo.cli.configs import configurations
from rpo.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
FILES = {path.name: path for path in (ROOT / "configs").iterdir()}


def test_a_wheel_has_every_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: dict = {}
    monkeypatch.setattr(setuptools, "setup", caught.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    command = caught["cmdclass"]["build_py"](
        setuptools.Distribution({"packages": ["rpo", "rpo.cli"], "script_name": "setup.py"})
    )
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    command.run()
    installed = runpy.run_path(str(tmp_path / "rpo" / "cli" / "configs.py"))["configurations"]()
    assert {path.name: path.read_bytes() for path in installed.values()} == {
        name: path.read_bytes() for name, path in FILES.items()
    }
    assert all(path.is_relative_to(tmp_path) for path in installed.values())


def test_without_a_name_every_one_is_listed_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [name.removesuffix(".yaml") for name in sorted(FILES)]
    assert all(30 < len(line) < 130 for line in lines)


@pytest.mark.parametrize("name", ["grpo_shapes", "grpo_shapes.yaml", "prompts_animals.txt"])
def test_one_is_printed_or_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = configurations()[name.removesuffix(".yaml")].read_text(encoding="utf-8")
    assert main(["config", name]) == 0
    assert capsys.readouterr().out == text
    file = tmp_path / "mine"
    assert main(["config", name, "--output", str(file)]) == 0
    assert file.read_text(encoding="utf-8") == text
    assert main(["config", name, "--output", str(file)]) == 2
    assert f"{file} exists; expected a new file" in capsys.readouterr().err
    assert main(["config", name, "--output", str(tmp_path / "missing" / "mine")]) == 2
    assert f"{tmp_path / 'missing'} is no folder; expected" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()


def test_a_misspelt_name_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "dpo_sd-15"]) == 2
    assert "there is no configuration 'dpo_sd-15'" in (told := capsys.readouterr().err)
    assert "the nearest is 'dpo_sd15'" in told


@pytest.mark.parametrize("name", ["train dpo", "train grpo", "train score-as-action", "align", "curate run"])
def test_the_file_may_be_left_out_and_stand_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[name].config
    assert main([*name.split(), "seed_of_nothing=1"]) == 2
    assert "the override 'seed_of_nothing=1' sets 'seed_of_nothing', but" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("nothing_known: 1\n")
    assert main([*name.split(), "--resume", "output=x", "mine.yaml"]) == 2
    assert "'mine.yaml' sets 'nothing_known', but" in capsys.readouterr().err


def test_schema_of_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        if command.config:
            assert main(["config", "schema", *name.split()]) == 0
            schema = json.loads(capsys.readouterr().out)
            assert set(schema["properties"]) == {one.name for one in fields(command.config_class)}
            assert all(one["description"] for one in schema["properties"].values())
    assert main(["config", "schema", "quickstart", "--output", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["type"] == "object"
    assert main(["config", "schema", "trian", "dpo"]) == 2
    assert "'train dpo'" in capsys.readouterr().err
