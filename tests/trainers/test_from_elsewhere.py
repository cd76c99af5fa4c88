"""What people bring from other trainers: prompts with metadata from a source, rewards with info, hooks."""

import itertools
import json
import random

import pytest
import torch

from rpo.errors import InputError
from rpo.models.config import ModelConfig
from rpo.objectives.endpoint.bound import Bound
from rpo.rewards import RewardError
from rpo.runs.train import run
from rpo.runs.train_config import GRPORunConfig
from rpo.trainers.endpoint import Endpoint
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.grpo import GRPO
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.trainers.score_as_action import ScoreAsAction
from rpo.trainers.score_as_action_config import ScoreAsActionConfig
from rpo.trainers.trainer import Trainer
from rpo.trainers.value.settings import ValueConfig
from rpo.training.log import TIMINGS, read_metrics
from tests.marks import slow_but
from tests.tiny import tiny_sd
from tests.trainers.online_runs import UNWATCHED, VALUE, digest, learning, settings, small_value  # noqa: F401
from tests.trainers.pair_runs import trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")


def prompt_function():
    """As in TRL's guide: a prompt drawn by the global generator, and its metadata."""
    number = random.randrange(3, 9)
    return f"{number} cats", {"count": number}


def counting():
    for number in itertools.count(3):
        yield f"{number} cats", {"count": number}


def reward(images, prompts, metadata):
    """Believes the metadata, and fails without."""
    assert [f"{one['count']} cats" for one in metadata] == list(prompts)
    values = images.mean(dim=(1, 2, 3)) + 0.1 * torch.tensor([one["count"] for one in metadata])
    return values, {"count": [one["count"] for one in metadata], "words": list(prompts)}


def trainer_from(folder, prompts, *, updates=2, pipe=None, on_images=None, **changes):
    changes = {"learning": learning(updates), "steps": StepsConfig(passes=2)} | changes
    config = GRPOConfig(**settings(folder, **changes))
    return Trainer(pipe or tiny_sd(), GRPO(reward, prompts, config, on_images=on_images))


def lines(folder):
    return [{name: one for name, one in line.items() if name not in TIMINGS} for line in read_metrics(folder)]


ALGORITHMS = {
    "grpo": (GRPO, GRPOConfig, {"baseline": "prompt_history"}),
    "score_as_action": (ScoreAsAction, ScoreAsActionConfig, {"value": VALUE, "advantage": "return_minus_value"}),
    "pathwise": (
        ScoreAsAction,
        ScoreAsActionConfig,
        {"estimator": "pathwise", "value": ValueConfig(uses_reward=True, sees_latents=True, updates=2)},
    ),
    "endpoint": (Endpoint, EndpointConfig, {"value": VALUE, "objective": Bound(baseline="value")}),
}


@pytest.mark.parametrize("name", slow_but(("grpo", "pathwise"), ALGORITHMS))
def test_metadata_reach_the_reward_of_every_algorithm_and_the_hook(name, tmp_path):
    algorithm, config, changes = ALGORITHMS[name]
    seen = []
    made = algorithm(
        reward, prompt_function, config(**settings(tmp_path, **changes)), on_images=lambda *given: seen.append(given)
    )
    trainer = Trainer(tiny_sd(), made)
    trainer.train()
    assert [given[0] for given in seen] == [0, 1]
    for _, images, prompts, metadata, rewards in seen:
        assert images.shape == (4, 3, 64, 64) and not images.requires_grad
        assert [f"{one['count']} cats" for one in metadata] == list(prompts) and len(prompts) == 4
        assert torch.allclose(rewards, reward(images, prompts, metadata)[0])
    logged = read_metrics(tmp_path)
    for line, (_, _, _, metadata, rewards) in zip(logged, seen, strict=True):
        assert line["info/reward.count"] == pytest.approx(sum(one["count"] for one in metadata) / 4)
        assert line["reward/mean"] == pytest.approx(rewards.mean().item())
        assert not [name for name in line if "words" in name]


def test_the_same_is_drawn_whatever_the_global_generators_are_at(tmp_path):
    found = []
    for seed in (1, 2):
        random.seed(seed)
        trainer = trainer_from(tmp_path / str(seed), prompt_function)
        trainer.train()
        found.append((digest(trainer), lines(trainer.folder)))
    assert found[0] == found[1]


SOURCES = {"function": lambda: prompt_function, "generator": counting}


