"""A study in small: its cells cost alike, a killed one ends in the same files, and what cannot be is refused."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from rpo.cli.main import main
from rpo.config.load import load_config
from rpo.errors import InputError
from rpo.files.lock import LOCK, taken
from rpo.runs import study as module
from rpo.runs.study import plan_in_words, planned, study
from rpo.runs.study_cells import Prices, cells_of, places
from rpo.runs.study_config import StudyConfig
from rpo.runs.study_process import on_its_own
from tests.tiny import tiny_sd, tiny_sdxl
from tests.tiny_z_image import tiny_z_image

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")

PRICES = Prices({"dpo": 2.0, "grpo": 2.0, "endpoint": 2.0}, guided=True)
BRIGHT = "tests.trainers.online_runs:lightness"

SMALL = [
    "seeds=[0]",
    "budget=120",
    "algorithms=[dpo,grpo]",
    f"rewards={{small: jpeg-compressibility, bright: '{BRIGHT}'}}",
    "images_per_prompt=[2]",
    "shares=[1.0]",
    "rounds=[1]",
    "best_of=3",
    "backward=2.0",
    "progress=false",
    "held_out.reward=jpeg-incompressibility",
    "held_out.num_steps=2",
    "held_out.guidance_scale=2",
    "held_out.count=3",
    "curate.source.num_steps=2",
    "curate.source.guidance_scale=2",
    "curate.source.eta=1",
    "dpo.pairs_per_update=2",
    "dpo.preflight=false",
    "dpo.max_chosen_error_ratio=.inf",
    "dpo.max_rejected_error_ratio=.inf",
    "dpo.adapter.rank=2",
    "dpo.learning.micro_batch=2",
    "dpo.learning.learning_rate=0.02",
    *(
        f"{name}.{word}"
        for name in ("grpo", "endpoint")
        for word in (
            "rollout.prompts=2",
            "rollout.num_steps=3",
            "rollout.guidance_scale=2",
            "preflight=false",
            "adapter.rank=2",
            "learning.micro_batch=4",
            "learning.learning_rate=0.02",
        )
    ),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint and prompts."""
    folder = tmp_path_factory.mktemp("study")
    tiny_sd().save_pretrained(folder / "sd")
    for name, texts in {
        "train": ("a red circle", "two dogs", "a house", "a tree"),
        "near": ("a blue circle", "two cats", "a barn"),
        "far": ("a fish", "the sea", "rain"),
    }.items():
        (folder / f"{name}.txt").write_text("\n".join(texts) + "\n")
    return folder


def words(home, output, *more, source="sd"):
    return [
        *SMALL,
        f"model.source={home / source}",
        f"prompts={home / 'train.txt'}",
        f"held_out.prompts={home / 'near.txt'}",
        f"out_of_domain={home / 'far.txt'}",
        f"output={output}",
        *more,
    ]


def small(home, output, *more, source="sd"):
    return load_config(StudyConfig, None, words(home, output, *more, source=source))


