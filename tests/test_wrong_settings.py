"""Wrong values, generated from the schema of every command: each is refused by its key before anything is loaded."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from rpo.cli.main import COMMANDS
from rpo.config.load import load_config
from rpo.config.settings import json_schema
from rpo.errors import InputError

Keys = dict[str, list[dict[str, Any]]]
"""What the schema lets a key be, one for each type that it may have."""

CLASSES = {name: command.config_class for name, command in COMMANDS.items() if command.config}
NUMBERS = {".nan": math.nan, ".inf": math.inf, "-.inf": -math.inf, "-1": -1, "0": 0, "1e30": 1e30}
MAY_BE_INFINITE = {"max_grad_norm", "max_chosen_error_ratio", "max_rejected_error_ratio"}


def keys(part: dict[str, Any], root: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for name, one in part.get("properties", {}).items():
        forms = [referred(form, root) for form in one.get("anyOf", one.get("oneOf", [one]))]
        forms = [inner for form in forms for inner in members(form, root)]
        yield f"{prefix}{name}", forms
        for form in forms:
            yield from keys(form, root, f"{prefix}{name}.")


def members(form: dict[str, Any], root: dict[str, Any]) -> list[dict[str, Any]]:
    return [referred(inner, root) for inner in form["oneOf"]] if "oneOf" in form else [form]


def referred(form: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    return root["$defs"][form["$ref"].rpartition("/")[2]] if "$ref" in form else form


def all_keys() -> dict[str, Keys]:
    """The keys of every command; one that commands share counts where it comes first."""
    found: dict[str, Keys] = {}
    seen = set[str]()
    for command, cls in CLASSES.items():
        schema = json_schema(cls)
        for key, forms in keys(schema, schema):
            name = f"{key.rpartition('.')[2]} {forms}"
            if name not in seen:
                found.setdefault(command, {})[key] = forms
            seen.add(name)
    return found


def admits(form: dict[str, Any], number: float) -> bool:
    """Whether the schema lets a key be that number."""
    if form.get("type") not in ("integer", "number") or not math.isfinite(number):
        return False
    if form["type"] == "integer" and number != int(number):
        return False
    return (
        number >= form.get("minimum", -math.inf)
        and number <= form.get("maximum", math.inf)
        and number > form.get("exclusiveMinimum", -math.inf)
        and number < form.get("exclusiveMaximum", math.inf)
    )


def wrong_numbers() -> Iterator[tuple[str, str, str]]:
    """Command, key and word of everything that a number must not be."""
    for command, of_command in all_keys().items():
        for key, forms in of_command.items():
            if not any(form.get("type") in ("integer", "number") for form in forms):
                continue
            yield from ((command, key, word) for word in ("many", "[1]", "true", "{a: 1}"))
            if not any(form.get("type") == "null" for form in forms):
                yield command, key, ""
            for word, number in NUMBERS.items():
                is_bound = number == math.inf and key.rpartition(".")[2] in MAY_BE_INFINITE
                if not is_bound and not any(admits(form, number) for form in forms):
                    yield command, key, word


def misspelt_choices() -> Iterator[tuple[str, str, str]]:
    for command, of_command in all_keys().items():
        for key, forms in of_command.items():
            words = [word for form in forms for word in form.get("enum", [form["const"]] if "const" in form else [])]
            if words and not any(form.get("type") == "string" and form.keys() <= {"type"} for form in forms):
                yield from ((command, key, json.dumps(f"{word}x")) for word in words if isinstance(word, str))


def is_refused(command: str, key: str, word: str) -> bool:
    """Whether a word is refused; any other error than that of wrong input is one of rpo."""
    try:
        load_config(CLASSES[command], None, [f"{key}={word}"])
    except InputError as error:
        assert f"'{key}" in str(error) or key.rpartition(".")[2] in str(error)
        return True
    return False


def test_every_wrong_number_is_refused_by_its_key() -> None:
    cases = list(wrong_numbers())
    assert len(cases) > 400
    assert [case for case in cases if not is_refused(*case)] == []


def test_every_misspelt_choice_is_refused_by_its_key() -> None:
    cases = list(misspelt_choices())
    assert len(cases) > 50
    assert [case for case in cases if not is_refused(*case)] == []


def test_no_number_may_be_senselessly_large() -> None:
    numeric = [
        (command, key)
        for command, of_command in all_keys().items()
        for key, forms in of_command.items()
        if any(form.get("type") in ("integer", "number") for form in forms)
    ]
    assert len(numeric) > 80
    assert [one for one in numeric if not is_refused(*one, "1e30")] == []


@pytest.mark.parametrize("word", ["1e400", "-1e400", "123456789012345678901234567890", "1" * 400, "'1'", "0x1", "1_0"])
def test_strange_numbers_end_in_no_other_error(word: str) -> None:
    for key in ("dpo.beta", "dpo.rank", "dpo.loop.updates", "dpo.loop.max_grad_norm", "dpo.seed"):
        is_refused("train dpo", key, word)
