"""Small deterministic components, a folder of small images, and a child process that can be killed."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from rpo.curation.curate import Components, CurateConfig, curate
from rpo.curation.curate_config import ChatConfig, DecideConfig, EditorConfig, SourceConfig
from rpo.curation.records import Critique, Edit, Fault, History, Instructions, Problem, Scores, Source
from rpo.curation.store.address import Store
from rpo.curation.store.mark import STAGES, read_marks
from rpo.curation.store.run import CurationRun, claim
from rpo.curation.store.shard import Shard, load, seal
from rpo.curation.worker import tally_of


def picture(seed, size=(12, 10)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def number_of(image):
    """A number that depends on all pixels, so that the fakes treat every image differently and always the same."""
    return int(np.asarray(image, np.int64).sum())


def image_folder(path: Path, count: int) -> Path:
    """Images with captions beside them."""
    path.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(index).save(path / f"{index:03}.png")
        (path / f"{index:03}.txt").write_text(f"caption {index}")
    return path


def brightness(images, prompts):
    """A reward: any number that an edit changes."""
    return images.mean((1, 2, 3))


def greenness(images, prompts):
    """Another."""
    return images[:, 1].mean((1, 2))


@dataclass
class Hook:
    """Kills the process in the middle of the n-th call of a component."""

    at: int = 0
    calls: int = 0

    def __call__(self):
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class FakeCritic:
    identity: Mapping[str, str] = field(default_factory=lambda: {"kind": "fake", "model": "eye", "prompt_sha256": "1"})
    batch_size: int = 3
    concurrency: int = 1
    before: Callable[[], None] = lambda: None

    def __call__(self, images, captions):
        self.before()
        return [self.one(image) for image in images]

    def one(self, image):
        number = number_of(image)
        if number % 11 == 0:
            return Fault("parse_error", "no JSON", "It is a lovely picture.")
        if number % 5 == 0:
            return Critique(problems=(), overall=10)
        return Critique(problems=(Problem(what=f"number {number}", severity=2),), overall=3)


@dataclass
class FakeInstructor:
    identity: Mapping[str, str] = field(default_factory=lambda: {"kind": "fake", "model": "pen", "prompt_sha256": "2"})
    batch_size: int = 2
    concurrency: int = 1
    before: Callable[[], None] = lambda: None

    def __call__(self, images, captions, critiques):
        self.before()
        texts = [one.problems[0].what if one.problems else "nothing" for one in critiques]
        return [Instructions(instructions=() if text.endswith("7") else (f"mend {text}",)) for text in texts]


@dataclass
class FakeEditor:
    identity: Mapping[str, str] = field(default_factory=lambda: {"kind": "fake", "model": "brush"})
    licence: str = "mit"
    batch_size: int = 4
    concurrency: int = 1
    before: Callable[[], None] = lambda: None

    def __call__(self, images, instructions, seeds):
        self.before()
        return [self.one(image, seed) for image, seed in zip(images, seeds, strict=True)]

    def one(self, image, seed):
        shift = np.random.default_rng(seed).integers(-60, 60)
        return Image.fromarray(np.clip(np.asarray(image, np.int64) + shift, 0, 255).astype(np.uint8))


def fakes(**changes) -> Components:
    """Fresh components."""
    return replace(Components(FakeCritic(), FakeInstructor(), FakeEditor()), **changes)


def threaded(**changes) -> Components:
    """Fresh components, of which critic and instructor are asked in threads, as servers are."""
    return fakes(**{"critic": FakeCritic(concurrency=4), "instructor": FakeInstructor(concurrency=4)} | changes)


def pause():
    time.sleep(0.2)


def slow_critic(config):
    return FakeCritic(before=pause)


def slow_instructor(config):
    return FakeInstructor(before=pause)


def slow_editor(config):
    return FakeEditor(before=pause)


def named(config: CurateConfig) -> CurateConfig:
    """The same run with slow components that its settings name, as another process must find them."""
    critic, instructor = (ChatConfig(kind=f"{__name__}:slow_{one}") for one in ("critic", "instructor"))
    editor = EditorConfig(kind=f"{__name__}:slow_editor")
    return replace(config, critic=critic, instructor=instructor, editor=editor)


def config_of(output: Path, source: Path, **changes) -> CurateConfig:
    """A run over a folder of images, by rewards of this file."""
    rules = DecideConfig(rewards={"tests.curation.fakes:brightness": 0.0}, policy="both_directions")
    base = CurateConfig(
        output=str(output),
        source=SourceConfig(kind="folder", path=str(source), batch_size=4),
        decide=rules,
        evaluation="tests.curation.fakes:greenness",
        score_batch_size=5,
        shard=8,
        progress=False,
    )
    return replace(base, **changes)


def in_child(*calls: Callable[[], object], kill_after: float | None = None) -> list[int | None]:
    """Run each call in a process of its own, all at once; their exit codes. Optionally kill them after some seconds."""
    context = multiprocessing.get_context("fork")  # it costs no import
    children = [context.Process(target=call) for call in calls]
    for child in children:
        child.start()
    for child in children:
        child.join(kill_after if kill_after is not None else 120)
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def lines_of(folder: Path) -> dict[str, list[str]]:
    """What every stage has said, and every image: what two runs are compared by."""
    run = whole(folder)
    said = {stage: [json.dumps({"id": one, **row}) for one, row in run.rows[stage].items()] for stage in STAGES}
    return said | {"images": sorted(run.images)}


def whole(folder) -> Shard:
    """All records of a run together, with their images."""
    run = CurationRun(folder)
    found = Shard(0, 0, [])
    for mark, num_stages in run.marks():
        shard = load(run.store, mark, num_stages)
        found.ids += shard.ids
        found.images |= shard.images
        for stage in STAGES:
            found.rows[stage] |= shard.rows[stage]
    return found


def sealed(folder) -> list[int]:
    """The numbers of the shards that are sealed."""
    return [mark.number for mark in read_marks(Store(folder))]


def write_run(path, identities, shards) -> None:
    """A run as shards have been left, each after the stages that it is through with."""
    store, records = Store(path), sum(len(shard.ids) for shard in shards)
    made_by = claim(store, identities, (records, len(shards), 1)).made_by
    for shard in shards:
        seal(store, shard, made_by, tally_of(shard))


def finished(config: CurateConfig, **changes) -> CurationRun:
    """A run that went to its end."""
    return CurationRun(curate(config, components=fakes(**changes)))


def scored(record, before=None, after=None, *, distance=0.1, similarity=None, side="", **known) -> History:
    """What is known of a record that was edited and scored; `known` says what is otherwise."""
    scores = Fault("invalid", "nan") if before is None else Scores(before, after, distance, similarity, {})
    found = {
        "critique": Critique(problems=(Problem(what="dark", severity=2),), overall=4),
        "instructions": Instructions(instructions=("mend it",)),
        "edit": Edit("0" * 64, 0),
        "scores": scores,
    }
    return History(Source(record, "a caption", "0" * 64, 0, {}, record, side), **(found | known))