def results(folder):
    files = [*folder.rglob("result.json"), folder / "study.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    told = list[str]()
    study(small(home, folder), say=told.append)
    return folder, told


def test_every_algorithm_meets_every_reward_and_axes_are_walked_one_at_a_time():
    config = StudyConfig(seeds=(0, 1), walked=("proxy",))
    every = list(places(config))
    assert len({one.name for one in every}) == len(every) == 2 * (4 * 4 + 4 * 7)
    first = [one for one in every if (one.images_per_prompt, one.share, one.rounds) == (4, 1.0, 1)]
    assert Counter((one.algorithm, one.reward) for one in first) == dict.fromkeys(
        ((way, reward) for way in config.algorithms for reward in config.rewards), 2
    )
    walked = [one for one in every if one not in first]
    assert {one.reward for one in walked} == {"proxy"}
    for one in walked:
        moved = (one.images_per_prompt != 4) + (one.share != 1.0) + (one.rounds != 1)
        assert moved == 1
    assert [one.seed for one in every] == sorted(one.seed for one in every)
    assert len(list(places(replace(config, walked=None)))) == 2 * 4 * 4 * 8
    assert len(list(places(replace(config, walked=())))) == 2 * 4 * 4


@pytest.mark.parametrize("budget", [60_000, 100_000])
def test_all_cells_cost_the_budget_but_for_an_update_of_each_round(budget):
    config = StudyConfig(budget=budget)
    for cell in cells_of(config, PRICES, 128):
        left = budget - cell.planned
        assert 0 <= left < cell.place.rounds * cell.update, cell.name
        if cell.image:
            of_images = cell.planned - cell.place.rounds * cell.updates * cell.update
            assert 0 < of_images <= config.drawing * budget
    by_name = {cell.name: cell for cell in cells_of(config, PRICES, 128)}
    quarter = by_name["dpo-proxy-n4-p0.25-r1-s0"]
    assert quarter.prompts == 32 and quarter.updates > by_name["dpo-proxy-n4-p1-r1-s0"].updates
    assert by_name["dpo-proxy-n16-p1-r1-s0"].prompts < by_name["dpo-proxy-n8-p1-r1-s0"].prompts


@pytest.mark.parametrize("drawing", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("algorithm", ["dpo", "rich", "grpo", "endpoint"])
def test_the_least_budget_that_is_told_is_enough(algorithm, drawing):
    config = StudyConfig(budget=100, algorithms=(algorithm,), drawing=drawing, rounds=(2,))
    with pytest.raises(InputError, match="does not buy") as refused:
        cells_of(config, PRICES, 128)
    least = int(re.findall(r"; ([\d,]+) evaluations do", str(refused.value))[0].replace(",", ""))
    first = cells_of(replace(config, budget=least, images_per_prompt=(4,)), PRICES, 128)[0]
    assert first.updates >= 1 and first.prompts >= 1


def test_a_cell_is_the_run_that_its_place_says():
    config = StudyConfig()
    by_name = {cell.name: cell for cell in cells_of(config, PRICES, 128)}
    (ranked,), (rich,) = (by_name[f"{way}-proxy-n4-p1-r3-s1"].runs for way in ("dpo", "rich"))
    assert (ranked.rounds, ranked.seed, ranked.curate.critic.kind) == (3, 1000, "nothing")
    assert (ranked.curate.decide.orderings, rich.curate.decide.orderings) == ("prompt", "own")
    assert rich.curate.critic.kind == "shapes"
    assert ranked.curate.decide.rewards == rich.curate.decide.rewards == {"shapes-clip": 0.0}
    (large,) = by_name["grpo-mixture-n16-p1-r1-s0"].runs
    assert (large.rollout.prompts, large.rollout.images_per_prompt) == (4, 16)
    grpo = by_name["grpo-mixture-n4-p1-r3-s2"]
    assert [one.seed for one in grpo.runs] == [2000, 2001, 2002]
    assert [one.model.lora for one in grpo.runs] == [None, *(f"{one.output}/lora" for one in grpo.runs[:2])]
    assert {one.learning.updates for one in grpo.runs} == {grpo.updates}
    assert grpo.runs[0].rewards == {config.rewards["mixture"]: 1.0}


def test_every_cell_is_judged_by_the_truth_and_every_reward(finished, home):
    folder, told = finished
    cells = [json.loads(file.read_text()) for file in sorted((folder / "cells").glob("*/result.json"))]
    pairs = [(way, reward) for way in ("dpo", "grpo") for reward in ("bright", "small")]
    assert [one["name"] for one in cells] == [f"{way}-{reward}-n2-p1-r1-s0" for way, reward in pairs]
    base = json.loads((folder / "base/result.json").read_text())
    for one in cells:
        assert one["scores"].keys() == {"in_domain", "out_of_domain"}
        for name, own in one["scores"].items():
            assert own.keys() == {"truth", "small", "bright"}
            assert all(len(values) == 3 and len(values[0]) == 1 for values in own.values())
            assert own["truth"] != [row[:1] for row in base["candidates"][name]["truth"]]
        assert 0 < one["spent"] <= one["planned"] <= 120
    found = json.loads((folder / "study.json").read_text())
    best = {(one["by"], one["count"]): one["truth"] for one in found["best_of"]}
    candidates = base["candidates"]["out_of_domain"]
    assert best["truth", 3] == pytest.approx(sum(max(row) for row in candidates["truth"]) / 3)
    assert best["small", 3] == pytest.approx(sum(min(row) for row in candidates["truth"]) / 3)
    assert set(found["order"]["after"]) == {"dpo+grpo", "dpo", "grpo"}
    assert {one["reward"] for one in found["groups"]} == {"small", "bright"}
    assert [text.partition(":")[0] for text in told[1].splitlines()[1:]] == ["truth", "small", "bright"]
    assert "Did it tell the order after training?" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_study_that_was_killed_ends_in_the_same_files(finished, home, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(*args, **kwargs):
        raise Killed

    folder = tmp_path / "run"
    config = small(home, folder)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(module, "run", killed)  # after the first cell
        study(config)
    done = {name for name in results(folder) if name.startswith("cells")}
    assert len(done) == 1
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("rpo.trainers.trainer.Trainer.save", killed)  # when the second is trained and not yet kept
        study(config, resume=True)
    assert {name for name in results(folder) if name.startswith("cells")} == done
    study(config, resume=True)
    assert results(folder) == results(finished[0])
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("result.json")}
    study(config, resume=True)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("result.json")} == before
    with pytest.raises(InputError, match="--resume"):
        study(config)
    with pytest.raises(InputError, match="budget was 120 and is now 200"):
        study(replace(config, budget=200), resume=True)
    monkeypatch.setattr(module, "read_prompts", lambda source, seed: ["a hat", "a coat"])
    with pytest.raises(InputError, match="something else: prompts from"):
        study(config, resume=True)


def test_what_another_process_holds_is_left_to_it_and_what_fails_is_named(home, tmp_path, finished, monkeypatch):
    def failing(*args, **kwargs):
        raise InputError("it cannot be")

    config, folder = small(home, tmp_path / "run", "algorithms=[grpo]"), tmp_path / "run"
    held = folder / "cells/grpo-small-n2-p1-r1-s0"
    held.mkdir(parents=True)
    with taken(held / LOCK, "a cell"):
        study(config, number=1)
    assert [file.parent.name for file in folder.glob("cells/*/result.json")] == ["grpo-bright-n2-p1-r1-s0"]
    assert not (folder / "report.html").exists()
    with monkeypatch.context() as patched, pytest.raises(InputError, match="failed: 1\n- grpo-small.*cannot be"):
        patched.setattr(module, "run", failing)
        study(config, resume=True)
    assert json.loads((folder / "study.json").read_text())["failed"].keys() == {held.name}
    study(config, resume=True)
    assert not json.loads((folder / "study.json").read_text())["failed"]
    for name in (held.name, "grpo-bright-n2-p1-r1-s0"):
        file = f"cells/{name}/result.json"
        assert (folder / file).read_bytes() == (finished[0] / file).read_bytes()


@pytest.mark.slow
def test_processes_of_torchrun_share_out_the_cells(home, tmp_path, finished):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, "-m", "rpo.cli", "study", *words(home, tmp_path / "run")], check=True)
    assert results(tmp_path / "run") == results(finished[0])


