"""The ablation of rich preferences: equal numbers of pairs, a report of every seed, and runs that continue."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import rpo_ablation  # noqa: E402
import rpo_ablation_report  # noqa: E402
from jobs import write  # noqa: E402

from rpo.config.load import load_config  # noqa: E402
from rpo.data.preference import PreferencePair, encode_png  # noqa: E402
from rpo.runs.align_config import AlignConfig  # noqa: E402
from rpo.shapes.world import Scene, SceneObject, render  # noqa: E402


def judged(in_domain, out_of_domain, **more):
    return {"in_domain": in_domain, "out_of_domain": out_of_domain, "in_domain_proxy": 25.0, **more}


@pytest.mark.parametrize("name", [*rpo_ablation.ARMS, *rpo_ablation.OBJECTIVES])
def test_every_arm_is_a_training_that_can_be_configured(name):
    arm = (rpo_ablation.ARMS | rpo_ablation.OBJECTIVES)[name]
    config = load_config(AlignConfig, rpo_ablation.QUICKSTART, [f"dpo.{word}" for word in arm.overrides])
    assert arm.pairs in rpo_ablation.SETS
    assert config.dpo.learning.updates > 0


def test_all_arms_of_a_seed_have_the_same_number_of_pairs_but_for_those_that_say_so(monkeypatch, tmp_path):
    images = [encode_png(render(Scene((SceneObject("circle", "red", 32, 32, size),)))) for size in (8, 9)]
    sizes = {"ranked": 50, "rich": 40, "unfiltered": 90, "blind": 31, "mixed": 60, "rejection": 7}

    def pairs(count):
        return [PreferencePair(f"prompt {index}", *images) for index in range(count)]

    monkeypatch.setattr(
        rpo_ablation, "SETS", {name: lambda data, name=name: pairs(sizes.get(name, 45)) for name in rpo_ablation.SETS}
    )
    found = {name: len(rpo_ablation.pairs_of_arm(tmp_path, arm, 0)) for name, arm in rpo_ablation.ARMS.items()}
    assert {found[name] for name, arm in rpo_ablation.ARMS.items() if arm.share == 1} == {25}
    assert (found["ranked_double"], found["rich_half"]) == (50, 12)
    assert len(rpo_ablation.pairs_of_arm(tmp_path, rpo_ablation.OBJECTIVES["rso"], 0)) == 7


def test_the_report_shows_means_and_paired_gains_of_every_seed(tmp_path, capsys):
    for seed, base in ((0, 50.0), (1, 56.0)):
        write(tmp_path / f"base-{seed}/judged.json", judged(base, 60.0))
        run = judged(base + 10 + seed, 61.0, pairs=300, metrics={"dpo/chosen_error_ratio": 1.25})
        write(tmp_path / f"rich-{seed}/judged.json", run)
        write(tmp_path / f"rich_half-{seed}/judged.json", judged(1, 1, pairs=1, metrics={}))
    titles = {"arms": {"rich": "rich", "ranked": "ranked"}}
    found = rpo_ablation_report.report(tmp_path, titles)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == "| base |  | 53.0 ± 4.2 |  | 60.0 ± 0.0 |  | 25.000 ± 0.000 |  | 2 |"
    row = "| rich | 300 | 63.5 ± 4.9 | +10.5 ± 0.7 | 61.0 ± 0.0 | +1.0 ± 0.0 | 25.000 ± 0.000 | 1.25 ± 0.00 | 2 |"
    assert lines[3] == row
    assert "ranked" not in "".join(lines)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert "rich" in (tmp_path / "rpo_arms.svg").read_text()


def test_the_report_says_how_far_gains_follow_from_holding_the_chosen_side(tmp_path, capsys):
    write(tmp_path / "base-0/judged.json", judged(50.0, 50.0))
    for number in range(6):
        run = judged(60.0 - number, 40.0 + number**2, pairs=1, metrics={"dpo/chosen_error_ratio": 1 + number})
        write(tmp_path / f"arm{number}-0/judged.json", run)
    write(tmp_path / "arm0-1/judged.json", judged(1, 1, pairs=1, metrics={"dpo/chosen_error_ratio": 9}))  # without base
    rpo_ablation_report.report(tmp_path, {"arms": {f"arm{number}": "" for number in range(6)}})
    line = "chosen error and gain over 6 runs, rank correlation: in-domain -1.00, out-of-domain 1.00"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_an_ablation_runs_and_continues(tmp_path):
    words = ["arms", f"--folder={tmp_path}", "--seeds", "0", "--prompts=40", "--images=4", "--updates=11"]
    rpo_ablation.main([*words, "--only", "ranked", "rich"])
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert runs["rich"]["0"]["pairs"] == runs["ranked"]["0"]["pairs"] > 0
    (tmp_path / "rich-0/judged.json").unlink()
    rpo_ablation.main([*words, "--only", "ranked", "rich"])
    again = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert {**again["rich"]["0"], "seconds": 0} == {**runs["rich"]["0"], "seconds": 0}
