"""Online runs as small as they can be: four images of two prompts, three steps, few updates of the value."""

import hashlib

import pytest
import torch

from rpo.objectives.endpoint.bound import Bound
from rpo.objectives.reward_gradient.draft import Draft
from rpo.trainers.endpoint import Endpoint
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.grpo import GRPO
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.reward_gradient import RewardGradient
from rpo.trainers.reward_gradient_config import RewardGradientConfig
from rpo.trainers.rollouts.settings import MonitorConfig, OnlineLearningConfig, RolloutConfig, StepsConfig
from rpo.trainers.rollouts.steps import replayed
from rpo.trainers.score_as_action import ScoreAsAction
from rpo.trainers.score_as_action_config import ScoreAsActionConfig
from rpo.trainers.settings import AdapterConfig
from rpo.trainers.trainer import Trainer
from rpo.trainers.value.settings import ValueConfig
from tests.tiny import tiny_sd

PROMPTS = ("a red circle", "two dogs", "a house")
ROLLOUT = RolloutConfig(prompts=2, images_per_prompt=2, num_steps=3, guidance_scale=2.0)
VALUE = ValueConfig(updates=2, batch_size=8, pretrain_rollouts=1)
ADAPTER = AdapterConfig(rank=4)
STEPS = StepsConfig()
UNWATCHED = MonitorConfig(every=None, canaries=False)


def learning(updates=2, **changes):
    return OnlineLearningConfig(
        **{"updates": updates, "learning_rate": 1e-2, "progress": False, "micro_batch": 4} | changes
    )


def settings(folder, **changes):
    return {
        "rollout": ROLLOUT,
        "steps": STEPS,
        "adapter": ADAPTER,
        "preview_every": 0,
        "monitor": MonitorConfig(prompts=2),
        "output": str(folder),
        "learning": learning(),
    } | changes


def grpo(folder, *, pipe=None, reward="jpeg-compressibility", prompts=None, **changes):
    return Trainer(pipe or tiny_sd(), GRPO(reward, prompts or PROMPTS, GRPOConfig(**settings(folder, **changes))))


def score_as_action(folder, *, pipe=None, reward="jpeg-compressibility", prompts=None, **changes):
    config = ScoreAsActionConfig(**settings(folder, **{"value": VALUE} | changes))
    return Trainer(pipe or tiny_sd(), ScoreAsAction(reward, prompts or PROMPTS, config))


def endpoint(folder, *, pipe=None, reward="jpeg-compressibility", prompts=None, **changes):
    """By the bound, whose own settings stand beside the others; or by the `objective` given."""
    own = {name: changes.pop(name) for name in ("baseline", "scale", "consistency", "clip") if name in changes}
    changes = {"objective": Bound(**own)} | changes
    config = EndpointConfig(**settings(folder, **{"value": VALUE} | changes))
    return Trainer(pipe or tiny_sd(), Endpoint(reward, prompts or PROMPTS, config))


def reward_gradient(folder, *, pipe=None, reward=None, prompts=None, **changes):
    config = RewardGradientConfig(**settings(folder, **{"objective": Draft(last_steps=2)} | changes))
    return Trainer(pipe or tiny_sd(), RewardGradient(reward or lightness, prompts or PROMPTS, config))


TRAINERS = {
    "grpo": grpo,
    "score_as_action": score_as_action,
    "endpoint": endpoint,
    "reward_gradient": reward_gradient,
}


def moved(trainer):
    """The trainer with an adapter that does something."""
    with torch.no_grad():
        for index, parameter in enumerate(trainer.run.policy.parameters):
            generator = torch.Generator().manual_seed(index)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return trainer


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def replayed_by(trainer, steps, **changes):
    """What the trainer's loss replays of steps: the guided output and its transition."""
    kernel, guidance = trainer.algorithm.collector.kernel, trainer.run.config.guidance_scale
    return replayed(trainer.run.model, steps, **{"kernel": kernel, "guidance_scale": guidance} | changes)


def digest(trainer):
    """The trained weights, to the bit."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.run.policy.parameters)).hexdigest()


def lightness(images, prompts):
    """A reward that a configuration can name."""
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(autouse=True)
def small_value(monkeypatch):
    """Little pretraining of the value."""
    monkeypatch.setattr("rpo.trainers.value.returns.PRETRAIN_UPDATES", 2)
