"""What an installation gets: the wheel, its metadata, and the constraints it is tested with."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import rpo

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BROUGHT_BY = {
    "PIL": "pillow",
    "fsspec": "datasets",
    "pyarrow": "datasets",
    "yaml": "omegaconf",
}
"""Modules that a requirement of another name installs, and hands out in its own interface."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel, built from a copy so that the checkout stays as it is."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "rpo", source / "rpo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    return ZipFile(next((source / "dist").glob("*.whl")))


def test_wheel_holds_every_file_of_the_package(wheel: ZipFile) -> None:
    tracked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "rpo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if name.startswith("rpo/")}
    assert packed == tracked


@pytest.mark.parametrize(
    "part",
    [
        "rpo/py.typed",
        "rpo/reports/templates/report.html.j2",
        "rpo/shapes/assets/model_index.json",
        "rpo/words/assets/model_index.json",
    ],
)
def test_wheel_holds(part: str, wheel: ZipFile) -> None:
    assert part in wheel.namelist()


@pytest.mark.parametrize(("part", "mebibytes"), [("checkpoint", 10), ("editor", 12), ("proxy", 6), ("tokens", 12)])
def test_embedded_weights_are_small(part: str, mebibytes: int, wheel: ZipFile) -> None:
    sizes = dict.fromkeys(("checkpoint", "editor", "proxy", "tokens"), 0)
    for info in wheel.infolist():
        _, is_asset, name = info.filename.partition("rpo/shapes/assets/")
        folder = name.partition("/")[0]
        if is_asset:
            sizes[folder if folder in sizes else "checkpoint"] += info.file_size
    assert 0 < sizes[part] <= mebibytes * 2**20


BUILT_FROM = ("rpo", "configs", "examples", "setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE")
QUICKLY = ["source.limit=12", "source.images_per_prompt=4", "progress=false"]
QUICKLY = [f"curate.{word}" for word in QUICKLY] + ["held_out.count=4", "dpo.pairs_per_update=8"]
QUICKLY += [f"dpo.learning.{word}" for word in ("updates=3", "warmup_updates=0", "micro_batch=8", "progress=false")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_new_user_finds_all_that_the_readme_names(tmp_path: Path) -> None:
    """The whole wheel in an environment of its own, outside the source tree; what it needs is that of this one."""
    (source := tmp_path / "source").mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    made = next(tmp_path.glob("rpo-*.whl"))
    assert made.stat().st_size <= 45e6
    venv.create(tmp_path / "env", with_pip=False)
    binaries = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    own = next((tmp_path / "env").rglob("site-packages"))
    (own / "needed.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")  # of a folder named so no .pth is read
    install = [*pip, "--python", str(binaries / "python"), "install", "--no-deps", "--no-index", str(made)]
    subprocess.run(install, check=True, capture_output=True, cwd=tmp_path)
    shutil.rmtree(source)
    (home := tmp_path / "home").mkdir()
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def rpo_says(*words: str) -> str:
        done = subprocess.run([binaries / "rpo", *words], cwd=home, capture_output=True, text=True, env=outside)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert Path(rpo_says("skill", "--path").strip()).is_relative_to(own)
    assert "train_dpo.py" in rpo_says("config", "list")
    for name in ("quickstart", "dpo_shapes", "train_dpo.py"):
        rpo_says("config", "copy", name)
    rpo_says("quickstart", *QUICKLY)
    rpo_says("plan", "dpo", "dpo_shapes.yaml", "data.source=runs/quickstart/round-1/pairs")
    lora = ["--lora", "runs/quickstart/lora"]
    drawn = ["sample", "shapes", "--prompts", "a red circle", "--steps", "4", "--reward", "shapes"]
    rpo_says(*drawn, *lora, "--sweep", "strength=0:1:0.5")
    assert (home / "runs/sample/sheet.png").is_file()
    rpo_says("reproduce", "runs/quickstart", "--check")
    ast.parse((home / "train_dpo.py").read_text("utf-8"))


def test_wheel_metadata(wheel: ZipFile) -> None:
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {rpo.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert b"rpo = rpo.cli.main:main" in wheel.read(f"{info}/entry_points.txt")
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_every_requirement_has_a_lower_bound_and_nothing_more() -> None:
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]:
        assert re.search(r"^[^<=!~,]+>=[\d.]+[^<=!~,]*$", text.split(";")[0]), text


def test_no_extra_touches_torch() -> None:
    assert not [text for extra in EXTRAS.values() for text in extra if Requirement(text).name == "torch"]


def test_constraints_pin_all_that_is_needed_and_match_the_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    for text in [*PROJECT["dependencies"], *EXTRAS["dev"]]:
        needed = Requirement(text)
        assert needed.specifier.contains(pins[needed.name.lower().replace("_", "-")]), text


def test_every_constraint_installs_on_the_oldest_python_that_is_taken() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    refused = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, pin, pinned = line.partition("==")
        with suppress(PackageNotFoundError):  # of an extra that is not installed
            if (
                pin
                and version(name) == pinned
                and not SpecifierSet(metadata(name)["Requires-Python"] or "").contains(oldest)
            ):
                refused.append(line)
    assert refused == []


def test_declared_requirements_are_those_that_are_imported() -> None:
    declared = {Requirement(text).name.lower().replace("-", "_") for text in PROJECT["dependencies"]}
    optional = {Requirement(text).name.lower() for extra in EXTRAS.values() for text in extra}
    found: set[str] = set()
    for node in (
        node for path in (ROOT / "rpo").rglob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8")))
    ):
        if isinstance(node, ast.Import):
            found |= {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    needed = {BROUGHT_BY.get(name, name) for name in found - sys.stdlib_module_names - {"rpo"} - (optional - declared)}
    assert needed == declared


def test_installed_requirements_meet_the_bounds() -> None:
    for text in PROJECT["dependencies"]:
        needed = Requirement(text)
        try:
            assert needed.specifier.contains(version(needed.name), prereleases=True), text
        except PackageNotFoundError:
            pytest.fail(f"{text} is not installed")
    assert requires("torch") is not None
