"""Strict configuration: what is accepted, and the exact words for what is not."""

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Literal

import pytest

from rpo.config.load import differences, load_config, to_yaml
from rpo.config.settings import FieldInfo, describe_fields, settings


@settings
class Loop:
    learning_rate: float = 1e-4
    """Step size of the optimizer,
    usually 1e-5 … 1e-3."""
    updates: int = 10
    """Optimizer steps."""


@settings
class Train:
    loop: Loop = field(default_factory=Loop)
    beta: float = 80.0
    """Strength of the preference."""
    link: Literal["sigmoid", "ipo"] = "sigmoid"
    name: str = "first"
    levels: tuple[int, ...] = (1, 2)
    betas: tuple[float, float] = (0.9, 0.999)
    output: Path | None = None
    is_cached: bool = True
    warmup: int | Literal["auto"] = "auto"
    spare: Loop | None = None
    weights: dict[str, float] = field(default_factory=dict)


@settings
class Needy:
    pairs: str


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def complaint(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(Train, None, overrides)
    return str(caught.value)


def test_nothing_set_gives_the_defaults() -> None:
    assert load_config(Train) == Train()


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "beta: 5\nlink: ipo\nloop:\n  updates: 3\n  learning_rate: 3e-4\n")
    config = load_config(Train, path, ["loop.updates=4", "beta=6"])
    assert config == Train(loop=Loop(learning_rate=3e-4, updates=4), beta=6.0, link="ipo")
    assert isinstance(config.beta, float)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("beta=1e-4", "beta", 1e-4),
        ("levels=[3,4,5]", "levels", (3, 4, 5)),
        ("levels=[]", "levels", ()),
        ("betas=[0,1]", "betas", (0.0, 1.0)),
        ("output=runs/a=b", "output", Path("runs/a=b")),
        ("output=null", "output", None),
        ("is_cached=false", "is_cached", False),
        ("warmup=7", "warmup", 7),
        ("name='no'", "name", "no"),
        ("spare.updates=3", "spare", Loop(updates=3)),
        ("weights={pick: 1, clip: 0.5}", "weights", {"pick": 1.0, "clip": 0.5}),
    ],
)
def test_values_take_the_type_of_their_field(override: str, name: str, value: object) -> None:
    assert vars(load_config(Train, None, [override]))[name] == value


def test_interpolation_is_resolved(tmp_path: Path) -> None:
    path = written(tmp_path, "name: big\noutput: runs/${name}\n")
    assert load_config(Train, path, ["name=small"]).output == Path("runs/small")


def test_written_yaml_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(Train, None, ["name='no'", "beta=1e-12", "output=a/b", "spare.updates=2", "weights.clip=1"])
    assert load_config(Train, written(tmp_path, to_yaml(config))) == config


def test_yaml_holds_every_default() -> None:
    assert to_yaml(Loop()) == "learning_rate: 0.0001\nupdates: 10\n"


def test_unknown_key_in_a_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path, "loop:\n  updtes: 3\n")
    with pytest.raises(ValueError) as caught:
        load_config(Train, path)
    assert str(caught.value) == f"'{path}' sets 'loop.updtes', but Train has no such key; the nearest is 'loop.updates'"


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("bta=1", "bta", "beta"),
        ("learning_rate=1", "learning_rate", "loop.learning_rate"),
        ("lop.updates=1", "lop.updates", "loop.updates"),
        ("spare.update=1", "spare.update", "spare.updates"),
    ],
)
def test_unknown_override_is_named_with_the_nearest(override: str, key: str, nearest: str) -> None:
    expected = f"the override '{override}' sets '{key}', but Train has no such key; the nearest is '{nearest}'"
    assert complaint(override) == expected


@pytest.mark.parametrize(
    ("override", "rest"),
    [
        ("beta=high", "'beta' to 'high', but a number is needed; the default is 80.0"),
        ("beta=true", "'beta' to True, but a number is needed; the default is 80.0"),
        ("beta=", "'beta' to null, but a number is needed; the default is 80.0"),
        ("loop.updates=1.5", "'loop.updates' to 1.5, but a whole number is needed; the default is 10"),
        ("is_cached=1", "'is_cached' to 1, but true or false is needed; the default is true"),
        ("link=hinge", "'link' to 'hinge', but one of sigmoid, ipo is needed; give one of these"),
        ("warmup=off", "'warmup' to False, but a whole number or one of auto is needed; the default is auto"),
        ("name=5", "'name' to 5, but text is needed; put it in quotes"),
        ("levels=3", "'levels' to 3, but a list (each a whole number) is needed; the default is [1, 2]"),
        ("levels=[1,x]", "'levels[1]' to 'x', but a whole number is needed; change it"),
        ("betas=[1]", "'betas' to [1], but a list (a number, a number) is needed; the default is [0.9, 0.999]"),
        ("loop=3", "'loop' to 3, but a section with keys learning_rate, updates is needed; change it"),
        ("weights.pick=x", "'weights.pick' to 'x', but a number is needed; change it"),
    ],
)
def test_wrong_type_says_what_is_needed(override: str, rest: str) -> None:
    assert complaint(override) == f"the override '{override}' sets {rest}"


def test_wrong_type_in_a_file_names_the_file_unless_an_override_set_it(tmp_path: Path) -> None:
    path = written(tmp_path, "beta: high\n")
    with pytest.raises(ValueError, match=f"^'{path}' sets 'beta' to 'high'"):
        load_config(Train, path)
    with pytest.raises(ValueError, match="^the override 'beta=low' sets 'beta' to 'low'"):
        load_config(Train, path, ["beta=low"])


