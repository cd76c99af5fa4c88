"""The settings of whole rounds of Rich Preference Optimization."""

from dataclasses import field

from rpo.curation.curate_config import CurateConfig
from rpo.evaluation.held_out import HeldOutConfig
from rpo.ranges import Count, Text
from rpo.settings import settings
from rpo.trainers.dpo_config import DPOConfig


@settings
class AlignConfig:
    """Rounds of curation, training and judging: `rpo align CONFIG key=value …`."""

    output: Text = "runs/align"
    """The run's folder; a folder for each round, and the LoRA of the last one."""

    rounds: Count = 2
    """How often images are drawn by the newest LoRA, curated and trained on; 1 to 4. May be raised in a resumed run."""

    keep_earlier_pairs: bool = True
    """Train each round on the pairs of earlier rounds too, not on its own alone."""

    max_pairs: Count | None = None
    """Train each round on so many pairs at most, the newest ones first; nothing means all."""

    curate: CurateConfig = field(default_factory=CurateConfig)
    """The curation. Its output, and the LoRA and seed that images are drawn with, are those of the round."""

    dpo: DPOConfig = field(default_factory=DPOConfig)
    """The training of a round, of the checkpoint that curate.source.model names. Its folder is that of the round."""

    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    """What is judged after each round."""
