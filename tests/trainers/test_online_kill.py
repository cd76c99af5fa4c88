"""kill -9 in the middle of online runs: what is resumed ends as undisturbed. As a module: the runs that die."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from rpo.trainers.rollouts.settings import StepsConfig
from rpo.training.log import TIMINGS, read_metrics
from tests.trainers.online_runs import ROLLOUT, VALUE, digest, endpoint, grpo, learning, score_as_action

ROOT = Path(__file__).parents[2]
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


def die_at_update(trainer):
    steps = []

    def count(optimizer, *_):
        if optimizer.param_groups[0]["params"][0] is trainer.run.policy.parameters[0]:
            steps.append(1)
            if len(steps) == DIES_AT:
                os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)


def main(root):
    torch.set_num_threads(1)
    for name, make in RUNS.items():
        child = os.fork()  # forked, so that nothing is imported a second time
        if child == 0:
            trainer = make(root / name)
            die_at_update(trainer)
            trainer.train()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{name} ended with {status}"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.trainers.test_online_kill", str(root)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    return root


def end_of(trainer):
    """Everything that a run leaves and that does not lie in its folder's name."""
    lines = read_metrics(trainer.folder)
    return {
        "weights": digest(trainer),
        "lines": [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines],
        "checkpoint": [
            without_python(torch.load(trainer.folder / f"checkpoint-000006/{name}", weights_only=True))
            for name in ("optimizer.pt", "process-000.pt")
        ],
    }


def without_python(saved):
    """Python's own generator is that of the type checks, which only this process has; nothing that is trained is."""
    saved.get("random", {}).pop("python", None)
    return saved


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


@pytest.mark.parametrize("name", RUNS)
def test_what_was_killed_ends_as_if_undisturbed(killed, name):
    folder = killed / name
    assert [line["update"] for line in read_metrics(folder)] == [1, 2, 3, 4]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-000003"]
    resumed, undisturbed = RUNS[name](folder), RUNS[name](killed / f"{name}-undisturbed")
    assert resumed.train(resume=True).updates == 6
    undisturbed.train()
    assert_same(end_of(resumed), end_of(undisturbed))


def test_a_rollout_in_use_is_part_of_the_checkpoint(killed):
    own = torch.load(killed / "ddpo" / "checkpoint-000003" / "process-000.pt", weights_only=True)
    kept = own["objects"]["batches"]
    assert len(kept["names"]) == 12 and kept["x_t"].shape[0] == 12  # four images, three steps


def test_other_settings_cannot_continue_a_run(killed):
    trainer = score_as_action(killed / "trust_region", learning=LEARNING)
    with pytest.raises(ValueError, match="kl_weight from 0.01 to 0.0"):
        trainer.train(resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
