"""The comparison of objectives: it counts every evaluation, continues where it was killed, and reports."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import objectives  # noqa: E402
import objectives_arms  # noqa: E402
import objectives_judge  # noqa: E402
import objectives_report  # noqa: E402
from jobs import read, write  # noqa: E402
from objectives_arms import ARMS, Cost, Counter, Job, run_of  # noqa: E402

from rpo.cli.main import COMMANDS  # noqa: E402
from rpo.config.load import load_config  # noqa: E402
from rpo.models.checkpoint import Checkpoint  # noqa: E402
from rpo.rewards import load_reward  # noqa: E402

BEST = objectives_report.WATCHED
SMALL = ("rollout.prompts=2", "rollout.images_per_prompt=2", "rollout.num_steps=4")


def verdicts(hits: int, best: int) -> dict[str, dict[str, str]]:
    """Of ten prompts a split, so many right by every sampler, and by the one that is best for the base."""
    shares = {sampler: best if sampler == BEST else hits for sampler in objectives_report.SAMPLERS}
    splits = ("train", "in_domain", "out_of_domain")
    ordered = {right: objectives_judge.pack([one < right for one in range(10)]) for right in {hits, best}}
    return {name: {split: ordered[right] for split in splits} for name, right in shares.items()}


def judged(best: int, evaluations: int = 0) -> dict[str, object]:
    scores = {split: best / 10 for split in objectives_judge.HELD_OUT}
    known = {"evaluations": evaluations, "images_scored": evaluations // 10, "seconds": 60.0}
    return {**known, "kl": 0.1, "kl_last_steps": 1.0, "diversity": 0.02, "gold": scores, "proxy": scores} | {
        "verdicts": verdicts(3, best)
    }


def results() -> dict[str, object]:
    """Two seeds of DDPO, which rises from 6 of 10 to 8, and one of NFT, which is there at a quarter of the budget."""
    bar = {name: {**judged(6), "verdicts": verdicts(3, 6)[BEST]} for name in ("graded", "proxy")}
    rise = dict(zip(objectives_report.STOPS, (6, 6, 7, 7, 8), strict=True))
    soon = dict.fromkeys(objectives_report.STOPS, 9) | {objectives_report.STOPS[0]: 7}

    def run(best_at: dict[float, int]) -> dict[str, object]:
        stops = {f"{stop:g}": judged(best, round(16000 * stop)) for stop, best in best_at.items()}
        return {"settings": {"command": "grpo", "overrides": ["seed=1"]}, "stops": stops}

    runs = {"ddpo": {"0": run(rise), "1": run(rise)}, "nft": {"0": run(soon)}}
    return {"base": {**judged(6), "images": 10, "best_of": bar}, "runs": {"graded": runs, "proxy": runs}}


def test_verdicts_are_read_as_they_were_packed():
    holds = np.array([False, True, True, False, True, False, False, False, True])
    assert objectives_judge.pack(holds) == "9:0d1"
    assert (objectives_judge.unpack("9:0d1") == holds).all()


def test_evaluations_are_latents_forward_and_backward_and_images_are_those_a_reward_is_asked_about():
    model, reward = Checkpoint.load("shapes"), load_reward("shapes")
    cond, grid = model.encode_prompts(["a red circle"] * 3), model.grid(2)
    x_t = torch.zeros(3, *model.latent_shape())
    with Counter("shapes") as counter:
        with torch.no_grad():
            model.predict(x_t, grid[0].timestep, cond)
        assert counter.evaluations == 3
        model.predict(x_t, grid[0].timestep, cond)
        assert counter.evaluations == 3 + 2 * 3
        reward(torch.zeros(5, 3, 64, 64), ["a red circle"] * 5)
    reward(torch.zeros(5, 3, 64, 64), ["a red circle"] * 5)
    assert (counter.evaluations, counter.images) == (9, 5)


@pytest.mark.slow
def test_an_update_costs_what_its_parts_cost(tmp_path, monkeypatch):
    words = (*SMALL, "rollout.num_steps=5", "objective.kind=nft", "objective.reference_weight=0.1")
    words += ("rollout.guidance_scale=2",)
    monkeypatch.setitem(ARMS, "small", replace(ARMS["nft"], overrides=words))
    cost = run_of(Job("small", "graded", 0, 100, 4), tmp_path).cost
    drawn, watched = 4 * 5 * 2, 3 * 2  # of 20 steps every eighth is asked for its KL, both branches
    moments = 4 * 4  # four of each image, without guidance: old, reference, forward and backward
    assert cost.update == (drawn + watched + moments * (1 + 1 + 2), 4)
    assert cost.start == (0, 0)
    assert cost.updates(10 * cost.update[0]) == 10
    assert cost.after(3) == {"evaluations": 3 * cost.update[0], "images_scored": 12}


@pytest.mark.slow
def test_rounds_cost_what_they_are_said_to(tmp_path, monkeypatch):
    words = ("curate.source.limit=8", "curate.source.num_steps=2", "dpo.learning.updates=2", "dpo.pairs_per_update=2")
    words += ("dpo.learning.micro_batch=2", "dpo.learning.warmup_updates=0", "held_out.count=2", "held_out.num_steps=1")
    words += ("curate.progress=false",)
    monkeypatch.setitem(ARMS, "small", replace(ARMS["dpo"], overrides=words))
    run = run_of(Job("small", "proxy", 0, 100, 4), tmp_path / "run")
    assert run.cost.update == (8 * 4 * 2 * 2 + 2 * 2 * 2 * 3, 32)
    with Counter("shapes-clip") as counter:
        model, facts = run.until(1)
    judging = 2 * 2 * 2 * 2  # base and result, two domains, two prompts, guidance
    checked = counter.evaluations - run.cost.update[0] - judging
    assert facts["updates"] == 1
    assert counter.images == 32
    assert 0 <= checked < 60, "checkpoints are probed when they are loaded, and LoRAs when they are written"
    assert objectives_judge.path_kl(model, 2)["kl"] > 0


def test_every_arm_is_settings_of_a_command():
    for arm in ARMS.values():
        for reward in arm.rewards:
            command = COMMANDS["align" if arm.command == "align" else f"train {arm.command}"]
            file = objectives_arms.CONFIGS / f"{arm.command.replace('-', '_')}_shapes.yaml"
            load_config(command.config_class, file, arm.words(reward))
        assert arm.sampler in objectives_report.SAMPLERS
    families = [arm.family for arm in ARMS.values()]
    assert all(families.count(one) <= 4 for one in families)


def test_a_curve_crosses_a_level_between_its_points():
    rising = [(0.0, 60.0), (100.0, 64.0), (200.0, 72.0), (400.0, 66.0)]
    assert objectives_report.crossing(rising, 68) == 150
    assert objectives_report.crossing(rising, 64) == 100
    assert objectives_report.crossing(rising, 60) == 0
    assert objectives_report.crossing(rising, 73) is None


def test_the_tables_say_gains_over_the_base_at_its_best_and_where_ddpo_is_reached(tmp_path, capsys):
    write(tmp_path / "found.json", results())
    found = objectives_report.report(tmp_path / "found.json")
    assert read(tmp_path / "found.json") == found
    accuracy = found["tables"]["graded"]["accuracy"].splitlines()
    assert "| base | | 60.0 / 60.0 | 30.0 / 30.0 | 60.0 / 60.0 | | | | |" in accuracy
    assert [line.split(" | ")[0] for line in accuracy[4:]] == ["| DiffusionNFT", "| DDPO"]
    assert sum("+20.0 [" in line for line in accuracy) == 1
    assert any(line.startswith("| DDPO | 2 | 80.0 ± 0.0 / 80.0 ± 0.0 | 30.0 ± 0.0") for line in accuracy)
    cost = found["tables"]["graded"]["cost"].splitlines()
    assert any(line.startswith("| DiffusionNFT | 1,500 | 16,000 | 1,600 | 1.0 |") for line in cost)
    assert any(line.startswith("| DDPO | 16,000 |") for line in cost)
    assert "| DDPO | `grpo` | `seed=1` |" in found["tables"]["graded"]["settings"].splitlines()
    figures = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert figures == ["found_graded_accuracy_1.svg", "found_proxy_accuracy_1.svg", "found_proxy_gold_1.svg"]
    assert capsys.readouterr().out.count("DiffusionNFT") == 8


def test_gains_by_one_sampler_stand_beside_those_of_the_samplers_that_training_prompts_chose(tmp_path, capsys):
    """A sampler that is best for the base by luck alone gives away what it costs on the prompts that judge."""
    found = results()
    lucky = found["base"]["verdicts"]["uniform 10, eta 1, guidance 2"]
    lucky["train"] = objectives_judge.pack([True] * len(objectives_judge.unpack(lucky["train"])))
    write(tmp_path / "found.json", found)
    lines = objectives_report.report(tmp_path / "found.json")["tables"]["graded"]["accuracy"].splitlines()
    (ddpo,) = (line.split(" | ") for line in lines if line.startswith("| DDPO"))
    assert [cell.split(" ")[0] for cell in ddpo[-4:]] == ["+20.0", "+20.0", "+50.0", "+50.0"]


def test_the_committed_tables_and_figures_are_those_of_the_committed_runs(tmp_path):
    committed = read(objectives.RESULTS)
    write(tmp_path / objectives.RESULTS.name, {name: part for name, part in committed.items() if name != "tables"})
    assert objectives_report.report(tmp_path / objectives.RESULTS.name) == committed
    for figure in tmp_path.glob("*.svg"):
        assert figure.read_text() == (BENCHMARKS / figure.name).read_text()


def test_finished_runs_of_the_same_settings_are_not_repeated():
    job = Job("nft", "graded", 0, 100, 4)
    done = {"runs": {"graded": {"nft": {"0": {"settings": json.loads(json.dumps(job.settings))}}}}}
    longer, other = replace(job, budget=200), replace(job, seed=1)
    assert objectives.to_do([job, longer, other], done, again=False) == [longer, other]
    assert objectives.to_do([job], done, again=True) == [job]
    assert job.folder(Path()) != longer.folder(Path())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_continues_and_ends_in_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "STOPS", (0.5, 1.0))
    monkeypatch.setattr(objectives_judge, "SAMPLERS", {BEST: replace(objectives_judge.SAMPLERS[BEST], num_steps=2)})
    monkeypatch.setattr(objectives_judge, "KL_STEPS", 3)
    monkeypatch.setattr(objectives_arms.Run, "_counted", lambda run: Cost((0, 0), (100, 4)))
    monkeypatch.setitem(ARMS, "small", replace(ARMS["ddpo"], overrides=(*ARMS["ddpo"].overrides, *SMALL)))
    job = Job("small", "proxy", 0, 200, 4)
    first = objectives.train(job, tmp_path / "one")
    assert [first["stops"][name]["updates"] for name in ("0.5", "1")] == [1, 2]
    for name in ("judged-1.json", "result.json"):
        (tmp_path / "one" / name).unlink()
    again = objectives.train(job, tmp_path / "one")
    assert {**again["stops"]["1"], "seconds": 0} == {**first["stops"]["1"], "seconds": 0}
    assert first["stops"]["1"]["verdicts"][BEST].keys() == {"in_domain", "out_of_domain", "train"}
