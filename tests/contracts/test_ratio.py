"""What an algorithm replays is what it drew: until the first update every log-ratio is 0, not nearly.

The condition is that the network is asked about batches of one size, since other sizes are other kernels.
"""

import itertools

import pytest
import torch

from rpo.models.checkpoint import Checkpoint
from rpo.trainers.rollouts.settings import RolloutConfig, StepsConfig
from tests.contracts.families import ALWAYS, FAMILIES
from tests.trainers.online_runs import grpo, moved, replayed_by, score_as_action, small_value  # noqa: F401

pytestmark = [pytest.mark.contracts, pytest.mark.filterwarnings("ignore:the network denoises no better")]

GUIDANCE = {
    "none": (1.0, StepsConfig()),
    "both branches": (3.0, StepsConfig(freeze_negative=False)),
    "frozen negative": (3.0, StepsConfig(freeze_negative=True)),
}


def log_ratio(trainer):
    """Of the first micro-batch, as the loss computes it."""
    algorithm = trainer.algorithm
    steps = next(algorithm.batches(0))
    assert len(steps) == algorithm.config.rollout.images
    _, now = replayed_by(trainer, steps)
    return now.log_prob(steps.x_s) - steps["log_prob"]


def cases():
    """All of them; by default Stable Diffusion with everything in the type of one trainer each, and the others once."""
    for case in itertools.product([grpo, score_as_action], FAMILIES, GUIDANCE, [torch.float32, torch.bfloat16]):
        make, family, guidance, dtype = case
        once = make is grpo and guidance == "frozen negative" and dtype is torch.bfloat16 and family in ALWAYS
        is_shown = once or (family == "stable_diffusion" and (make is grpo) == (dtype is torch.bfloat16))
        yield pytest.param(*case, marks=() if is_shown else pytest.mark.slow, id=name_of(*case))


def name_of(make, family, guidance, dtype):
    return f"{make.__name__}-{family}-{guidance}-{str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize(("make", "family", "guidance", "compute_dtype"), cases())
def test_a_policy_that_has_not_moved_has_log_ratio_0(make, family, guidance, compute_dtype, tmp_path):
    scale, steps = GUIDANCE[guidance]
    rollout = RolloutConfig(prompts=2, images_per_prompt=2, num_steps=3, guidance_scale=scale)
    pipe = Checkpoint(FAMILIES[family](), compute_dtype=compute_dtype)
    trainer = moved(make(tmp_path, pipe=pipe, rollout=rollout, steps=steps))
    assert log_ratio(trainer).tolist() == [0.0] * 4
