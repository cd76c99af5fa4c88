"""What comes from the environment is used as it is, and written down as it was written."""

import copy
import pickle
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pytest

from rpo.config import load_config, to_yaml
from rpo.from_environment import FromEnvironment, as_written
from rpo.local_paths import without_paths

SECRET = "hf_very-secret"  # noqa: S105, it is none


@dataclass(frozen=True)
class Inner:
    key: str = ""
    names: tuple[str, ...] = ()
    free: dict[str, Any] = field(default_factory=dict)
    maybe: str | None = None
    kind: Literal["one", "two"] = "one"
    number: int = 0


@dataclass(frozen=True)
class Outer:
    key: str = ""
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.setenv("KIND", "two")
    monkeypatch.setenv("NUMBER", "7")

    def loaded(text, *overrides):
        (tmp_path / "a.yaml").write_text(text)
        return load_config(Outer, tmp_path / "a.yaml", overrides)

    return loaded


WRITTEN = [
    ("key: ${oc.env:SECRET}", lambda one: one.key, SECRET, "${oc.env:SECRET}"),
    ("key: http://host/${oc.env:SECRET}/v1", lambda one: one.key, f"http://host/{SECRET}/v1", None),
    ("key: ${oc.env:NONE,${oc.env:SECRET}}", lambda one: one.key, SECRET, "${oc.env:NONE,${oc.env:SECRET}}"),
    ("key: '${oc.env:NONE, a b}'", lambda one: one.key, "a b", "${oc.env:NONE, a b}"),
    ("key: ${oc.decode:${oc.env:SECRET}}", lambda one: one.key, SECRET, "${oc.decode:${oc.env:SECRET}}"),
    ("key: x-${inner.key}\ninner: {key: '${oc.env:SECRET}'}", lambda one: one.key, f"x-{SECRET}", None),
    ("inner: {names: [a, '${oc.env:SECRET}']}", lambda one: one.inner.names[1], SECRET, None),
    ("inner: {free: {a: {b: ['${oc.env:SECRET}']}}}", lambda one: one.inner.free["a"]["b"][0], SECRET, None),
    ("inner: {maybe: '${oc.env:SECRET}'}", lambda one: one.inner.maybe, SECRET, None),
    ("inner: {key: '${oc.env:SECRET}'}\nkey: ${inner.key}", lambda one: one.key, SECRET, "${oc.env:SECRET}"),
]


@pytest.mark.parametrize(("text", "get", "value", "written"), WRITTEN)
def test_a_value_is_used_and_its_reference_written(load, tmp_path, text, get, value, written):
    config = load(text)
    assert get(config) == value
    kept = to_yaml(config)
    assert SECRET not in kept and "oc.env" in kept
    if written:
        assert written in kept
    (tmp_path / "kept.yaml").write_text(kept)
    again = load_config(Outer, tmp_path / "kept.yaml")
    assert again == config and to_yaml(again) == kept


def test_an_override_is_as_good_as_a_line_of_a_file(load):
    config = load("{}", "inner.key=${oc.env:SECRET}")
    assert config.inner.key == SECRET and SECRET not in to_yaml(config)


def test_choices_and_numbers_may_come_from_the_environment(load):
    config = load("inner: {kind: '${oc.env:KIND}', number: '${oc.decode:${oc.env:NUMBER}}'}")
    assert (config.inner.kind, config.inner.number) == ("two", 7)
    with pytest.raises(ValueError, match="sets 'inner.number' to") as caught:
        load("inner: {number: '${oc.env:SECRET}'}")
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match="SECRET") as caught:
        load("inner: {kind: '${oc.env:SECRET}'}")
    assert SECRET not in str(caught.value)


def test_the_reference_survives_copies_and_is_what_is_shown(load):
    config = load("inner: {key: '${oc.env:SECRET}'}")
    for one in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config, key="x")):
        assert one.inner.key == SECRET and SECRET not in to_yaml(one)
    assert asdict(config)["inner"]["key"] == SECRET
    assert SECRET not in repr(config) and SECRET not in repr(asdict(config))


def test_plain_data_with_references():
    value = FromEnvironment("/home/x/y", "${oc.env:PLACE}")
    assert as_written({"a": [value, ("b", value)], "c": 1}) == {
        "a": ["${oc.env:PLACE}", ("b", "${oc.env:PLACE}")],
        "c": 1,
    }
    assert without_paths(as_written([value])) == ["${oc.env:PLACE}"]
