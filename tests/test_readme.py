"""The README is short, its tree names what is there, and the configurations that it names load; see `test_docs.py`."""

import re
from pathlib import Path

import pytest

from rpo.cli.main import ALGORITHMS, COMMANDS
from rpo.config.load import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMAND_OF = {name.replace("-", "_"): f"train {name}" for name in ALGORITHMS} | {
    "curate": "curate run",
    "align": "align",
    "quickstart": "quickstart",
    "study": "study",
}


def test_it_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 150


def test_the_tree_names_every_folder_and_what_lies_beside_them():
    tree = README.split("## The tree")[1].split("```")[1]
    named = {name for line in tree.splitlines() for name in line.strip().split("   ")[0].split()}
    package = {f"{path.parent.name}/" for path in (ROOT / "rpo").rglob("*/__init__.py")} - {"rpo/"}
    leaves = {path.name for path in (ROOT / "rpo").glob("*.py")} - {"__init__.py"}
    others = {"rpo/", "pipelines/", "configs/", "examples/", "benchmarks/", "scripts/", "docs/", "tests/"}
    assert named == package | leaves | others


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_loads_and_says_command_hardware_and_expectation(path):
    command = next(command for name, command in COMMAND_OF.items() if path.stem.startswith(name))
    load_config(COMMANDS[command].config_class, path)
    header = re.split(r"^\w+:", path.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    assert all(word in header for word in ("# command", "# hardware", "# expected"))
