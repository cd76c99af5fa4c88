"""The place where a diffusers pipeline goes to be aligned.

These are the public names. Each is imported when it is first asked for, so that `import rpo` loads neither torch nor
diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rpo.adapters.lora import add_lora, reference, save_lora
    from rpo.config.load import load_config
    from rpo.curation.curate import Components, curate
    from rpo.curation.curate_config import CurateConfig
    from rpo.data.preference import PairSet, PreferencePair, pair_set
    from rpo.data.readers import read_pairs
    from rpo.data.writers import write_pairs
    from rpo.models.checkpoint import Checkpoint
    from rpo.process.transition import Ddim, EulerMaruyama, ddim
    from rpo.rewards import load_reward, load_rewards
    from rpo.sampling.sample import generate, image_generator, sample
    from rpo.trainers.dpo import DPO
    from rpo.trainers.dpo_config import DPOConfig
    from rpo.trainers.endpoint import Endpoint
    from rpo.trainers.endpoint_config import EndpointConfig
    from rpo.trainers.grpo import GRPO
    from rpo.trainers.grpo_config import GRPOConfig
    from rpo.trainers.reward_gradient import RewardGradient
    from rpo.trainers.reward_gradient_config import RewardGradientConfig
    from rpo.trainers.score_as_action import ScoreAsAction
    from rpo.trainers.score_as_action_config import ScoreAsActionConfig
    from rpo.trainers.settings import AdapterConfig, LearningConfig
    from rpo.trainers.trainer import Trainer

__all__ = [
    "AdapterConfig",
    "Checkpoint",
    "Components",
    "CurateConfig",
    "DPO",
    "DPOConfig",
    "Ddim",
    "Endpoint",
    "EndpointConfig",
    "EulerMaruyama",
    "GRPO",
    "GRPOConfig",
    "LearningConfig",
    "PairSet",
    "PreferencePair",
    "RewardGradient",
    "RewardGradientConfig",
    "ScoreAsAction",
    "ScoreAsActionConfig",
    "Trainer",
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
    "sample",
    "save_lora",
    "write_pairs",
]

_NAMES = {
    "rpo.adapters.lora": "add_lora reference save_lora",
    "rpo.config.load": "load_config",
    "rpo.curation.curate": "Components curate",
    "rpo.curation.curate_config": "CurateConfig",
    "rpo.data.preference": "PairSet PreferencePair pair_set",
    "rpo.data.readers": "read_pairs",
    "rpo.data.writers": "write_pairs",
    "rpo.models.checkpoint": "Checkpoint",
    "rpo.process.transition": "Ddim EulerMaruyama ddim",
    "rpo.rewards": "load_reward load_rewards",
    "rpo.sampling.sample": "generate image_generator sample",
    "rpo.trainers.dpo": "DPO",
    "rpo.trainers.dpo_config": "DPOConfig",
    "rpo.trainers.endpoint": "Endpoint",
    "rpo.trainers.endpoint_config": "EndpointConfig",
    "rpo.trainers.grpo": "GRPO",
    "rpo.trainers.grpo_config": "GRPOConfig",
    "rpo.trainers.reward_gradient": "RewardGradient",
    "rpo.trainers.reward_gradient_config": "RewardGradientConfig",
    "rpo.trainers.score_as_action": "ScoreAsAction",
    "rpo.trainers.score_as_action_config": "ScoreAsActionConfig",
    "rpo.trainers.settings": "AdapterConfig LearningConfig",
    "rpo.trainers.trainer": "Trainer",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'rpo' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return __all__
