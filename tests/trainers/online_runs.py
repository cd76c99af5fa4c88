"""Online runs as small as they can be: four images of two prompts, three steps, a few numbers in the value network."""

import hashlib

from rpo.trainers.grpo import GRPOTrainer
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.online_config import AdapterConfig, LearningConfig, RolloutConfig
from rpo.trainers.score_as_action import ScoreAsActionTrainer
from rpo.trainers.score_as_action_config import ScoreAsActionConfig, ValueConfig
from rpo.training.loop import LoopConfig
from tests.tiny import tiny_sd

PROMPTS = ("a red circle", "two dogs", "a house")
ROLLOUT = RolloutConfig(prompts=2, images_per_prompt=2, num_steps=3, guidance_scale=2.0)
VALUE = ValueConfig(channels=8, updates=2, batch_size=8, pretrain_rollouts=1, pretrain_updates=2)
ADAPTER = AdapterConfig(rank=4)
LEARNING = LearningConfig(micro_batch=4)


def loop(updates=2, **changes):
    return LoopConfig(updates=updates, learning_rate=1e-2, progress=False, **changes)


def settings(folder, **changes):
    return {
        "rollout": ROLLOUT,
        "learning": LEARNING,
        "adapter": ADAPTER,
        "preview_every": 0,
        "folder": str(folder),
        "loop": loop(),
    } | changes


def grpo(folder, *, pipe=None, reward="jpeg-compressibility", **changes):
    return GRPOTrainer(pipe or tiny_sd(), reward, PROMPTS, GRPOConfig(**settings(folder, **changes)))


def score_as_action(folder, *, pipe=None, reward="jpeg-compressibility", **changes):
    config = ScoreAsActionConfig(**settings(folder, **{"value": VALUE} | changes))
    return ScoreAsActionTrainer(pipe or tiny_sd(), reward, PROMPTS, config)


TRAINERS = {"grpo": grpo, "score_as_action": score_as_action}


def digest(trainer):
    """The trained weights, to the bit."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.run.policy.parameters)).hexdigest()


def lightness(images, prompts):
    """A reward that a configuration can name."""
    return images.mean(dim=(1, 2, 3))
