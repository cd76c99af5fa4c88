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

BASE = {"in_domain": 40.0, "out_of_domain": 35.0, "in_domain_guided": 54.0, "out_of_domain_guided": 59.0}


def judged(gain: float, evaluations: int) -> dict[str, object]:
    found = {name: value + gain for name, value in BASE.items()}
    return found | {
        "evaluations": evaluations,
        "kl": gain / 10,
        "kl_last_steps": gain,
        "seconds": 60.0,
        "explained_variance": [0.5, None],
    }


def test_evaluations_count_latents_forward_and_backward():
    network = torch.nn.Linear(2, 2)
    counter = online_rl.Evaluations(network)
    with torch.no_grad():
        network(torch.zeros(3, 2))
    assert counter.count == 3
    network(torch.zeros(5, 2))
    assert counter.count == 3 + 2 * 5


def test_the_report_shows_every_seed_and_the_base(tmp_path, capsys):
    write(tmp_path / "base.json", BASE)
    for seed, gain in ((0, 10.0), (1, 20.0)):
        for stop in online_rl_report.STOPS:
            place = tmp_path / f"ddpo-{seed}" / f"judged-{stop:g}.json"
            write(place, judged(stop * gain, round(stop * 1000)))
    found = online_rl_report.report(tmp_path, {"ddpo": "DDPO"}, ("ddpo",))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| base | | 0 | 40.0 | 35.0 | 54.0 | 59.0 | 0 | 0 | |"
    assert (
        lines[-2]
        == "| DDPO | 2 | 1,000 | 55.0 ± 7.1 | 50.0 ± 7.1 | 69.0 ± 7.1 | 74.0 ± 7.1 | 1.5 ± 0.7 | 15.0 ± 7.1 | 1 |"
    )
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert "DDPO" in (tmp_path / "online_rl.svg").read_text()


@pytest.mark.slow
def test_a_comparison_runs_and_continues(tmp_path):
    words = ["compare", f"--folder={tmp_path}", "--seeds", "0", "--budget=9000", "--images=4"]
    online_rl.main(words)
    first = (tmp_path / "results.json").read_text()
    stops = json.loads(first)["runs"]["score_as_action-0"]["stops"]
    assert [stops[name]["updates"] for name in ("0.25", "0.5", "1")] == sorted(
        {stops[name]["updates"] for name in stops}
    )
    (tmp_path / "score_as_action-0" / "judged-1.json").unlink()
    online_rl.main(words)
    again = json.loads((tmp_path / "results.json").read_text())["runs"]["score_as_action-0"]["stops"]["1"]
    assert {**again, "seconds": 0} == {**stops["1"], "seconds": 0}
