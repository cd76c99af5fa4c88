"""The measurement on a card: a part that fails, crashes or takes too long costs its own time and its own line alone."""

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import gpu_table  # noqa: E402
from card import published_tflops  # noqa: E402
from gpu_part import Part, Setting, Skipped, run_part  # noqa: E402


def raises(setting, note):
    note("first", 1)
    raise ValueError("it broke")


def skips(setting, note):
    setting.require_gpu("it")


def sleeps(setting, note):
    note("first", 1)
    time.sleep(60)


def crashes(setting, note):
    os._exit(3)


def writes(setting, note):
    print("no part of the table")
    note("device", setting.device)


@pytest.mark.parametrize(
    ("run", "status", "reason", "found"),
    [
        (writes, "done", "", {"device": "cpu"}),
        (raises, "failed", "ValueError: it broke", {"first": 1}),
        (skips, "skipped", "it needs a GPU", {}),
        (sleeps, "out of time", "it was stopped after 0 s", {"first": 1}),
        (crashes, "failed", "its process ended with 3", {}),
    ],
)
def test_a_part_ends_as_it_ends_and_what_it_found_is_kept(run, status, reason, found, capfd):
    report = run_part(Part("", 60, run), Setting("cpu"), 0.4 if run is sleeps else 60)
    assert (report["status"], report["reason"].splitlines()[:1], report["found"]) == (
        status,
        [reason][: bool(reason)],
        found,
    )
    assert report["seconds"] < 20
    assert not capfd.readouterr().out


def test_all_parts_together_take_nine_minutes(monkeypatch):
    import gpu  # noqa: PLC0415

    assert sum(part.seconds for part in gpu.PARTS.values()) <= 9 * 60
    assert gpu.PARTS.keys() >= gpu_table.ROWS.keys()
    assert issubclass(Skipped, Exception)


def test_what_is_wrong_is_told_in_the_table_and_by_the_exit_code():
    size = {"rows": 4, "seconds": 1.0, "tflop": 2.0, "outside_of_denoiser": 0.05, "of_measured": 0.6}
    size |= {"planned_peak_gib": 2.0, "peak_gib": 2.2, "peak_by_plan": 1.1, "of_published": 0.4}
    waits = {"rollout loop": {"waits": 0, "at": {}}, "dpo: all of an update": {"waits": 1, "at": {"rpo/a.py:1": 1}}}

    def report(**parts):
        done = {"status": "done", "reason": "", "seconds": 1.0}
        every = {name: {**done, **({"found": one} if "found" not in one else one)} for name, one in parts.items()}
        return {"setting": {"is_rehearsal": False}, "parts": every}

    sound = report(sd15={"resolution": 512, "dpo": size}, waits=waits)
    assert gpu_table.is_well(sound)
    assert "| sd15 | dpo, 512 px, 4 latents at once: peak | 2.20 GiB | ok; 2.00 by plan (+10%) |" in gpu_table.table(
        sound
    )
    assert gpu_table.is_well(report(graphs={"status": "skipped", "reason": "needs a GPU", "found": {}}))
    for broken in (
        report(waits={"rollout loop": {"waits": 2, "at": {"rpo/b.py:7": 2}}}),
        report(sd15={"resolution": 512, "dpo": {**size, "peak_by_plan": 1.5}}),
        report(parity={"sd3": {"is_equal": False, "prediction": 0.5}}),
        report(kinds={"float16": {"is_sound": False, "error": "RuntimeError: no kernel"}}),
        report(quickstart={"status": "out of time", "reason": "it was stopped", "found": {}}),
    ):
        assert not gpu_table.is_well(broken)
        assert "**not ok**" in gpu_table.table(broken)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A1000", None),
    ],
)
def test_a_card_is_known_by_its_name(name, rate):
    assert published_tflops(name) == rate
