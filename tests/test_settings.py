"""Settings made in Python are checked as those of a file are."""

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
from pydantic import Field

from rpo.config.load import load_config, to_yaml
from rpo.config.ranges import NotNegative, Positive
from rpo.config.settings import describe_fields, json_schema, settings
from rpo.errors import InputError
from rpo.runs.align_config import AlignConfig
from rpo.trainers.dpo_config import DPOConfig


@settings
class Part:
    size: int = 1


@settings
class Whole:
    mode: Literal["slow", "fast"] = "slow"
    level: Literal["low", "high"] | None = None
    is_on: bool = False
    count: int = 3
    rate: float | None = 0.5
    name: str = "x"
    place: Path = Path()
    window: tuple[float, float] | None = None
    layers: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    part: Part = field(default_factory=Part)
    spare: Part | None = None
    steps: int | Literal["auto"] = "auto"
    canvas: int | tuple[int, int] | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count is negative")


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("rate", 2, 2.0),
        ("window", [0, 1], (0.0, 1.0)),
        ("rate", np.float32(0.5), 0.5),
        ("count", np.int64(7), 7),
        ("layers", ["a", "b"], ("a", "b")),
        ("canvas", [1, 2], (1, 2)),
        ("place", "a/b", Path("a/b")),
        ("name", Path("a/b"), "a/b"),
        ("weights", {"a": 1}, {"a": 1.0}),
        ("level", None, None),
        ("steps", 7, 7),
        ("spare", Part(3), Part(3)),
        ("part", {"size": 2}, Part(2)),
        ("anything", print, print),
    ],
)
def test_what_passes_for_a_type_becomes_it(name: str, given: object, kept: object) -> None:
    value = getattr(Whole(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("mode", "fats", "Whole sets 'mode' to 'fats', but one of slow, fast is needed; the nearest is 'fast'"),
        ("mode", None, "Whole sets 'mode' to null, but one of slow, fast is needed"),
        ("level", "hihg", "sets 'level' to 'hihg', but one of low, high or null is needed; the nearest is 'high'"),
        ("is_on", "false", "sets 'is_on' to 'false', but true or false is needed; the default is false"),
        ("is_on", 1, "sets 'is_on' to 1, but true or false"),
        ("count", 2.0, "sets 'count' to 2.0, but a whole number is needed"),
        ("count", True, "sets 'count' to True, but a whole number is needed"),
        ("rate", "0.5", "sets 'rate' to '0.5', but a number"),
        ("name", 5, "sets 'name' to 5, but text is needed"),
        ("window", (0, 1, 2), r"sets 'window' to \(0, 1, 2\), but a list \(a number, a number\)"),
        ("canvas", [1, "x"], r"^Whole sets 'canvas' to \[1, 'x'\], but a whole number or a list .* or null is needed"),
        ("layers", "to_q", r"sets 'layers' to 'to_q', but a list \(each text\) is needed"),
        ("layers", ("to_q", 3), r"sets 'layers\[1\]' to 3, but text is needed"),
        ("weights", {"a": "much"}, r"sets 'weights.a' to 'much', but a number is needed"),
        ("weights", ["a"], r"sets 'weights' to \['a'\], but a mapping \(each a number\) is needed"),
        ("part", 3, "sets 'part' to 3, but a section with keys size is needed"),
        ("part", {"sise": 1}, "sets 'part.sise', .* the nearest is 'part.size'"),
        ("part", {"size": 0.5}, "sets 'part.size' to 0.5, but a whole number is needed"),
        ("steps", "atuo", "sets 'steps' to 'atuo', but a whole number or one of auto is needed; the nearest is 'auto'"),
    ],
)
def test_another_type_is_refused(name: str, given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Whole(**{name: given})
    with pytest.raises(ValueError, match=message):
        replace(Whole(), **{name: given})


def test_arguments_are_those_of_a_dataclass() -> None:
    assert Part(3) == Part(size=3)
    with pytest.raises(InputError, match="'size' to 0.5"):
        Part(0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises((TypeError, InputError)):
        Part(1, 2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        Part(1, size=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(InputError, match="nearest is 'size'"):
        Part(sise=2)  # pyright: ignore[reportCallIssue]


def test_its_own_check_comes_after() -> None:
    with pytest.raises(ValueError, match="count is negative"):
        Whole(count=-1)
    with pytest.raises(AttributeError):
        Whole().count = 5


@settings
class Pairwise:
    kind: Literal["dpo"] = "dpo"
    margin: NotNegative = 0.5
    """How far."""
    shared: int = 1


@settings
class Single:
    kind: Literal["kto"] = "kto"
    desirable_weight: Positive = 1.0
    """Of good images."""
    shared: int = 2

    def __post_init__(self) -> None:
        if self.desirable_weight == 13:
            raise InputError("desirable_weight is 13, which is unlucky; give 12")


@settings
class Run:
    objective: Annotated[Pairwise | Single, Field(discriminator="kind")] = field(
        default_factory=lambda: Pairwise(margin=2.0)
    )
    """What is descended."""
    extra: Annotated[Pairwise | Single, Field(discriminator="kind")] | None = None
    learning_rate: Positive = 1e-3
    whole: Whole = field(default_factory=Whole)

    renamed: ClassVar = {
        "lr": "learning_rate is its name now",
        "whole.how": "it is now whole.mode",
        "old": "the section is gone; see whole",
    }


def load(tmp_path: Path, text: str, *words: str) -> Run:
    (tmp_path / "run.yaml").write_text(text)
    return load_config(Run, tmp_path / "run.yaml", words)


def test_every_wrong_value_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, "learning_rate: -1\nwhole: {count: 1.5, nmae: x}\n", "objective.margin=.nan", "whole.mode=fats")
    first, *rest = str(caught.value).split("\n")
    assert "5 settings" in first
    for key, who, needed in (
        ("objective.margin", "the override 'objective.margin=.nan'", "a number"),
        ("learning_rate", "run.yaml'", "a number above 0"),
        ("whole.mode", "the override 'whole.mode=fats'", "nearest is 'fast'"),
        ("whole.count", "run.yaml'", "a whole number is needed; the default is 3"),
        ("whole.nmae", "run.yaml'", "nearest is 'whole.name'"),
    ):
        [line] = [line for line in rest if f"sets '{key}'" in line]
        assert who in line and needed in line
    with pytest.raises(InputError, match="2 settings(.|\n)*'count'(.|\n)*'rate'"):
        Whole(count=1.5, rate="x")  # pyright: ignore[reportArgumentType]


def test_one_of_several_kinds(tmp_path: Path) -> None:
    assert load(tmp_path, "{}").objective == Pairwise(margin=2.0)
    assert load(tmp_path, "objective: {shared: 5}").objective == Pairwise(margin=2.0, shared=5)
    assert load(tmp_path, "objective: {kind: dpo}").objective == Pairwise(margin=2.0)
    assert load(tmp_path, "{}", "objective.kind=kto", "objective.desirable_weight=2").objective == Single(
        desirable_weight=2.0
    )
    assert load(tmp_path, "extra: {kind: kto}").extra == Single()
    assert load(tmp_path, "extra: {kind: kto, shared: 3}", "extra=null").extra is None
    assert Run(objective=Single()).objective == Single()
    config = load(tmp_path, "extra: {kind: dpo}", "objective.kind=kto")
    assert load(tmp_path, to_yaml(config)) == config


def test_who_names_another_kind_begins_the_section_anew(tmp_path: Path) -> None:
    text = "objective: {margin: 1, shared: 7}"
    for words in (["objective.kind=kto"], ["objective={kind: kto}"]):
        assert load(tmp_path, text, *words).objective == Single(shared=2)
    assert load(tmp_path, text, "objective.kind=dpo").objective == Pairwise(margin=1.0, shared=7)
    # The order of words is nothing to them: what is said beside the kind is said of it.
    assert load(tmp_path, text, "objective.shared=9", "objective.kind=kto").objective == Single(shared=9)
    with pytest.raises(InputError, match="'objective.margin'.* is kto.*belongs to kind dpo"):
        load(tmp_path, text, "objective.margin=3", "objective.kind=kto")


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("{}", ["objective.desirable_weight=2"], "objective.desirable_weight.* is dpo.*belongs to kind kto"),
        ("{}", ["objective.kind=kot"], "'objective.kind' to 'kot'.*one of dpo, kto.*nearest is 'kto'"),
        ("{}", ["objective=kto"], "'objective' to 'kto'.*section"),
        ("extra: {shared: 1}", [], "'extra.kind' to null.*one of dpo, kto"),
        ("{}", ["objective.kind=kto", "objective.desirable_weight=-1"], "'objective.desirable_weight' to -1.* above 0"),
        ("{}", ["objective.kind=kto", "objective.desirable_weight=13"], "unlucky"),
        ("objective: {kind: kto}", ["objective.desirable_wieght=1"], "nearest is 'objective.desirable_weight'"),
        ("{}", ["objective.kind=3"], "'objective.kind' to 3.*one of dpo, kto"),
        ("objective: [1]", [], "'objective' to .*section"),
        ("1: 2", [], "sets '1'"),
    ],
)
def test_another_kind_is_refused(tmp_path: Path, text: str, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, text, *words)


def test_the_keys_of_every_kind_are_described() -> None:
    shown = {(info.key, info.default): info for info in describe_fields(Run)}
    assert shown["objective.kind", "dpo"].type_name == "one of dpo, kto"
    assert shown["objective.margin", "2.0"].kind == "dpo" and shown["objective.margin", "2.0"].doc == "How far."
    assert shown["objective.shared", "2"].kind == "kto" and shown["learning_rate", "0.001"].kind == ""
    assert shown["extra.kind", "null"].type_name == "one of dpo, kto or null"


@pytest.mark.parametrize(
    ("word", "advice"),
    [("lr=1", "learning_rate is its name now"), ("whole.how=fast", "now whole.mode"), ("old.key.there=1", "see whole")],
)
def test_a_renamed_setting_answers_with_its_new_name(tmp_path: Path, word: str, advice: str) -> None:
    with pytest.raises(InputError, match=f"the override '{word}' sets .*{advice}"):
        load(tmp_path, "{}", word)


def test_a_renamed_setting_of_a_section_answers_with_its_whole_key() -> None:
    for cls, section in ((DPOConfig, ""), (AlignConfig, "dpo.")):
        for old, new in (("beta", "objective.beta"), ("lora_alpha", "adapter.alpha"), ("loop.updates", "learning")):
            with pytest.raises(InputError, match=f"sets '{section}{old}', but it is {section}{new} now"):
                load_config(cls, None, [f"{section}{old}=1"])
        with pytest.raises(InputError, match=f"sets '{section}region.is_on', but a region that is null is off"):
            load_config(cls, None, [f"{section}region.is_on=false"])


def test_the_schema_says_what_is_checked() -> None:
    schema = json_schema(Run)
    assert schema["properties"]["learning_rate"]["exclusiveMinimum"] == 0
    assert schema["additionalProperties"] is False
    assert schema["properties"]["objective"]["description"] == "What is descended."
    assert schema["$defs"]["Single"]["properties"]["desirable_weight"]["description"] == "Of good images."
    assert schema["$defs"]["Whole"]["properties"]["mode"]["enum"] == ["slow", "fast"]
