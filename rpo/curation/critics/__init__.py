"""Critics: what says what is wrong with an image, and how a configuration becomes one."""

from pathlib import Path

from rpo.curation.component_config import CriticConfig
from rpo.curation.components import make_component
from rpo.curation.records import Critic

__all__ = ["CRITICS", "CriticConfig", "load_critic"]

CRITICS = {
    "shapes": "rpo.curation.critics.shapes:shapes_critic",
    "server": "rpo.curation.critics.vlm:vlm_critic",
    "local": "rpo.curation.critics.vlm:vlm_critic",
}
"""The critics that come with the package: each is called with the configuration and the folder of the cache."""


def load_critic(config: CriticConfig, cache_folder: Path | None = None) -> Critic:
    """Make the critic that a configuration describes; one of your own is called with the configuration alone."""
    return make_component(config, CRITICS, "critic", cache_folder)