def test_missing_value_is_named() -> None:
    with pytest.raises(ValueError, match="^Needy needs pairs, which is not set; set it$"):
        load_config(Needy)


def test_word_without_equals_sign() -> None:
    assert complaint("beta") == "the override 'beta' is not of the form key=value; write for example seed=1"


def test_interpolation_of_a_key_that_is_not_there() -> None:
    assert complaint("name=${nope}").startswith("the configuration of Train does not resolve: Interpolation key 'nope'")


@pytest.mark.parametrize("text", ["beta: [", "beta: 1\nbeta: 2\n"])
def test_broken_yaml_names_the_file(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=f"^'{path}' cannot be read as YAML: "):
        load_config(Train, path)


def test_a_list_is_no_configuration(tmp_path: Path) -> None:
    path = written(tmp_path, "- 1\n")
    with pytest.raises(ValueError, match="holds a list, but a configuration is lines of `key: value`"):
        load_config(Train, path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^there is no configuration file '{tmp_path / 'no.yaml'}'"):
        load_config(Train, tmp_path / "no.yaml")


def test_fields_are_described_by_the_text_under_them() -> None:
    described = describe_fields(Train)
    assert described[0] == FieldInfo(
        "loop.learning_rate", "a number", "0.0001", "Step size of the optimizer, usually 1e-5 … 1e-3."
    )
    assert described[2] == FieldInfo("beta", "a number", "80.0", "Strength of the preference.")
    assert FieldInfo("output", "a path or null", "null", "") in described
    assert describe_fields(Needy) == [FieldInfo("pairs", "text", "required", "")]


@settings
class Weighed:
    rewards: Mapping[str, float] = field(default_factory=lambda: {"own": 1.0})
    train: Train = field(default_factory=lambda: Train(weights={"inner": 4.0}))


@pytest.mark.parametrize(
    ("words", "rewards", "weights"),
    [
        ([], {"a": 1.0, "b": 2.0}, {"c": 3.0}),
        (["rewards={d: 4}"], {"d": 4.0}, {"c": 3.0}),
        (["rewards={}"], {}, {"c": 3.0}),
        (["rewards={d: 4}", "rewards={e: 5}"], {"e": 5.0}, {"c": 3.0}),
        (["rewards.b=0", "rewards.d=4"], {"a": 1.0, "b": 0.0, "d": 4.0}, {"c": 3.0}),
        (["rewards.d=4", "rewards={e: 5}"], {"e": 5.0}, {"c": 3.0}),
        (["rewards={e: 5}", "rewards={d: 4}", "rewards={e: 5}"], {"e": 5.0}, {"c": 3.0}),
        (["train={weights: {d: 4}}"], {"a": 1.0, "b": 2.0}, {"d": 4.0}),
        (["train.weights={d: 4}", "train.beta=1"], {"a": 1.0, "b": 2.0}, {"d": 4.0}),
    ],
)
def test_a_mapping_of_free_names_is_one_value(tmp_path: Path, words: list[str], rewards: dict, weights: dict) -> None:
    file = written(tmp_path, "rewards: {a: 1, b: 2}\ntrain: {weights: {c: 3}}\n")
    config = load_config(Weighed, file, words)
    assert (config.rewards, config.train.weights) == (rewards, weights)


def test_one_name_is_set_in_the_default_mapping_too() -> None:
    config = load_config(Weighed, None, ["rewards.d=4", "train.weights.d=5"])
    assert (config.rewards, config.train.weights) == ({"own": 1.0, "d": 4.0}, {"inner": 4.0, "d": 5.0})


def test_differences_are_of_settings_and_not_of_their_text() -> None:
    old = Weighed(rewards={"a": 1.0, "b": 2.0}, train=Train(beta=1.0, loop=Loop(updates=3)))
    assert differences(old, replace(old)) == {}
    assert differences(old, replace(old, rewards={"b": 2.0, "a": 1.0})) == {
        "rewards": "was {'a': 1.0, 'b': 2.0} and is now {'b': 2.0, 'a': 1.0}"
    }
    other = replace(old, train=replace(old.train, beta=3.0, output=Path("x"), loop=Loop(updates=1)))
    assert differences(old, other) == {
        "train.loop.updates": "was 3 and is now 1",
        "train.beta": "was 1.0 and is now 3.0",
        "train.output": "was None and is now 'x'",
    }


@settings
class Inner:
    rate: float = 0.1
    """Of learning."""
    steps: int = 10
    """How many."""


@settings
class Outer:
    inner: Inner = field(default_factory=lambda: Inner(rate=0.5, steps=99))
    """Its defaults differ from those of the class."""
    spare: Inner | None = Inner(rate=0.7)


def test_a_section_keeps_its_own_defaults_where_it_is_not_set() -> None:
    assert load_config(Outer, None, ["inner.steps=3"]) == Outer(inner=Inner(rate=0.5, steps=3))
    assert load_config(Outer, None, ["spare.steps=3"]) == Outer(spare=Inner(rate=0.7, steps=3))
    shown = {info.key: info.default for info in describe_fields(Outer)}
    assert shown == {"inner.rate": "0.5", "inner.steps": "99", "spare.rate": "0.7", "spare.steps": "10"}
