"""What cannot be loaded is told in one line before an image is drawn or read, and before anybody is asked."""

import errno
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest

from rpo import shapes
from rpo.cli.main import main
from rpo.curation import generate
from rpo.curation.components import load_critic
from rpo.curation.curate import curate
from rpo.curation.curate_config import ChatConfig, CurateConfig, DecideConfig, EditorConfig, SourceConfig
from rpo.curation.judge import load_judge
from rpo.curation.records import Unavailable
from rpo.errors import InputError
from tests.curation.fakes import FakeCritic, FakeEditor, FakeInstructor, fakes, image_folder
from tests.curation.tiny_editors import tiny_controlnet
from tests.curation.vlm.tiny_vlm import save_tiny_vlm
from tests.rewards.clip_models import save_clip
from tests.tiny import save_tiny_sd
from tests.tiny_editors import tiny_pix2pix

HERE = __name__


class TakesNothing:
    """A component whose maker forgot the configuration."""

    def __init__(self):
        pass


class Failing:
    """A component whose maker raises what a test says."""

    error: ClassVar[Exception]

    def __init__(self, config):
        raise self.error


def wants_no_batches(config):
    return FakeEditor(batch_size=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Damaged models of every kind, by name; each made when it is asked for."""
    root = tmp_path_factory.mktemp("models")
    makers: dict[str, Callable[[Path], object]] = {
        "vlm": save_tiny_vlm,
        "clip": save_clip,
        "ip2p": lambda path: tiny_pix2pix().save_pretrained(path),
        "controlnet": lambda path: tiny_controlnet().save_pretrained(path),
        "base": lambda path: save_tiny_sd(path),
    }

    @cache
    def damaged(kind):
        folder = root / kind
        folder.mkdir()
        if kind != "empty":
            makers[kind](folder)
            for weights in folder.rglob("*.safetensors"):
                weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        return str(folder)

    return damaged


CASES = {
    "critic, no such kind": (lambda m: {"critic": ChatConfig(kind="shape")}, "there is no critic of kind 'shape'"),
    "critic, no such module": (
        lambda m: {"critic": ChatConfig(kind="no.module:Critic")},
        r"critic .*'no.module:Critic' cannot be imported",
    ),
    "critic, made wrongly": (
        lambda m: {"critic": ChatConfig(kind=f"{HERE}:TakesNothing")},
        r"the critic of kind '.*:TakesNothing' cannot be made \(TypeError: .*positional argument.*\); expected",
    ),
    "critic, no model": (
        lambda m: {"critic": ChatConfig(kind="local", model=m("empty"))},
        "'.*/empty' does not load as an image-text-to-text model of transformers",
    ),
    "critic, half a model": (
        lambda m: {"critic": ChatConfig(kind="local", model=m("vlm"), device="cpu")},
        r"the critic of kind 'local' and model '.*/vlm' cannot be made \(SafetensorError: .*\); expected .* whole$",
    ),
    "critic, no prompt": (
        lambda m: {"critic": ChatConfig(kind="server", model="m", base_url="http://127.0.0.1:1/v1", prompt="none.txt")},
        "prompt 'none.txt' cannot be read",
    ),
    "instructor, half a model": (
        lambda m: {"instructor": ChatConfig(kind="local", model=m("vlm"), device="cpu")},
        r"the instructor of kind 'local' and model '.*/vlm' cannot be made \(SafetensorError",
    ),
    "instructor, no name of a model": (
        lambda m: {"instructor": ChatConfig(kind="server", base_url="http://127.0.0.1:1/v1")},
        "a server is to be asked, but model is empty",
    ),
    "editor, no model": (
        lambda m: {"editor": EditorConfig(model=m("empty"))},
        "'.*/empty' does not load as a StableDiffusionInstructPix2PixPipeline",
    ),
    "editor, half a model": (
        lambda m: {"editor": EditorConfig(kind="instruct_pix2pix", model=m("ip2p"), device="cpu")},
        "^(the editor of kind .* and model )?'.*/ip2p' (cannot be made|does not load)",  # parts are loaded in any order
    ),
    "editor, half a controlnet": (
        lambda m: {"editor": EditorConfig(kind="controlnet", model=m("controlnet"), base_model=m("base"))},
        "'.*/controlnet' does not load as a ControlNetModel",
    ),
    "editor, no images at once": (
        lambda m: {"editor": EditorConfig(kind=f"{HERE}:wants_no_batches")},
        r"stage 'edits': the editor \(kind fake, model brush\) has batch_size 0; expected at least 1; change that",
    ),
    "filter, no such reward": (
        lambda m: {"decide": DecideConfig(rewards={"clip-scores": 0.0})},
        "there is no reward 'clip-scores'; expected one of",
    ),
    "filter, no model": (
        lambda m: {"decide": DecideConfig(rewards={f"clip-score:{m('empty')}": 0.0})},
        r"the reward 'clip-score:.*/empty' of decide.rewards cannot be loaded \(\w+: no CLIP reward .*\); exp",
    ),
    "filter, half a model": (
        lambda m: {"decide": DecideConfig(rewards={f"pick-score:{m('clip')}": 0.0})},
        r"the reward 'pick-score:.*/clip' of decide.rewards cannot be loaded \(SafetensorError: .*\); expected a",
    ),
    "evaluation, no such reward": (lambda m: {"evaluation": "shape"}, "there is no reward 'shape'"),
    "evaluation, half a model": (
        lambda m: {"evaluation": f"clip-score:{m('clip')}"},
        "the reward that evaluates cannot be loaded",
    ),
    "similarity, no model": (
        lambda m: {"decide": DecideConfig(similarity_model=m("empty"))},
        "decide.similarity_model cannot be loaded",
    ),
    "similarity, half a model": (
        lambda m: {"decide": DecideConfig(similarity_model=m("clip"))},
        "decide.similarity_model cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_loaded_is_told_before_anything_is_done(name, models, tmp_path):
    changes, message = CASES[name]
    base = CurateConfig(
        output=str(tmp_path / "run"),
        source=SourceConfig(kind="folder", path=str(image_folder(tmp_path / "source", 2))),
        evaluation="",
        progress=False,
    )
    config = replace(base, **changes(models))

    def refuse():
        raise AssertionError("was asked")

    others = fakes(critic=FakeCritic(before=refuse), instructor=FakeInstructor(before=refuse), editor=FakeEditor())
    about = name.split(",", maxsplit=1)[0]
    given = replace(others, **{about: None}) if about in ("critic", "instructor", "editor") else others
    with pytest.raises(ValueError, match=message):
        curate(config, components=given)
    assert not (tmp_path / "run").exists(), "nothing was drawn, and nothing is left"


@pytest.mark.parametrize(
    "error", [ValueError("no"), ImportError("no"), FileNotFoundError(errno.ENOENT, "no"), KeyError("no")]
)
def test_whatever_a_maker_raises_names_the_component(monkeypatch, error):
    monkeypatch.setattr(Failing, "error", error, raising=False)
    told = rf"the critic of kind '{HERE}:Failing' and model 'm' cannot be made \({type(error).__name__}: .*no.*\); exp"
    with pytest.raises(InputError, match=told) as caught:
        load_critic(ChatConfig(kind=f"{HERE}:Failing", model="m"))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [InputError("mine"), Unavailable("down"), OSError(errno.EACCES, "no"), OSError(errno.ENOSPC, "full")]
)
def test_what_says_itself_what_is_wrong_passes_as_it_is(monkeypatch, error):
    monkeypatch.setattr(Failing, "error", error, raising=False)
    with pytest.raises(type(error)) as caught:
        load_critic(ChatConfig(kind=f"{HERE}:Failing"))
    assert caught.value is error


def test_a_judge_that_cannot_be_made_is_told_likewise(models):
    with pytest.raises(
        ValueError, match=r"the judge of kind 'local' and model '.*/vlm' cannot be made \(SafetensorError"
    ):
        load_judge(ChatConfig(kind="local", model=models("vlm"), device="cpu"))


def test_without_the_editor_of_shapes_nothing_is_drawn(monkeypatch, tmp_path, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("was drawn")

    monkeypatch.setattr(generate, "sample", refuse)
    monkeypatch.setattr(shapes, "editor_path", lambda: shapes._check(tmp_path, "editor", "pretrain_editor"))
    assert main(["curate", "run", "source.limit=2", "progress=false", "--output", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"rpo: error: the shapes editor in {tmp_path} lacks model_index.json, unet/diffusion_")
    assert line.endswith(
        "install rpo again, or train it with `python -m scripts.shapes.pretrain_editor` of rpo's repository"
    )
    assert not (tmp_path / "run").exists()
