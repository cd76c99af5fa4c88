"""The benchmark of words: its arms are settings, and it says reward and judge side by side."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import words  # noqa: E402
from jobs import read, write  # noqa: E402
from objectives_judge import pack  # noqa: E402
from words import ARMS, Job  # noqa: E402


def judged(right, minutes=0.0):
    """Of ten words so many right, and as many tenths of the reward."""
    names, domains = [f"guidance {one:g}" for one in words.GUIDANCES], words.HELD_OUT
    verdicts = {name: {domain: pack([one < right for one in range(10)]) for domain in domains} for name in names}
    rewards = {name: {domain: [right / 10] * 10 for domain in domains} for name in names}
    return {"judge": verdicts, "reward": rewards, "seconds": 60 * minutes, "updates": 10, "reward_seconds": 0.04}


def test_the_table_says_the_gains_of_judge_and_reward(tmp_path, capsys):
    stops = {f"{stop:g}": judged(round(4 + 4 * stop), 12 * stop) for stop in words.STOPS}
    runs = {"nft": {seed: {"settings": {}, "stops": stops} for seed in ("0", "1")}}
    write(tmp_path / "found.json", {"base": judged(4), "runs": runs})
    found = words.report(tmp_path / "found.json")
    assert read(tmp_path / "found.json") == found
    rows = found["tables"]["guidance 1"].splitlines()
    assert rows[2].split(" | ")[3:5] == ["40.0", " | 40.0"] or "40.0" in rows[2]
    assert rows[3].startswith("| DiffusionNFT | 2 | 12 | 80.0 ± 0.0 | +40.0 [")
    assert "<svg" in (tmp_path / "found.svg").read_text()


def test_every_arm_is_settings_of_a_command_with_a_configuration():
    for arm in ARMS:
        job = Job(arm, 0, 4)
        job.config(Path("x"))
        assert job.folder(Path("x")) != Job(arm, 1, 4).folder(Path("x")) != Job(arm, 1, 5).folder(Path("x"))


@pytest.mark.parametrize("part", ["plan", "report"])
def test_without_results_it_says_what_would_be_run(part, tmp_path, capsys):
    words.main([part, "--results", str(tmp_path / "none.json"), "--seeds", "3"])
    assert ("seed 3" in capsys.readouterr().out) == (part == "plan")
