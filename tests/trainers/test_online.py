"""The online trainers as plug-ins: they learn on epsilon and v-prediction, and failing rewards end as they should."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.rewards import RewardError
from rpo.trainers.checks.preflight import PreflightError
from rpo.trainers.grpo import GRPO
from rpo.trainers.score_as_action import ScoreAsAction
from rpo.training.log import read_metrics
from tests.marks import slow_but
from tests.tiny import save_tiny_sd, tiny_sd
from tests.trainers.online_runs import PROMPTS, ROLLOUT, TRAINERS, digest, learning, small_value  # noqa: F401


class Judge:
    """The mean of each image, until a run has logged so many updates."""

    def __init__(self, failure=None, folder=None, after=0):
        self.failure, self.folder, self.after = failure, folder, after

    def __call__(self, images, prompts):
        values = images.mean(dim=(1, 2, 3))
        if self.failure is None or len(read_metrics(self.folder)) < self.after:
            return values
        if self.failure == "nan":
            values[1] = torch.nan
            return values
        raise RuntimeError("no connection to the judge")


@pytest.mark.parametrize("prediction_type", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_but(("score_as_action", "reward_gradient"), TRAINERS))
def test_two_updates_on_the_callers_own_pipeline(name, prediction_type, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(
        save_tiny_sd(tmp_path / "model", prediction_type), safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    draw = {"num_inference_steps": 2, "output_type": "pt"}
    before = pipe("two dogs", generator=torch.Generator().manual_seed(0), **draw).images
    trainer = TRAINERS[name](tmp_path / "run", pipe=pipe, reward=lambda images, prompts: images.mean(dim=(1, 2, 3)))
    result = trainer.train()
    assert result.updates == 2
    lines = read_metrics(tmp_path / "run")
    assert [line["update"] for line in lines] == [1, 2]
    assert {"reward/mean", "reward/std", "policy/kl"} <= set(lines[0])
    if isinstance(trainer.algorithm, GRPO | ScoreAsAction):
        assert lines[0]["policy/ratio"] == pytest.approx(1, abs=1e-5)  # the policy that drew is the one that is trained
    assert lines[0]["policy/kl"] == pytest.approx(0, abs=1e-6) and abs(lines[1]["policy/kl"]) > 1e-6
    after = pipe("two dogs", generator=torch.Generator().manual_seed(0), **draw).images
    assert (after - before).abs().max() > 1e-5  # the caller's pipe carries the adapter
    saved = trainer.save()
    assert (saved / WEIGHT_FILE).is_file() and (saved / "training_config.yaml").is_file()
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(saved))
    drawn = stock("two dogs", generator=torch.Generator().manual_seed(0), **draw).images
    assert (drawn - after).abs().max() < 1e-4


@pytest.mark.parametrize("failure", ["nan", pytest.param("raises", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_but(("grpo", "reward_gradient"), TRAINERS))
def test_a_failing_reward_stops_with_evidence_and_what_was_learnt_is_kept(name, failure, tmp_path):
    make, three = TRAINERS[name], learning(3)
    trainer = make(tmp_path / "run", reward=Judge(failure, tmp_path / "run", after=2), learning=three)
    with pytest.raises(RewardError) as caught:
        trainer.train()
    message = str(caught.value)
    if failure == "nan":
        assert "reward 'Judge', image 1 (" in message and "returned nan" in message
    else:
        assert "raised RuntimeError: no connection to the judge" in message
    folder = caught.value.saved_in
    assert folder.parent == tmp_path / "run" / "failed_reward" and str(folder) in message
    assert list(folder.glob("*.png"))
    assert any(prompt in folder.joinpath("fault.json").read_text() for prompt in PROMPTS)
    assert (tmp_path / "run" / "checkpoint-000002").is_dir()
    assert any("The state after 2 updates is kept in" in note for note in caught.value.__notes__)
    assert [line["update"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    # With the reward mended, the run goes on as if nothing had happened.
    resumed, whole = (
        make(tmp_path / "run", reward=Judge(), learning=three),
        make(tmp_path / "b", reward=Judge(), learning=three),
    )
    resumed.train(resume=True)
    whole.train()
    assert digest(resumed) == digest(whole)


@pytest.mark.parametrize("name", slow_but(("grpo", "endpoint"), TRAINERS))
def test_a_constant_reward_is_told_before_the_first_update(name, tmp_path):
    trainer = TRAINERS[name](
        tmp_path,
        reward=lambda images, prompts: 0.5 + 0 * images.mean(dim=(1, 2, 3)),
        rollout=replace(ROLLOUT, num_steps=2),
    )
    before = digest(trainer)
    with pytest.raises(PreflightError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "rewards vary within prompts: 0.5 for every image of a prompt, 32 images seen" in message
    assert "images of one prompt have to differ in reward" in message and "preflight: false" in message
    assert digest(trainer) == before and read_metrics(tmp_path) == []
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_reward_that_fails_at_once_fails_in_the_preflight(tmp_path):
    trainer = TRAINERS["grpo"](tmp_path, reward=Judge("nan", tmp_path))
    with pytest.raises(RewardError, match="expected a finite float32 number"):
        trainer.train()
    assert trainer.algorithm.collector.rollout is None


def test_a_rollout_is_the_same_whatever_its_batch_and_resumes_in_the_same_images(tmp_path):
    names = [TRAINERS["grpo"](tmp_path / str(n)).algorithm.collector.draw(n) for n in (0, 1, 1)]
    assert names[0].names != names[1].names and names[1].names == names[2].names
    assert torch.equal(names[1].trajectory.latents, names[2].trajectory.latents)
    assert not torch.equal(names[0].trajectory.latents, names[1].trajectory.latents)


def test_previews_show_the_same_noise_every_so_often(tmp_path):
    trainer = TRAINERS["grpo"](tmp_path, preview_every=2, learning=learning(3))
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["update-000000.png", "update-000002.png"]


def test_what_a_run_comes_to_is_said_and_recorded(tmp_path):
    trainer = TRAINERS["score_as_action"](tmp_path, pipe=tiny_sd())
    plan = trainer.plan()
    assert "2 prompts × 2 images, 3 steps of ddim at eta 1, guidance 2; 2 rollouts = 8 images" in plan
    size, accumulate = trainer.algorithm.division
    assert trainer.algorithm.collector.trained_steps * ROLLOUT.images == size * accumulate
    trainer.train()
    run = json.loads((tmp_path / "checkpoint-000002" / "run.json").read_text())
    assert run["loop"]["accumulate"] == accumulate
