"""The place where a diffusers pipeline goes to be aligned.

These are the public names. Each is imported when it is first asked for, so that `import rpo` loads neither torch nor
diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rpo.adapters.lora import add_lora, reference, save_lora
    from rpo.config import load_config
    from rpo.curation.curate import Components, curate
    from rpo.curation.curate_config import CurateConfig
    from rpo.data.preference import PairSet, PreferencePair, pair_set
    from rpo.data.readers import read_pairs
    from rpo.data.writers import write_pairs
    from rpo.models.checkpoint import Checkpoint
    from rpo.process.transition import Ddim, EulerMaruyama, ddim
    from rpo.rewards import load_reward, load_rewards
    from rpo.sampling.sample import generate, image_generator, replay, sample
    from rpo.trainers.dpo import DPOTrainer
    from rpo.trainers.dpo_config import DPOConfig
    from rpo.trainers.grpo import GRPOTrainer
    from rpo.trainers.grpo_config import GRPOConfig
    from rpo.trainers.score_as_action import ScoreAsActionTrainer
    from rpo.trainers.score_as_action_config import ScoreAsActionConfig
    from rpo.training.loop_config import LoopConfig

__all__ = [
    "Checkpoint",
    "Components",
    "CurateConfig",
    "DPOConfig",
    "DPOTrainer",
    "Ddim",
    "EulerMaruyama",
    "GRPOConfig",
    "GRPOTrainer",
    "LoopConfig",
    "PairSet",
    "PreferencePair",
    "ScoreAsActionConfig",
    "ScoreAsActionTrainer",
    "__version__",
    "add_lora",
    "curate",
    "ddim",
    "generate",
    "image_generator",
    "load_config",
    "load_reward",
    "load_rewards",
    "pair_set",
    "read_pairs",
    "reference",
    "replay",
    "sample",
    "save_lora",
    "write_pairs",
]

_HOME = {
    "Components": "rpo.curation.curate",
    "CurateConfig": "rpo.curation.curate_config",
    "DPOConfig": "rpo.trainers.dpo_config",
    "DPOTrainer": "rpo.trainers.dpo",
    "Ddim": "rpo.process.transition",
    "EulerMaruyama": "rpo.process.transition",
    "GRPOConfig": "rpo.trainers.grpo_config",
    "GRPOTrainer": "rpo.trainers.grpo",
    "LoopConfig": "rpo.training.loop_config",
    "PairSet": "rpo.data.preference",
    "PreferencePair": "rpo.data.preference",
    "ScoreAsActionConfig": "rpo.trainers.score_as_action_config",
    "ScoreAsActionTrainer": "rpo.trainers.score_as_action",
    "Checkpoint": "rpo.models.checkpoint",
    "add_lora": "rpo.adapters.lora",
    "curate": "rpo.curation.curate",
    "ddim": "rpo.process.transition",
    "generate": "rpo.sampling.sample",
    "image_generator": "rpo.sampling.sample",
    "load_config": "rpo.config",
    "load_reward": "rpo.rewards",
    "load_rewards": "rpo.rewards",
    "pair_set": "rpo.data.preference",
    "read_pairs": "rpo.data.readers",
    "reference": "rpo.adapters.lora",
    "replay": "rpo.sampling.sample",
    "sample": "rpo.sampling.sample",
    "save_lora": "rpo.adapters.lora",
    "write_pairs": "rpo.data.writers",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'rpo' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return __all__
