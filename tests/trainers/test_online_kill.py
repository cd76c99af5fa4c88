"""kill -9 in the middle of online runs: what is resumed ends as undisturbed."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from rpo.trainers.rollouts.settings import StepsConfig
from rpo.training.log import TIMINGS, read_metrics
from tests.forked import killed_in
from tests.marks import slow_but
from tests.trainers.online_runs import ROLLOUT, VALUE, digest, endpoint, grpo, learning, score_as_action

LEARNING = learning(6, lr_schedule="cosine", warmup_updates=1, ema_decay=0.5, checkpoint_every=3)
DIES_AT = 5
"""The weights have moved, and nothing else knows it yet; the last checkpoint is that of update 3."""


def ddpo(folder):
    """Two minibatches per rollout: update 3 lies within the second one, which no later policy could draw."""
    return grpo(
        folder,
        baseline="prompt_history",
        history=4,
        kl_weight=0.05,
        steps=StepsConfig(minibatches=2),
        learning=replace(LEARNING, micro_batch=3),
    )


def trust_region(folder):
    """A value, an adapting coefficient and two passes over each rollout."""
    return score_as_action(
        folder,
        estimator="likelihood_state_cost",
        update="trust_region",
        kl_weight=0.01,
        value=replace(VALUE, sees_latents=True),
        steps=StepsConfig(passes=2),
        rollout=replace(ROLLOUT, spacing="random"),
        learning=LEARNING,
    )


def pathwise(folder):
    """The graph of the rollout itself, by an ODE solver."""
    return score_as_action(
        folder,
        estimator="pathwise",
        value=replace(VALUE, uses_reward=False, sees_latents=True),
        steps=StepsConfig(keep_graph=True, train_steps=2),
        rollout=replace(ROLLOUT, solver="dpm_solver", eta=0.0),
        learning=LEARNING,
    )


def noised(folder):
    """Moments of no rollout, a value that judges them, and what their paths cost."""
    return endpoint(folder, baseline="value", kl_weight=0.01, steps=StepsConfig(train_steps=2), learning=LEARNING)


RUNS = {"ddpo": ddpo, "trust_region": trust_region, "pathwise": pathwise, "noised": noised}


def run_to_death(name, folder):
    trainer, steps = RUNS[name](folder), []

    def count(optimizer, *_):
        if optimizer.param_groups[0]["params"][0] is trainer.run.policy.parameters[0]:
            steps.append(1)
            if len(steps) == DIES_AT:
                os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)
    trainer.train()


@pytest.fixture
def killed(tmp_path):
    """The folder of a run that died, by its name."""

    def run(name):
        killed_in(run_to_death, name, tmp_path / name)
        return tmp_path / name

    return run


def end_of(trainer):
    """Everything that a run leaves and that does not lie in its folder's name."""
    lines = read_metrics(trainer.folder)
    return {
        "weights": digest(trainer),
        "lines": [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines],
        "checkpoint": [
            torch.load(trainer.folder / f"checkpoint-000006/{name}", weights_only=True)
            for name in ("optimizer.pt", "process-000.pt")
        ],
    }


def assert_same(ours, theirs, where=""):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("name", slow_but(("ddpo", "noised"), RUNS))
def test_what_was_killed_ends_as_if_undisturbed(killed, name, tmp_path):
    folder = killed(name)
    assert [line["update"] for line in read_metrics(folder)] == [1, 2, 3, 4]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-000003"]
    if name == "ddpo":
        a_rollout_in_use_is_part_of_the_checkpoint(folder)
    resumed, undisturbed = RUNS[name](folder), RUNS[name](tmp_path / "undisturbed")
    assert resumed.train(resume=True).updates == 6
    undisturbed.train()
    assert_same(end_of(resumed), end_of(undisturbed))


def a_rollout_in_use_is_part_of_the_checkpoint(folder):
    own = torch.load(folder / "checkpoint-000003" / "process-000.pt", weights_only=True)
    kept = own["objects"]["batches"]
    assert len(kept["names"]) == 12 and kept["x_t"].shape[0] == 12  # four images, three steps


def test_other_settings_cannot_continue_a_run(killed):
    folder = killed("noised")
    with pytest.raises(ValueError, match="kl_weight from 0.01 to 0.0"):
        endpoint(folder, baseline="value", steps=StepsConfig(train_steps=2), learning=LEARNING).train(resume=True)
