"""`rpo config` gives what configs/ and examples/ hold, from a clone and from a wheel; `rpo skill` what agents read."""

import json
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import setuptools
import yaml

from rpo.cli.configs import configurations
from rpo.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
FILES = {path.name: path for path in (ROOT / "configs").iterdir()}
EXAMPLES = {path.name: path for path in (*ROOT.glob("examples/*.py"), *ROOT.glob("examples/notebooks/*.ipynb"))}


def test_a_wheel_has_every_configuration_and_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    module = runpy.run_path(str(tmp_path / "rpo" / "cli" / "configs.py"))
    for known, files in (("configurations", FILES), ("examples", EXAMPLES)):
        installed = module[known]()
        assert {path.name: path.read_bytes() for path in installed.values()} == {
            name: path.read_bytes() for name, path in files.items()
        }
        assert all(path.is_relative_to(tmp_path) for path in installed.values())
    assert not list((tmp_path / "rpo").rglob("__pycache__"))


def test_without_a_name_every_one_is_listed_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["config"], ["config", "list"]):
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        names = [name.removesuffix(".yaml") for name in sorted(FILES)]
        assert [line.split()[0] for line in lines] == [*names, *sorted(EXAMPLES)]
        assert all(30 < len(line) < 130 for line in lines)


@pytest.mark.parametrize("name", ["grpo_shapes", "grpo_shapes.yaml", "prompts_animals.txt"])
def test_one_is_printed_or_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = configurations()[name.removesuffix(".yaml")].read_text(encoding="utf-8")
    for words in (["config"], ["config", "show"]):
        assert main([*words, name]) == 0
        assert capsys.readouterr().out == text
    file = tmp_path / "mine"
    assert main(["config", name, "--output", str(file)]) == 0
    assert file.read_text(encoding="utf-8") == text
    assert main(["config", name, "--output", str(file)]) == 2
    assert f"{file} exists; expected a new file" in capsys.readouterr().err
    assert main(["config", name, "--output", str(tmp_path / "missing" / "mine")]) == 2
    assert f"{tmp_path / 'missing'} is no folder; expected" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()


def test_one_is_copied_to_its_own_name_a_folder_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for words, place in [
        (["dpo_shapes"], "dpo_shapes.yaml"),
        (["dpo_shapes", "mine"], "mine/dpo_shapes.yaml"),
        (["dpo_shapes", "mine/other.yaml"], "mine/other.yaml"),
        (["train_dpo.py"], "train_dpo.py"),
    ]:
        assert main(["config", "copy", *words]) == 0
        assert capsys.readouterr().out == f"{place}\n"
        source = FILES if place.endswith(".yaml") else EXAMPLES
        assert (tmp_path / place).read_bytes() == source[words[0] + ".yaml" * (source is FILES)].read_bytes()
    assert main(["config", "copy", "dpo_shapes"]) == 2
    assert "dpo_shapes.yaml exists" in capsys.readouterr().err
    assert main(["config", "copy", "dpo_shapes", "none/mine.yaml"]) == 2
    assert "none is no folder" in capsys.readouterr().err


def test_the_skill_is_printed_and_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["skill"]) == 0
    text = capsys.readouterr().out
    assert main(["skill", "--path"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text("utf-8") == text
    _, header, body = text.split("---\n", 2)
    assert {"name", "description"} == yaml.safe_load(header).keys()
    assert len(body.splitlines()) < 200


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
