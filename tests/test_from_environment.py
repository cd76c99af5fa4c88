"""What comes from the environment is used as it is, and written down as it was written."""

import copy
import pickle
from dataclasses import asdict, field, replace
from functools import partial
from typing import Any, Literal

import pytest

from rpo.config.load import load_config, to_yaml
from rpo.config.settings import settings
from rpo.files.local_paths import without_paths
from rpo.from_environment import FromEnvironment, as_written
from rpo.runs.align_config import AlignConfig
from rpo.runs.settings import keep_settings, require_same_settings
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.identity import settings_identity
from rpo.training.loop_config import LoopConfig, plain

SECRET = "hf_very-secret"  # noqa: S105, it is none


@settings
class Inner:
    key: str = ""
    names: tuple[str, ...] = ()
    free: dict[str, Any] = field(default_factory=dict)
    maybe: str | None = None
    kind: Literal["one", "two"] = "one"
    number: int = 0


@settings
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


def test_a_run_of_several_stages_notices_another_environment(tmp_path, monkeypatch):
    words = [
        "curate.critic.model=${oc.env:SECRET}",
        "curate.critic.prompt=x/${oc.env:SECRET}",
        "output=${oc.env:PLACE}",
    ]

    def started(secret, place="here"):
        monkeypatch.setenv("SECRET", secret)
        monkeypatch.setenv("PLACE", place)
        return load_config(AlignConfig, None, words)

    same = partial(require_same_settings, tmp_path, resume=True, free=("output",))
    keep_settings(tmp_path, started(SECRET))
    kept = (tmp_path / "settings.yaml").read_text()
    assert SECRET not in kept and "${oc.env:SECRET}" in kept
    same(started(SECRET, place="there"))
    with pytest.raises(ValueError, match=r"\$\{oc.env:SECRET\} has another value in the environment; x/\$") as caught:
        same(started("hf_newer"))
    assert SECRET not in str(caught.value) and "hf_newer" not in str(caught.value)


def test_the_identity_of_a_run_changes_with_the_environment_and_does_not_show_it(monkeypatch):
    def told(value):
        monkeypatch.setenv("SECRET", value)
        word = "adapter.target_modules=[to_q,'${oc.env:SECRET}']"
        return [settings_identity(load_config(cls, None, [word]), ()) for cls in (GRPOConfig, DPOConfig)]

    first, again, other = told(SECRET), told(SECRET), told("to_k")
    assert first == again
    for here, there in zip(first, other, strict=True):
        assert [name for name in here if here[name] != there[name]] == [next(n for n in here if "target_modules" in n)]
        assert SECRET not in repr(here) and "${oc.env:SECRET}" in repr(here)
    loop = load_config(LoopConfig, None, ["trackers=['${oc.env:SECRET}']"])
    assert plain(loop)["trackers"] == ["${oc.env:SECRET}"] and loop.trackers == ("to_k",)
