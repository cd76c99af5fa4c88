"""Scores that failed: what is counted and kept, when a run ends and by whose fault, over all processes."""

import json
import math

import pytest
import torch

from rpo.models.checkpoint import Checkpoint
from rpo.rewards import RewardError, load_rewards
from rpo.rewards.answers import Answered
from rpo.sampling.sample import Keep
from rpo.trainers.rollouts.draw import Rollouts, rollout_facts
from rpo.trainers.rollouts.failed import FailedScores
from rpo.trainers.rollouts.settings import RolloutConfig
from rpo.training.processes import Processes
from tests.tiny import tiny_sd

NAN = math.nan
PROMPTS = ("a red circle", "two dogs", "a house", "a cat")
IMAGES = torch.zeros(4, 3, 8, 8)


def answers(**scores):
    return {name: Answered(torch.tensor(values)) for name, values in scores.items()}


def test_images_without_a_score_count_nothing_and_the_others_so_much_more():
    failed = FailedScores(0.5)
    assert failed.counts(answers(a=[1.0, NAN, 2.0, 0.0]), IMAGES, PROMPTS).tolist() == pytest.approx(
        [4 / 3, 0, 4 / 3, 4 / 3]
    )
    assert failed.counts(answers(a=[1.0, 3.0, 2.0, 0.0]), IMAGES, PROMPTS).tolist() == [1, 1, 1, 1]
    two = answers(a=[1.0, NAN, 2.0, 0.0], b=[NAN, NAN, 2.0, 0.0])
    assert failed.counts(two, IMAGES, PROMPTS).tolist() == [0, 0, 2, 2]


def test_as_many_may_fail_as_the_setting_says_and_no_more():
    for most, num_failed, ends in ((0.0, 0, False), (0.0, 1, True), (0.29, 29, False), (0.29, 30, True)):
        scores = torch.arange(100.0).masked_fill(torch.arange(100) < num_failed, NAN)
        failed, given = FailedScores(most), ({"a": Answered(scores)}, torch.zeros(100, 3, 8, 8), ("a",) * 100)
        if ends:
            with pytest.raises(RewardError, match=f"^reward 'a', image 0 .*: returned nan for {num_failed} of 100"):
                failed.counts(*given)
        else:
            assert failed.counts(*given).sum().item() == pytest.approx(100)


def test_the_reward_that_fails_most_is_named_with_its_images(tmp_path):
    two = answers(a=[1.0, NAN, 2.0, 0.0], b=[NAN, 1.0, 2.0, NAN])
    with pytest.raises(
        RewardError, match=r"^reward 'b', image 0 \('a red circle'\) and 1 more: returned nan"
    ) as caught:
        FailedScores(0.4, evidence=tmp_path).counts(two, IMAGES, PROMPTS)
    assert "for 2 of 4 images, with the other rewards 3, of which rollout.max_failed lets 1 fail" in str(caught.value)
    record = json.loads((caught.value.saved_in / "fault.json").read_text())
    assert [one["index"] for one in record["images"]] == [0, 3]


def test_the_first_failure_of_each_reward_is_kept_and_no_other(tmp_path):
    failed = FailedScores(0.5, evidence=tmp_path)
    for scores in ({"a": [NAN, 1.0, 2.0, 0.0]}, {"a": [1.0, NAN, 2.0, 0.0]}, {"b": [1.0, 1.0, 2.0, NAN]}):
        failed.counts(answers(**scores), IMAGES, PROMPTS)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["a-1", "b-1"]
    assert json.loads((tmp_path / "a-1" / "fault.json").read_text())["images"][0]["prompt"] == PROMPTS[0]


def test_a_full_disk_does_not_end_a_run_that_can_go_on(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    failed = FailedScores(0.5, evidence=tmp_path / "taken")
    assert failed.counts(answers(a=[NAN, 1.0, 2.0, 0.0]), IMAGES, PROMPTS)[0] == 0


def test_counts_and_ends_are_those_of_all_processes(tmp_path):
    """Of eight images of two processes, of which only the other one's fail."""
    theirs = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    with_theirs = {"join": lambda own: torch.cat([own, theirs]), "evidence": tmp_path}
    fine = answers(a=[1.0, 3.0, 2.0, 0.0])
    assert FailedScores(0.2, **with_theirs).counts(fine, IMAGES, PROMPTS).tolist() == pytest.approx([8 / 7] * 4)
    with pytest.raises(RewardError, match="^reward 'a': returned nan for 1 of 8 images.*of another process$"):
        FailedScores(0.1, **with_theirs).counts(fine, IMAGES, PROMPTS)
    assert not list(tmp_path.iterdir())


def lightness(images, prompts):
    return images.mean(dim=(1, 2, 3)), {"size": [1.0, 2.0, 30.0, 4.0]}


def third_fails(images, prompts):
    return torch.tensor([5.0, 7.0, NAN, 6.0]), {"tries": [1.0, 2.0, NAN, 3.0]}


def test_an_image_that_any_reward_could_not_judge_is_in_nothing_that_is_said_of_a_rollout():
    seen = []
    rewards = load_rewards({f"{__name__}:lightness": 1.0, f"{__name__}:third_fails": 0.5})
    config = RolloutConfig(prompts=2, images_per_prompt=2, num_steps=3, guidance_scale=2.0, max_failed=0.25)
    source = Rollouts(
        Checkpoint(tiny_sd()), PROMPTS, rewards, config, seed=0, on_images=lambda *told: seen.append(told)
    )
    rollout = source.draw(0, lambda grid: Keep(predictions=True))
    assert rollout.judged.tolist() == [True, True, False, True]
    assert [part.isnan().tolist() for part in rollout.parts.values()] == [[False, False, True, False]] * 2
    assert rollout.rewards.isnan().tolist() == [False, False, True, False]
    kept = rollout.rewards[[0, 1, 3]]
    facts = rollout_facts(rollout, Processes())
    assert facts["reward/failed"].item() == pytest.approx(0.25)
    assert facts["reward/mean"].item() == pytest.approx(kept.mean().item())
    assert facts["reward/std"].item() == pytest.approx(kept.std(correction=0).item())
    assert facts[f"reward/{__name__}:third_fails"].item() == pytest.approx(6)
    assert facts[f"info/{__name__}:third_fails.tries"].item() == pytest.approx(2)
    assert facts[f"info/{__name__}:lightness.size"].item() == pytest.approx(37 / 4)  # its own scores are all there
    ((_, images, _, _, told),) = seen
    assert len(images) == 4 and told.isnan().tolist() == [False, False, True, False]


def test_few_images_may_fail_as_often_as_those_of_a_whole_rollout():
    config = RolloutConfig(prompts=4, images_per_prompt=4, max_failed=0.1)
    assert config.of_few(2, 4).max_failed == pytest.approx(0.2)
    assert config.of_few(2, 1).max_failed == 0.5
    assert RolloutConfig(max_failed=0).of_few(2, 4).max_failed == 0
