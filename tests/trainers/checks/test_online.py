"""The preflight: passes a sound run and leaves it untouched, and fails on each thing that it looks for."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from rpo.trainers.checks.memory import MemoryEstimate, SavedBytes, readable_bytes, tensor_bytes
from rpo.trainers.checks.online import DRAWS
from rpo.trainers.checks.preflight import PreflightError, perturbed, preflight
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.types import Conditioning, StepOutput
from tests.marks import slow_but
from tests.trainers.online_runs import ROLLOUT, TRAINERS, UNWATCHED, digest, grpo, learning, small_value  # noqa: F401

SHORT = replace(ROLLOUT, num_steps=1)
"""Of what is judged and never replayed."""


def checked(trainer, **say):
    """What the trainer asks before its first update."""
    return preflight(trainer.algorithm.checks, device=trainer.run.model.device, **say)


def failure_of(trainer):
    lines = []
    with pytest.raises(PreflightError) as caught:
        checked(trainer, say=lines.append)
    failed = [line for line in lines if "FAIL" in line]
    assert len(failed) == 1 and "nothing was trained" in str(caught.value)
    return failed[0], str(caught.value)


def test_a_sound_run_passes_line_by_line(tmp_path):
    lines = []
    checks = checked(grpo(tmp_path), say=lines.append)
    assert lines == ["preflight", *map(str, checks)]
    assert [check.name for check in checks] == [
        "rewards finite",
        "rewards vary within prompts",
        "canaries of jpeg-compressibility",
        "ratio 1 on replay",
        "KL has its gradient",
        "adapter receives a gradient",
        "memory",
    ]
    assert all(line.startswith("  pass  ") for line in lines[1:])
    assert "norm 0 at the reference" in lines[5]


@pytest.mark.parametrize("name", slow_but(("endpoint",), TRAINERS))
def test_a_run_is_the_same_with_and_without_it(name, tmp_path):
    runs = [TRAINERS[name](tmp_path / str(asked), preflight=asked) for asked in (True, False)]
    for trainer in runs:
        random.seed(3)
        torch.manual_seed(3)
        trainer.train()
    assert digest(runs[0]) == digest(runs[1])


def test_weights_gradients_and_random_numbers_stay_as_they_were(tmp_path):
    trainer = grpo(tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.run.model.denoiser.state_dict().items()}
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    checked(trainer)
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    after = trainer.run.model.denoiser.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in trainer.run.policy.parameters)
    assert trainer.algorithm.collector.rollout is None and not list(tmp_path.iterdir())


def test_it_is_not_asked_again_by_a_resumed_run(tmp_path):
    asked = []

    def reward(images, prompts):
        asked.append(len(images))
        return images.mean(dim=(1, 2, 3))

    alone = {"reward": reward, "monitor": UNWATCHED}
    grpo(tmp_path, **alone, learning=learning(1)).train()
    assert len(asked) == 2  # preflight, rollout
    grpo(tmp_path, **alone, learning=learning(2)).train(resume=True)
    assert len(asked) == 3
    # A run that was killed before its first checkpoint begins anew, and so does its preflight.
    grpo(tmp_path / "new", **alone, learning=learning(1)).train(resume=True)
    assert len(asked) == 5


def test_a_constant_reward_is_given_several_chances(tmp_path):
    drawn = []

    def constant(images, prompts):
        drawn.append(len(images))
        return torch.ones(len(images))

    line, message = failure_of(grpo(tmp_path, reward=constant, rollout=SHORT, monitor=UNWATCHED))
    assert drawn == [4] * DRAWS
    assert "rewards vary within prompts: 1 for every image of a prompt, 32 images seen" in line
    assert "take a graded reward" in message and "(constant)" in message

    def rarely(images, prompts):
        drawn.append(len(images))
        return (torch.arange(len(images)) == 1).float() * (len(drawn) > DRAWS + 2)

    assert all(check.passed for check in checked(grpo(tmp_path, reward=rarely, rollout=SHORT, monitor=UNWATCHED)))
    assert len(drawn) == DRAWS + 3


def test_a_reward_that_differs_between_prompts_only_is_constant(tmp_path):
    reward = lambda images, prompts: torch.tensor([float(len(prompt)) for prompt in prompts])  # noqa: E731
    line, _ = failure_of(grpo(tmp_path, reward=reward, rollout=SHORT))
    assert "rewards vary within prompts" in line


def test_rounding_is_no_variation(tmp_path):
    def noisy(images, prompts):
        return 100 + 1e-5 * torch.arange(len(images))

    assert "rewards vary within prompts" in failure_of(grpo(tmp_path, reward=noisy, rollout=SHORT))[0]


def test_a_network_that_does_not_repeat_itself_fails_on_replay(tmp_path):
    trainer = grpo(tmp_path)
    denoiser = trainer.run.model.denoiser
    denoiser.conv_in.register_forward_hook(lambda _, args, output: nn.functional.dropout(output, 0.2))
    lines = []
    with pytest.raises(PreflightError, match="ratio 1 on replay: off by .*; .*dropout"):
        checked(trainer, say=lines.append)
    assert any(line.startswith("  FAIL  ratio 1 on replay") for line in lines)


def test_a_policy_that_has_left_the_reference_fails(tmp_path):
    trainer = grpo(tmp_path)
    with torch.no_grad():
        for parameter in trainer.run.policy.parameters:
            parameter.add_(0.05)
    line, message = failure_of(trainer)
    assert "KL has its gradient" in line and "without another adapter" in message


def test_an_adapter_that_the_loss_does_not_reach_fails(tmp_path):
    trainer = grpo(tmp_path)

    def loss(points):
        per_point = points.x_t.flatten(1).mean(dim=1)
        return StepOutput(per_point.mean(), per_point, {})

    trainer.algorithm.loss = loss
    line, message = failure_of(trainer)
    assert "adapter receives a gradient: norm 0, in 0 of" in line and "adapter.target_modules" in message


def test_memory_that_is_not_there_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("rpo.trainers.checks.online.free_bytes", lambda device: 1024.0)
    line, message = failure_of(grpo(tmp_path))
    assert "memory" in line and "; 1 KiB are free" in line and "lower learning.micro_batch" in message


def test_all_steps_of_kept_graphs_count(tmp_path):
    def graphs(trainer):
        detail = checked(trainer)[-1].detail
        return int(detail.split("graphs of ")[1].split(" ")[0])

    assert graphs(grpo(tmp_path)) == 4
    kept = grpo(tmp_path, steps=StepsConfig(keep_graph=True))
    assert graphs(kept) == ROLLOUT.images * 3


def test_the_memory_of_a_graph_is_what_its_backward_waits_for():
    weight = nn.Parameter(torch.ones(8, 8))
    x = torch.randn(4, 8)
    saved = SavedBytes(iter([weight]))
    with saved.counting():
        hidden = (x @ weight).tanh()
        hidden.square().sum()
    assert saved.total == 2 * 4 * 8 * 4  # x for the product, the output of tanh for itself and the square


def test_the_estimate_is_the_sum_that_it_says():
    estimate = MemoryEstimate(
        image=2048, images=3, step=1024, steps=10, graph=2**20, rows=4, parameter=12, parameters=1000
    )
    assert estimate.total == 3 * 2048 + 10 * 1024 + 4 * 2**20 + 12_000
    assert str(estimate) == (
        "4.03 MiB beside the weights = 3 images × 2 KiB + 10 steps × 1 KiB + graphs of 4 × 1 MiB + "
        "1,000 parameters × 12 B"
    )
    assert [readable_bytes(n) for n in (512, 1536, 3 * 2**20, 2**31)] == ["512 B", "1.5 KiB", "3 MiB", "2 GiB"]
    assert tensor_bytes(Conditioning({"tokens": torch.zeros(2, 3, 4)}, {"tokens": torch.zeros(2, 3, 4)})) == 2 * 96


def test_perturbed_parameters_come_back_bit_for_bit_after_an_error_too():
    parameters = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.zeros(3))]
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(RuntimeError), perturbed(parameters, seed=0):
        assert all((parameter != value).all() for parameter, value in zip(parameters, before, strict=True))
        raise RuntimeError
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True))
