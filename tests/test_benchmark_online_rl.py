"""The comparison of online trainers: it counts every evaluation, continues where it was killed, and reports."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import online_rl  # noqa: E402
import online_rl_report  # noqa: E402
from jobs import write  # noqa: E402

BEST = online_rl_report.WATCHED


def verdicts(hits: int, best: int) -> dict[str, dict[str, str]]:
    """Of ten prompts a split, so many right by every sampler, and by the one that is best for the base."""
    shares = {sampler: best if sampler == BEST else hits for sampler in online_rl_report.SAMPLERS}
    splits = ("train", "in_domain", "out_of_domain")
    return {name: {split: ("1" * right).ljust(10, "0") for split in splits} for name, right in shares.items()}


def judged(best: int, evaluations: int) -> dict[str, object]:
    return {
        "evaluations": evaluations,
        "kl": best / 10,
        "kl_last_steps": 1.0,
        "seconds": 60.0,
        "verdicts": verdicts(3, best),
    }


def test_evaluations_count_latents_forward_and_backward():
    network = torch.nn.Linear(2, 2)
    counter = online_rl.Evaluations(network)
    with torch.no_grad():
        network(torch.zeros(3, 2))
    assert counter.count == 3
    network(torch.zeros(5, 2))
    assert counter.count == 3 + 2 * 5


def test_a_gain_is_that_over_the_base_at_its_best_sampler(tmp_path, capsys):
    write(tmp_path / "base.json", {"verdicts": verdicts(2, 6)})
    for seed, best in ((0, 7), (1, 9)):
        for stop in online_rl_report.STOPS:
            write(tmp_path / f"ddpo-{seed}" / f"judged-{stop:g}.json", judged(best, round(stop * 1000)))
    found = online_rl_report.report(tmp_path, {"ddpo": "DDPO"}, ("ddpo",))
    lines = capsys.readouterr().out.splitlines()
    assert f"| {BEST} | 60.0 | 80.0 ± 14.1 |" in lines
    assert "| best by training prompts | **60.0** | **80.0 ± 14.1** |" in lines
    assert sum(line.startswith("| gain, each at its best | | +20.0 [") for line in lines) == 2
    assert lines[-1] == "| DDPO | 1,000 | 80.0 ± 14.1 | 80.0 ± 14.1 | 0.8 ± 0.1 | 1.0 ± 0.0 | 1 |"
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert "DDPO" in (tmp_path / "online_rl.svg").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_comparison_runs_and_continues(tmp_path):
    words = ["compare", f"--folder={tmp_path}", "--seeds", "0", "--budget=9000", "--images=4"]
    online_rl.main(words)
    first = (tmp_path / "results.json").read_text()
    stops = json.loads(first)["runs"]["score_as_action"]
    updates = [stops[name][0]["updates"] for name in ("0.25", "0.5", "1")]
    assert updates == sorted(set(updates))
    (tmp_path / "score_as_action-0" / "judged-1.json").unlink()
    online_rl.main(words)
    again = json.loads((tmp_path / "results.json").read_text())["runs"]["score_as_action"]["1"][0]
    assert {**again, "seconds": 0} == {**stops["1"][0], "seconds": 0}