def test_a_process_of_torchrun_is_alone_inside(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with on_its_own() as (number, count):
        assert (number, count) == (3, 4)
        assert "WORLD_SIZE" not in os.environ and os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert os.environ["RANK"] == "3" and os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rewards={small: jpeg-compresibility}", "nearest is 'jpeg-compressibility'"),
        ("rewards={Small: jpeg-compressibility}", "small letters"),
        ("rewards={truth: jpeg-compressibility}", "held_out.reward"),
        ("rewards={both: 'mixture:jpeg-compressibility'}", "NAME=WEIGHT"),
        ("algorithms=[dpo, gpro]", "one of dpo, rich, grpo, endpoint is needed"),
        ("algorithms=[]", "algorithms"),
        ("walked=[smal]", "none of the rewards"),
        ("shares=[1.5]", "from|above 0"),
        ("images_per_prompt=[1]", "at least 2|from 2"),
        ("rounds=[1, 1]", "rounds has 1 twice"),
        ("budgte=5", "nearest is 'budget'"),
        ("budget=10", "the cell dpo-small.*budget is 10, which does not buy an update"),
        ("algorithms=[grpo] budget=20", "the cell grpo-small.*budget is 20"),
        ("rounds=[1,9]", "the cell dpo-small-n2-p1-r9-s0: budget"),
        ("dpo.learning.warmup_updates=50", "the cell dpo-small.*warmup_updates is 50"),
        ("grpo.adapter.train=full", "grpo.adapter.train is full"),
        ("curate.source.num_steps=null", "curate.source.num_steps"),
        ("out_of_domain=EMPTY", "no prompts"),
        ("prompts=EMPTY", "no prompts"),
        ("prompts=NOWHERE", "NOWHERE"),
        ("out_of_domain=TRAIN", "are trained on"),
        ("held_out.count=1", "one held-out prompt"),
    ],
)
def test_what_cannot_be_is_refused_at_the_door(home, tmp_path, change, message):
    (tmp_path / "empty.txt").write_text("\n")
    places = {"EMPTY": str(tmp_path / "empty.txt"), "TRAIN": str(home / "train.txt")}
    for name, place in places.items():
        change = change.replace(name, place)
    split = change.split(" ") if change.startswith("algorithms=[grpo] ") else [change]
    with pytest.raises(InputError, match=message):
        planned(small(home, tmp_path / "run", *split))
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_it_costs_and_starts_nothing(home, tmp_path, capsys):
    assert main(["study", "--plan", *words(home, tmp_path / "run", "backward=null")]) == 0
    told = capsys.readouterr().out
    found = planned(small(home, tmp_path / "run", "backward=null"))
    assert told == f"{plan_in_words(found)}\n"
    assert all(cell.name in told for cell in found.cells)
    assert f"{sum(cell.planned for cell in found.cells):,.0f} evaluations" in told
    assert "PFLOP" in told and "4 cells (4 of each of 1 seeds), 0 finished" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_sdxl, tiny_z_image])
def test_any_checkpoint_can_be_studied(home, tmp_path, make):
    make().save_pretrained(tmp_path / "checkpoint")
    more = ["algorithms=[dpo,grpo,endpoint]", "walked=[small]", "rounds=[1,2]", "budget=250"]
    if make is tiny_z_image:
        more.append("dpo.resolution=64")
    config = words(home, tmp_path / "run", *more, f"model.source={tmp_path / 'checkpoint'}")
    assert main(["study", *config]) == 0
    found = json.loads((tmp_path / "run/study.json").read_text())
    assert len(found["groups"]) == 9 and not found["failed"]
    assert "How it scales with small" in (tmp_path / "run/report.html").read_text()
