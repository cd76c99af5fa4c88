"""What the pages of the documentation take from the code, so that they cannot go stale; and equations without scripts.

A page with `render_macros: true` at its top may call the functions that `define_env` names.
"""

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

from rpo.cli.main import COMMANDS
from rpo.config.settings import FieldInfo, describe_fields
from rpo.training.log import METRICS

FIGURES = Path(__file__).parents[1] / "benchmarks"
"""Where benchmarks draw what the pages show."""

GENERAL = "of the run itself"


def define_env(env: Any) -> None:
    """Name what pages may call."""
    for function in (settings, metrics, commands, figure, table):
        env.macro(function)


def settings(command: str, *sections: str, leave_out: Iterable[str] = ()) -> str:
    """Tables of the settings of a command, a heading for each section.

    Args:
        sections: Which of them, such as "adapter"; all by default, "" for the keys outside of sections.
        leave_out: Sections to leave out.
    """
    config = COMMANDS[command].config_class
    found: dict[str, list[FieldInfo]] = {}
    for field in describe_fields(config):
        section = field.key.rpartition(".")[0]
        found.setdefault(f"{section} of kind {field.kind}" if field.kind else section, []).append(field)
    wanted = {
        name: fields
        for name, fields in found.items()
        if (not sections or _first(name) in sections) and _first(name) not in leave_out
    }
    if not wanted:
        raise ValueError(f"{command!r} has no settings in {sections}; it has {', '.join(found)}")
    return "\n\n".join(_heading(name) + _table(fields) for name, fields in wanted.items())


def metrics(area: str) -> str:
    """A table of what is logged under "loop", "dpo", "reward", "policy" or "value"."""
    rows = [f"| `{name}` | {_cell(text)} |" for name, text in METRICS.items() if name.startswith(f"{area}/")]
    return "\n".join(["| metric | what it is |", "|---|---|", *rows])


def commands() -> str:
    """A table of all commands."""
    rows = [f"| `rpo {name}` | {_cell(command.summary)} |" for name, command in COMMANDS.items()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def figure(name: str, caption: str) -> str:
    """A figure of a benchmark, inside the page."""
    data = b64encode((FIGURES / f"{name}.svg").read_bytes()).decode()
    return f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'


def table(name: str, *place: str) -> str:
    """A table of a benchmark, as its report wrote it into the file of its results.

    Args:
        name: Of the benchmark.
        place: What the table is found by, such as the reward and what it is about.
    """
    found: Any = json.loads((FIGURES / f"{name}.json").read_bytes())["tables"]
    for one in place:
        found = found[one]
    return found


def equation(source: str, language: str, css_class: str, options: Mapping[str, Any], md: Any, **_: Any) -> str:
    """An equation as MathML, which browsers draw by themselves; each line of the source is one of the equation."""
    lines = [line.strip() for line in source.strip().splitlines() if line.strip()]
    return "\n".join(f'<div class="{css_class}">{convert(line, display="block")}</div>' for line in lines)


def _first(name: str) -> str:
    return name.split(" ")[0].split(".")[0]


def _heading(name: str) -> str:
    return f"#### `{name.replace(' of kind ', '` of kind `')}`\n\n" if name else f"#### {GENERAL}\n\n"


def _table(fields: Iterable[FieldInfo]) -> str:
    cells = ((f"`{one.key}`", _code(one.default), _cell(one.type_name), _cell(one.doc)) for one in fields)
    rows = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(["| key | default | what it takes | what it is |", "|---|---|---|---|", *rows])


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
