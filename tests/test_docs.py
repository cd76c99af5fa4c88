"""The README and the pages tell the truth: commands parse, imports are there, code runs, and the site builds.

A comment before a block says what becomes of it: `run` (executed, those of a page one after the other), `check` (run at
the end of a guide), or the name of a command whose configuration the block is. A block with a title is a file that a
guide tells to write, or to change; that is done in a copy of the repository.
"""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from rpo import write_pairs
from rpo.cli.command import config_and_overrides
from rpo.cli.main import ALGORITHMS, COMMANDS, DEFAULTS, _parse
from rpo.config.load import load_config
from rpo.config.settings import describe_fields
from rpo.data.preference import PreferencePair, encode_png
from rpo.shapes.world import draw_scene, render, sample_prompts

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", ROOT / "rpo" / "SKILL.md", *DOCS)}
RUN = ("README.md", "data.md", "sample.md", "select.md", "from_trl.md")
RUN_SLOWLY = ("in_your_code.md", "from_ddpo_pytorch.md", "from_diffusers_dpo.md")
GUIDES = [name for name in PAGES if name.startswith("add_")]
HOMES = ("", "rpo", "rpo/trainers")
"""What paths on a page are relative to."""
OTHERS = {"pip", "pytest", "vllm", "."}
"""Programs that are not ours."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    marker: str
    language: str
    path: str
    text: str


def blocks(page, *languages):
    fence = r'(?:<!-- ([^\n]*?) -->\n)?^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$'
    found = re.findall(fence, PAGES[page], re.DOTALL | re.MULTILINE)
    return [block for block in (Block(*one) for one in found) if block.language in languages]


def commands(page):
    lines = [line for block in blocks(page, "console") for line in block.text.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    for line in filter(None, words):
        start = 0
        for end in [index for index, word in enumerate(line) if word == "&&"] + [len(line)]:
            yield line[start:end]
            start = end + 1


@cache
def keys_of(config):
    return {field.key for field in describe_fields(config)}


def check_rpo(words):
    try:
        args = _parse(words)
    except SystemExit as ended:
        assert ended.code == 0, words  # --help
        return
    if args.command.config:
        path, overrides = config_and_overrides(args) if "config" in args else (None, args.overrides)
        is_ours = path is not None and path.startswith("configs/")
        load_config(args.command.config_class, ROOT / path if is_ours else None, overrides)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_and_has_the_keys_it_is_given(page, capsys):
    for words in commands(page):
        program, *rest = words
        if program == "rpo":
            check_rpo(rest)
        elif program == "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif program in ("bash", "sbatch"):
            assert (ROOT / next(word for word in rest if not word.startswith("-"))).is_file(), words
        elif program == "torchrun":
            check_rpo(rest[rest.index("rpo.cli") + 1 :])
        elif program == "python":
            assert find_spec(rest[1]) if rest[0] == "-m" else (ROOT / rest[0]).is_file(), words
        else:
            assert program in OTHERS, words


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_keys_within_a_sentence_are_there(page):
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE))
    names = (*COMMANDS, *DEFAULTS, *(name.split()[0] for name in COMMANDS), "COMMAND")
    known = set().union(*(keys_of(command.config_class) for command in COMMANDS.values() if command.config))
    known |= {key.rpartition(".")[0] for key in known}
    sections = {key.partition(".")[0] for key in known if "." in key} | {"loop", "grpo", "score_as_action"}
    for span in spans:
        if span.startswith("rpo "):
            assert span.removeprefix("rpo ").startswith(names), span
        key = re.match(r"([a-z_]+)\.[a-z_.]+(?=$|[=: ])", span)
        if key and key[1] in sections and not span.endswith((".py", ".md", ".yaml", ".json", ".jsonl")):
            assert key[0] in known, span


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there_with_what_is_named_in_them(page):
    told = {block.path for block in blocks(page, "python")}
    span = r"`((?:[a-z_]+/)+[\w.]+\.(?:py|yaml|txt|svg))(?:: ([\w, ]+))?`"
    for place, things in re.findall(span, PAGES[page]):
        if place in told or place.startswith("runs/") or "NAME" in place:
            continue
        found = [file for home in HOMES if (file := ROOT / home / place).is_file()]
        assert found, place
        for thing in filter(None, things.split(", ")):
            assert re.search(rf"^\s*(?:def|class) {thing}\b", found[0].read_text(), re.MULTILINE), (place, thing)


@pytest.mark.parametrize("page", PAGES)
def test_configurations_load(page, tmp_path):
    for block in blocks(page, "yaml"):
        file = tmp_path / "run.yaml"
        file.write_text(block.text)
        load_config(COMMANDS[block.marker].config_class, file)


@pytest.mark.parametrize("page", PAGES)
def test_python_parses_and_imports_what_is_there(page):
    written = {block.path.removesuffix(".py").replace("/", ".") for block in blocks(page, "python")}
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module not in written:
                module = import_module(node.module)
                assert not [alias.name for alias in node.names if getattr(module, alias.name, None) is None]
            assert all(find_spec(module) for module in modules)


def demonstration_pairs(folder):
    prompts = sample_prompts("train", 8, seed=0)
    images = [
        encode_png(render(draw_scene(prompt, np.random.default_rng(index)))) for index, prompt in enumerate(prompts)
    ]
    write_pairs(
        folder,
        [PreferencePair(prompts[index].text, images[index], images[index - 1], name=f"{index}") for index in range(8)],
    )


def quick(code):
    """The same with less to do."""
    for name, value in {"updates": "2, progress=False", "prompts": "2", "num_steps": "3", "minibatches": "2"}.items():
        code = re.sub(rf"\b{name}=\d+", f"{name}={value}", code)
    return code


@pytest.mark.filterwarnings("ignore:No LoRA keys")
@pytest.mark.parametrize("page", [*RUN, *(pytest.param(page, marks=pytest.mark.slow) for page in RUN_SLOWLY)])
def test_code_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demonstration_pairs(tmp_path / "pairs")
    names: dict = {}
    for block in blocks(page, "python"):
        if block.marker == "run":
            exec(quick(block.text), names)  # noqa: S102


def test_all_code_that_can_run_is_run():
    assert {page for page in PAGES for block in blocks(page, "python") if block.marker == "run"} == {*RUN, *RUN_SLOWLY}


def patched(text, patch):
    """A file with a patch of context, "-" and "+" lines done; it must fit in one place."""
    lines = patch.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if not line.startswith("+"))
    new = "".join(line[1:] for line in lines if not line.startswith("-"))
    assert text.count(old) == 1, old
    return text.replace(old, new)


@pytest.mark.parametrize("page", GUIDES)
def test_what_a_guide_changes_is_there_to_be_changed(page):
    texts: dict[str, str] = {}
    for block in blocks(page, "diff"):
        texts[block.path] = patched(texts.get(block.path) or (ROOT / block.path).read_text(), block.text)
    assert texts


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_that_is_followed_to_the_letter_works(page, tmp_path):
    (tmp_path / "copy").mkdir()
    for name in ("rpo", "tests", "docs", "configs", "scripts", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / "copy" / name)
    for block in blocks(page, "python", "diff"):
        if block.path:
            file = tmp_path / "copy" / block.path
            file.write_text(patched(file.read_text(), block.text) if block.language == "diff" else block.text)
    for block in blocks(page, "console"):
        for line in block.text.splitlines() if block.marker == "check" else []:
            program, *words = shlex.split(line)
            whole = [sys.executable, *(["-m", "rpo.cli"] if program == "rpo" else []), *words]
            done = subprocess.run(whole, cwd=tmp_path / "copy", capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_page_is_reached_and_every_algorithm_has_one():
    assert set(re.findall(r'"(\w+\.md)"', (ROOT / "zensical.toml").read_text())) == {page.name for page in DOCS}
    for name in ALGORITHMS:
        assert f'settings("train {name}"' in PAGES[f"{name.replace('-', '_')}.md"]


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", PAGES["README.md"])
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


def test_the_site_builds_without_a_warning():
    for module in ("zensical", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module, reason="the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    table = (ROOT / "build/site/dpo.html").read_text()
    assert "<code>max_chosen_error_ratio</code>" in table
    assert "<math" in table
