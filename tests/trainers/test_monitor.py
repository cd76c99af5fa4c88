"""The monitor of a run: it changes nothing, tells a gamed reward from a good one, and survives a kill."""

import dataclasses
import json

import pytest
import torch

from rpo.errors import InputError
from rpo.rewards.base import WeightedRewards
from rpo.sampling.sample import Keep
from rpo.trainers.checks.canaries import canary_checks
from rpo.trainers.rollouts.settings import MonitorConfig
from rpo.training.log import read_metrics
from tests.marks import slow_but
from tests.trainers.online_runs import ROLLOUT, TRAINERS, digest, grpo, learning, small_value  # noqa: F401

TWELVE = dataclasses.replace(ROLLOUT, prompts=12)
PROMPTS = tuple(f"{count} dogs" for count in range(14))
TIMINGS = ("seconds", "loop/update_seconds", "loop/samples_per_second")


def lightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


class Drifting:
    """Lightness, and `step` more with every question."""

    def __init__(self, step):
        self.step, self.asked = step, 0

    def __call__(self, images, prompts):
        self.asked += 1
        return lightness(images, prompts) + self.step * self.asked


RISING, FALLING, STEADY = Drifting(1.0), Drifting(-1.0), lightness


def watched(folder, held_out, *, reward=None, updates=4, **monitor):
    """A run that looks at every rollout, whose held-out reward is this module's attribute of that name."""
    names = (f"{__name__}:{held_out}",) if held_out else ()
    return grpo(
        folder,
        reward=reward or RISING,
        prompts=PROMPTS,
        rollout=TWELVE,
        learning=learning(updates),
        monitor=MonitorConfig(held_out=names, prompts=12, every=1, canaries=False, **monitor),
    )


def lines(folder):
    return [{name: one for name, one in entry.items() if name not in TIMINGS} for entry in read_metrics(folder)]


@pytest.mark.parametrize("name", slow_but(("grpo",), TRAINERS))
def test_it_changes_nothing_that_is_learnt(name, tmp_path):
    runs = [TRAINERS[name](tmp_path / str(every), monitor=MonitorConfig(prompts=6, every=every)) for every in (1, None)]
    for trainer in runs:
        trainer.train()
    assert digest(runs[0]) == digest(runs[1])
    seen, unseen = (read_metrics(trainer.folder) for trainer in runs)
    assert "watched/saturation" in seen[0] and not any(name.startswith("watched/") for name in unseen[0])


def test_a_held_out_reward_that_falls_while_the_trained_one_rises_is_an_alarm(tmp_path, capsys):
    trainer = watched(tmp_path, "FALLING", updates=3)
    assert trainer.train().stopped_because is None
    (alarm,) = trainer.algorithm.collector.monitor.alarms
    assert alarm.rollout == 1 and alarm.metric == f"held_out/{__name__}:FALLING"
    assert str(alarm) in capsys.readouterr().out
    assert json.loads((tmp_path / "alarms.json").read_text()) == [vars(alarm)]
    assert [entry["watched/fall"] > 0 for entry in read_metrics(tmp_path)] == [False, True, True]


def test_no_alarm_without_a_fall_or_without_a_rise(tmp_path):
    for place, (held_out, reward) in enumerate((("STEADY", RISING), ("FALLING", FALLING.__class__(-1.0)))):
        trainer = watched(tmp_path / str(place), held_out, reward=reward, updates=2)
        trainer.train()
        assert trainer.algorithm.collector.monitor.alarms == []


def test_an_alarm_ends_the_run_where_it_should(tmp_path):
    ended = watched(tmp_path, "FALLING", stop=True).train()
    assert ended.updates == 2 and "FALLING fell" in (ended.stopped_because or "")


def test_what_is_trained_on_cannot_be_held_out(tmp_path):
    with pytest.raises(InputError, match="jpeg-compressibility, which is trained on"):
        grpo(tmp_path, monitor=MonitorConfig(held_out=("jpeg-compressibility",)))


def test_a_resumed_run_sees_the_same(tmp_path):
    monitor = MonitorConfig(held_out=("jpeg-incompressibility",), prompts=12, every=2)
    runs = {}
    for name, stops in (("whole", (4,)), ("resumed", (3, 4))):
        for number, updates in enumerate(stops):
            trainer = grpo(
                tmp_path / name, prompts=PROMPTS, rollout=TWELVE, learning=learning(updates), monitor=monitor
            )
            trainer.train(resume=number > 0)
        runs[name] = lines(tmp_path / name)
    assert runs["whole"] == runs["resumed"]
    assert [entry["watched/reward"] is None for entry in runs["whole"]] == [False, True, False, True]


def test_it_may_be_changed_in_a_resumed_run(tmp_path):
    grpo(tmp_path, learning=learning(1)).train()
    more = MonitorConfig(held_out=("jpeg-incompressibility",), prompts=4, every=1)
    grpo(tmp_path, learning=learning(3), monitor=more).train(resume=True)
    first, *_, last = read_metrics(tmp_path)
    assert "held_out/jpeg-incompressibility" not in first
    assert last["held_out/jpeg-incompressibility"] == pytest.approx(-last["watched/reward"])


def like_noise(images, prompts):
    """Prefers rough images, by as much as their prompts are long."""
    rough = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    return rough * torch.tensor([len(prompt) for prompt in prompts], dtype=torch.float32)


def canaries(folder, reward, weight=1.0, per_prompt=4):
    """Of two prompts' images that a tiny checkpoint draws."""
    trainer = grpo(folder, reward=WeightedRewards({"one": (reward, weight)}), prompts=["a dog", "two dogs in the rain"])
    shown = []
    rollouts = trainer.algorithm.collector.rollouts.aside(
        dataclasses.replace(ROLLOUT, images_per_prompt=per_prompt),
        seed=1,
        on_images=lambda _, images, *rest: shown.append(images),
    )
    drawn = rollouts.draw(0, lambda grid: Keep())
    return list(canary_checks(rollouts, drawn, shown[0], seed=0))


def test_a_judge_that_prefers_noise_is_refused(tmp_path):
    (check,) = canaries(tmp_path, like_noise)
    assert not check.passed
    (check,) = canaries(tmp_path, lambda images, prompts: -like_noise(images, prompts))
    assert check.passed


def test_four_images_tell_nothing_of_a_judge(tmp_path):
    (check,) = canaries(tmp_path, like_noise, per_prompt=2)
    assert check.passed


def test_a_judge_that_likes_some_of_the_images_better_passes(tmp_path):
    def but_for_the_first(images, prompts):
        values = like_noise(images, prompts)
        values[0] *= -1
        return values

    (check,) = canaries(tmp_path, but_for_the_first)
    assert check.passed


def test_what_does_not_read_prompts_may_like_noise(tmp_path):
    (check,) = canaries(tmp_path, lambda images, prompts: like_noise(images, ["a dog"] * len(prompts)))
    assert check.passed and "does not read prompts" in check.detail


def test_a_penalty_is_no_canary(tmp_path):
    assert canaries(tmp_path, like_noise, weight=-1.0) == []