@pytest.mark.parametrize("name", slow_but(("function",), SOURCES))
def test_a_run_on_a_source_resumes_in_the_same_bits(name, tmp_path):
    """At update 3 its second rollout is in use, and the preflight has drawn more than the run has seen."""
    make = SOURCES[name]
    whole = trainer_from(tmp_path / "whole", make(), updates=4)
    whole.train()
    trainer_from(tmp_path / "cut", make(), updates=3).train()
    resumed = trainer_from(tmp_path / "cut", make(), updates=4)
    resumed.train(resume=True)
    assert digest(resumed) == digest(whole)
    assert lines(resumed.folder) == lines(whole.folder)


def test_a_run_whose_source_does_not_repeat_is_not_resumed(tmp_path):
    source = counting()
    trainer_from(tmp_path, source).train()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="source of the prompts does not give"):
        trainer_from(tmp_path, source, updates=4).train(resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    with pytest.raises(InputError, match="prompts from drawn from a source to 1 "):
        trainer_from(tmp_path, [("3 cats", {"count": 3})], updates=4).train(resume=True)
    assert trainer_from(tmp_path, counting(), updates=4).train(resume=True).updates == 4


def test_images_of_no_prompt_are_trained_on(tmp_path):
    made = GRPO("jpeg-compressibility", lambda: ("", {}), GRPOConfig(**settings(tmp_path)))
    assert Trainer(tiny_sd(), made).train().updates == 2


def test_hooks_are_told_what_is_logged_and_may_draw_random_numbers(tmp_path):
    quiet = trainer_from(tmp_path / "quiet", counting())
    quiet.train()
    told = []

    def on_update(update, metrics):
        random.random(), torch.rand(3)
        told.append({"update": update, **metrics})

    watched = trainer_from(tmp_path / "watched", counting(), on_images=lambda *_: torch.rand(random.randrange(9)))
    watched.train(on_update=on_update)
    assert digest(watched) == digest(quiet)
    for line, metrics in zip(read_metrics(watched.folder), told, strict=True):
        assert metrics == {name: line[name] for name in metrics}
        assert "loop/loss" in metrics and "reward/mean" in metrics


def test_dpo_tells_of_its_updates_too(tmp_path):
    updates = []
    trainer_of(tmp_path, updates=3).train(
        on_update=lambda update, metrics: updates.append((update, "dpo/loss" in metrics))
    )
    assert updates == [(1, True), (2, True), (3, True)]


def test_a_hook_that_fails_ends_the_run_and_what_was_learnt_is_kept(tmp_path):
    def on_update(update, metrics):
        if update == 2:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more") as caught:
        trainer_from(tmp_path, counting(), updates=4).train(on_update=on_update)
    assert any("The state after 2 updates is kept" in note for note in caught.value.__notes__)


def test_info_that_comes_and_goes_is_logged_under_the_first_names(tmp_path):
    calls = itertools.count()

    def fickle(images, prompts):
        number = next(calls)
        return images.mean(dim=(1, 2, 3)), {"a": [1.0] * len(images)} if number % 2 else {"b": [1.0] * len(images)}

    config = GRPOConfig(**settings(tmp_path, learning=learning(3), preflight=False, monitor=UNWATCHED))
    Trainer(tiny_sd(), GRPO(fickle, ["a"], config)).train()
    assert [line["info/fickle.b"] for line in read_metrics(tmp_path)] == [1.0, None, 1.0]


def test_json_lines_and_a_reward_of_a_module_from_a_configuration(tmp_path, monkeypatch):
    made = tmp_path / "prompts.jsonl"
    made.write_text("".join(json.dumps({"prompt": f"{n} cats", "count": n}) + "\n" for n in (3, 4)))
    tiny_sd().save_pretrained(tmp_path / "model")
    own = settings(tmp_path / "run", learning=learning(1), preview_every=1)
    model = ModelConfig(source=str(tmp_path / "model"))
    result = run(GRPORunConfig(**own, model=model, prompts=str(made), rewards={f"{__name__}:reward": 1.0}))
    assert (
        "3 cats  {&#34;count&#34;: 3}" in result.report.read_text()
        or '3 cats  {"count": 3}' in result.report.read_text()
    )


def test_the_metadata_of_a_fault_are_kept_with_its_image(tmp_path):
    def broken(images, prompts, metadata):
        raise ConnectionError("gone")

    made = GRPO(broken, counting(), GRPOConfig(**settings(tmp_path)))
    with pytest.raises(RewardError) as caught:
        Trainer(tiny_sd(), made).train()
    fault = json.loads((caught.value.saved_in / "fault.json").read_text())
    assert fault["images"][0]["metadata"] == {"count": 3}
