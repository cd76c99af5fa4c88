"""Every algorithm as small as it can be; a new one is a line here, and trains every family."""

from rpo.trainers.online_config import AdapterConfig, LearningConfig, RolloutConfig

from rpo.trainers.dpo import DPOTrainer
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.grpo import GRPOTrainer
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.score_as_action import ScoreAsActionTrainer
from rpo.trainers.score_as_action_config import ScoreAsActionConfig, ValueConfig
from rpo.training.loop_config import LoopConfig

PROMPTS = ("a red circle", "two dogs", "a house")


def dpo(pipe, folder, *, pairs, updates):
    config = DPOConfig(
        folder=str(folder),
        pairs_per_update=2,
        micro_batch=2,
        rank=2,
        max_chosen_error_ratio=float("inf"),
        resolution=(48, 64),
        loop=loop(updates),
    )
    return DPOTrainer(pipe, pairs, config)


def grpo(pipe, folder, *, pairs, updates):
    return GRPOTrainer(pipe, "jpeg-compressibility", PROMPTS, GRPOConfig(**online(folder, updates)))


def score_as_action(pipe, folder, *, pairs, updates, **changes):
    value = ValueConfig(channels=8, updates=2, batch_size=8, pretrain_rollouts=1, pretrain_updates=2)
    config = ScoreAsActionConfig(value=value, **online(folder, updates) | changes)
    return ScoreAsActionTrainer(pipe, "jpeg-compressibility", PROMPTS, config)


def endpoint(pipe, folder, *, pairs, updates):
    return score_as_action(pipe, folder, pairs=pairs, updates=updates, estimator="endpoint", advantage="group")


def online(folder, updates):
    return {
        "rollout": RolloutConfig(prompts=2, images_per_prompt=2, num_steps=3, guidance_scale=2.0),
        "learning": LearningConfig(micro_batch=4),
        "adapter": AdapterConfig(rank=2),
        "preview_every": 0,
        "folder": str(folder),
        "loop": loop(updates),
    }


def loop(updates):
    return LoopConfig(updates=updates, learning_rate=1e-2, progress=False)


ALGORITHMS = {"dpo": dpo, "grpo": grpo, "score_as_action": score_as_action, "endpoint": endpoint}
