"""Numbers that mean nothing are refused where they are set, by key, before anything is loaded."""

import ast
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from rpo.trainers.online_config import AdapterConfig, LearningConfig, RolloutConfig
from rpo.trainers.online_settings import OnlineSettings
from torch import nn

from rpo.cli.main import COMMANDS, main
from rpo.config import load_config
from rpo.curation.editors.pipeline_editor import EditSettings
from rpo.ranges import Range
from rpo.settings import field_types
from rpo.training.loop_config import LoopConfig

CONFIGS = Path(__file__).parent.parent / "configs"
CLASSES = {
    name: vars(import_module(command.config.partition(":")[0]))[command.config.partition(":")[2]]
    for name, command in COMMANDS.items()
    if command.config
}


def sections(cls: type, key: str = "") -> Iterator[tuple[str, type]]:
    yield key, cls
    for name, hint in field_types(cls).items():
        for part in (hint, *get_args(hint)):
            if isinstance(part, type) and is_dataclass(part):
                yield from sections(part, f"{key}{name}.")


def settings_classes() -> Iterator[type]:
    """Every class under `@settings`, wherever it is."""
    for file in sorted((CONFIGS.parent / "rpo").rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "settings" in map(ast.unparse, node.decorator_list):
                module = ".".join(file.relative_to(CONFIGS.parent).with_suffix("").parts)
                yield vars(import_module(module))[node.name]


REQUIRED: dict[type, dict[str, Any]] = {
    EditSettings: {"num_steps": 1, "guidance_scale": 1.0},
    OnlineSettings: {
        **{"rollout": RolloutConfig(), "learning": LearningConfig(), "adapter": AdapterConfig(), "loop": LoopConfig()},
        **{"preview_every": 0, "folder": "x", "seed": 0, "whole": None, "skips_clean_end": False, "has_ratio": False},
        **{"method": "x", "preflight": False},
    },
}
"""What the classes need that have no defaults."""
MAY_BE_HUGELY_NEGATIVE = {
    "DecideConfig.min_chosen",
    *(f"{run}.rewards" for run in ("OnlineRunConfig", "GRPO", "ScoreAsAction")),
}
MAY_BE_INFINITE = {"LoopConfig.max_grad_norm", "DPOConfig.max_chosen_error_ratio"}
MAY_BE_EMPTY = {
    *(
        f"{cls}Config.{name}"
        for cls in ("Chat", "Critic", "Instructor", "Judge")
        for name in ("model", "base_url", "prompt")
    ),
    *(f"EditorConfig.{name}" for name in ("model", "base_model")),
    *(f"SourceConfig.{name}" for name in ("path", "lora")),
    *(f"DecideConfig.{name}" for name in ("similarity_model", "min_chosen")),
    *(f"CurateConfig.{name}" for name in ("evaluation", "part")),
    *("DataConfig.source", "OnlineSettings.method", "LoopConfig.trackers", "PreferenceConfig.time_weights"),
}
"""Where nothing has a meaning of its own, or a command that needs it says so (DataConfig.source)."""


def with_in_place(hint: Any, value: Any) -> Iterator[Any]:
    """Values of a type with `value` in the place of a number or text, wherever it has one of that kind."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from with_in_place(args[0], value)
    elif hint in (int, float) and isinstance(value, float):
        yield int(value) if hint is int and math.isfinite(value) else value
    elif hint is str and isinstance(value, str):
        yield value
    elif origin in (Union, UnionType):
        yield from (one for member in args for one in with_in_place(member, value))
    elif origin is tuple:
        length = 1 if args[-1] is Ellipsis else len(args)
        yield from ((one,) * length for one in with_in_place(args[0], value))
    elif origin in (dict, Mapping):
        yield from ({"shapes": one} for one in with_in_place(args[1], value))


def name_of(cls: type, field: str) -> str:
    run = {"rpo.runs.grpo": "GRPO", "rpo.runs.score_as_action": "ScoreAsAction"}
    return f"{run.get(cls.__module__, cls.__name__)}.{field}"


def taken(bad: Any) -> set[str]:
    """The fields of all classes that take a value; every refusal must name its field."""
    found = set()
    for cls in settings_classes():
        for name, hint in field_types(cls).items():
            for value in with_in_place(hint, bad):
                try:
                    cls(**{**REQUIRED.get(cls, {}), name: value})
                except ValueError as error:
                    assert re.search(rf"\b{name}\b", str(error))
                else:
                    found.add(name_of(cls, name))
    return found


def test_no_settings_object_takes_a_number_that_means_nothing() -> None:
    assert len(list(settings_classes())) > 25
    assert taken(math.nan) == set()
    assert taken(-math.inf) == set()
    assert taken(-1e9) == MAY_BE_HUGELY_NEGATIVE
    assert taken(math.inf) == MAY_BE_INFINITE


def test_no_settings_object_takes_blank_text_where_it_means_nothing() -> None:
    assert taken(" ") | taken("") <= MAY_BE_EMPTY


def test_no_settings_object_takes_an_empty_list_or_mapping_where_it_means_nothing() -> None:
    found = set()
    for cls in settings_classes():
        for name, hint in field_types(cls).items():
            inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
            empty = {dict: {}, Mapping: {}, tuple: ()}.get(get_origin(inner))
            if empty is not None:
                try:
                    cls(**{name: empty})
                except ValueError as error:
                    assert f"sets '{name}' to {empty!r}, but" in str(error)
                else:
                    found.add(name_of(cls, name))
    assert found <= MAY_BE_EMPTY


@pytest.mark.parametrize(
    ("range_", "inside", "outside"),
    [
        (Range(), [-1e308, 0, 1e308], [math.nan, math.inf, -math.inf]),
        (Range(at_least=1), [1, 2, 10**300], [0, -1, 0.999, 10**400, math.nan, math.inf]),
        (Range(above=0), [5e-324], [0, -0.0, -1, math.nan, math.inf]),
        (Range(above=0, or_inf=True), [1, math.inf], [0, math.nan, -math.inf]),
        (Range(at_least=0, at_most=1), [0, 1, 0.5], [-1e-9, 1.0000001, math.nan]),
        (Range(at_least=0, below=0.5), [0, 0.4999], [0.5, 1, math.nan]),
        (Range(above=0, at_most=1), [1], [0, 1.1]),
        (Range(other_than=0), [-1, 1e-9], [0, 0.0, math.inf, math.nan]),
    ],
    ids=lambda one: str(one) if isinstance(one, Range) else "",
)
def test_what_lies_in_a_range(range_: Range, inside: list[float], outside: list[float]) -> None:
    assert [one for one in inside if one not in range_] == []
    assert [one for one in outside if one in range_] == []


def wrong_numbers(kind: type, note: Range) -> Iterator[float]:
    """As near outside as there is, and what is no number to count with."""
    step = 1 if kind is int else 1e-6
    if kind is float:
        yield from (math.nan, -math.inf, *(() if note.or_inf else (math.inf,)))
    for bound, nearest in ((note.at_least, -step), (note.above, 0), (note.at_most, step), (note.below, 0)):
        if bound is not None:
            yield kind(bound + nearest)


def wrong_words() -> dict[tuple[type, str, float], tuple[str, str, str]]:
    """The command, key and word of every wrong number of every field, once for each class it stands in."""
    found: dict[tuple[type, str, float], tuple[str, str, str]] = {}
    for command, cls in CLASSES.items():
        for key, part in sections(cls):
            for name, hint in field_types(part).items():
                for alone in (one for one in (hint, *get_args(hint)) if get_origin(one) is Annotated):
                    kind, note = get_args(alone)
                    if not isinstance(note, Range):
                        continue
                    for number in wrong_numbers(kind, note) if get_origin(hint) not in (tuple, dict, Mapping) else ():
                        word = str(number) if math.isfinite(number) else f".{number}".replace(".-", "-.")
                        found.setdefault((part, name, number), (command, f"{key}{name}", word))
    return found


def test_every_wrong_number_of_every_class_is_refused_by_its_key() -> None:
    words = wrong_words().values()
    assert len(words) > 300
    for command, key, word in words:
        with pytest.raises(ValueError, match=r"to .*, but .* is needed") as caught:
            load_config(CLASSES[command], None, [f"{key}={word}"])
        assert f"sets '{key}' to" in str(caught.value)


TRAIN = {
    "train dpo": "dpo_shapes.yaml",
    "train grpo": "grpo_shapes.yaml",
    "train score-as-action": "score_as_action_shapes.yaml",
    "curate run": "curate_shapes.yaml",
    "align": "align_shapes.yaml",
}
BY_HAND = {
    "train dpo": """dpo.beta=.inf dpo.beta=.nan dpo.sft_weight=.inf dpo.rank=0 dpo.rank=-1 dpo.lora_alpha=-1
        dpo.lora_alpha=0 dpo.resolution=0 dpo.resolution=7 dpo.caption_dropout=1.5 dpo.pairs_per_update=0
        dpo.loop.learning_rate=.inf dpo.loop.adam_beta1=1 dpo.loop.ema_decay=0 dpo.loop.checkpoint_every=0
        dpo.loop.warmup_updates=100000 dpo.loop.weight_decay=-1 dpo.loop.max_grad_norm=.nan data.limit=0
        dpo.objective.time_weights=[1,.nan] dpo.region.anchor=.inf dpo.seed=-1""",
    "train grpo": """grpo.max_advantage=-1 grpo.max_advantage=.inf grpo.clip=.nan grpo.kl_weight=.inf
        grpo.rollout.guidance_scale=.nan grpo.rollout.guidance_scale=.inf grpo.rollout.prompts=0 grpo.rollout.eta=.nan
        grpo.learning.window=[-1,0.5] grpo.learning.window=[0.5,0.2] grpo.adapter.alpha=0 grpo.adapter.rank=0
        grpo.preview_every=-1 evaluate_images=-1 rewards={shapes:0} rewards={shapes:.nan} grpo.history=0""",
    "train score-as-action": """score_as_action.trust_region_target=.nan score_as_action.trust_region_target=-1
        score_as_action.trust_region_target=0 score_as_action.max_advantage=0 score_as_action.value.learning_rate=0
        score_as_action.value.updates=-1 score_as_action.value.batch_size=0 score_as_action.value.channels=0
        score_as_action.value.reward_until=1.1 score_as_action.value.trace=-0.1 score_as_action.trace=2
        score_as_action.value.pretrain_rollouts=-1 score_as_action.value.pretrain_updates=-1""",
    "curate run": """source.guidance_scale=.nan source.guidance_scale=.inf source.eta=2 source.num_steps=0
        source.images_per_prompt=0 source.limit=0 decide.min_distance=.nan decide.max_distance=-1
        decide.max_similarity=2 decide.rewards={shapes-clip:-1} decide.min_chosen={shapes-clip:.inf}
        editor.guidance_scale=.nan editor.image_guidance_scale=.inf editor.num_steps=0 editor.batch_size=0
        critic.concurrency=0 critic.timeout_seconds=.inf critic.timeout_seconds=0 critic.max_tokens=0
        critic.temperature=.nan critic.max_retries=-1 instructor.temperature=-1 chunk=0 score_batch_size=0""",
    "align": "rounds=0 max_pairs=0 held_out.count=0 held_out.guidance_scale=.nan held_out.eta=-1 dpo.beta=0",
    "quickstart": """prompts=0 images_per_prompt=0 evaluation_prompts=0 batch_size=0 seed=-1 dpo.loop.updates=0
        curate.editor.batch_size=0""",
}


@pytest.mark.parametrize(
    ("command", "word"), [(name, word) for name, words in BY_HAND.items() for word in words.split()]
)
def test_a_command_ends_in_one_line_that_names_the_key_and_loads_nothing(
    command: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(*_: object, **__: object) -> None:
        raise AssertionError("a network was made before the settings were checked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "__init__", made)
    file = [str(CONFIGS / TRAIN[command])] if command in TRAIN else []
    assert main([*command.split(), *file, word.replace(":", ": ")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert word.partition("=")[0].rpartition(".")[2] in line
    assert list(tmp_path.iterdir()) == []
