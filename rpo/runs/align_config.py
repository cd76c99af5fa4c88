"""The settings of whole rounds of Rich Preference Optimization."""

from dataclasses import field
from typing import ClassVar

from rpo.config.ranges import Count, Seed, Text
from rpo.config.settings import settings
from rpo.curation.curate_config import CurateConfig
from rpo.errors import InputError
from rpo.evaluation.held_out import HeldOutConfig
from rpo.evaluation.watch import WatchConfig
from rpo.trainers.dpo_config import DPOConfig


@settings
class AlignConfig:
    """Rounds of curation, training and judging: `rpo align CONFIG key=value …`."""

    renamed: ClassVar[dict[str, str]] = {
        "prompts": "it is curate.source.limit now",
        "images_per_prompt": "it is curate.source.images_per_prompt now",
        "evaluation_prompts": "it is held_out.count now",
        "batch_size": "it is curate.source.batch_size now",
        "device": "it is curate.source.model.device now",
    }

    output: Text = "runs/align"
    """The run's folder; a folder for each round, and the LoRA of the last one."""

    seed: Seed = 0
    """Of everything random; the seeds of the sections are added to it, and the number of the round."""

    rounds: Count = 2
    """How often images are drawn by the newest LoRA, curated and trained on; 1 to 4. May be raised in a resumed run."""

    keep_earlier_pairs: bool = True
    """Train each round on the pairs of earlier rounds too, not on its own alone."""

    max_pairs: Count | None = None
    """Train each round on so many pairs at most, the newest ones first; nothing means all."""

    curate: CurateConfig = field(default_factory=CurateConfig)
    """The curation. Its output, and the LoRA that images are drawn with, are those of the round."""

    dpo: DPOConfig = field(default_factory=DPOConfig)
    """The training of a round, of the checkpoint that curate.source.model names. Its output is that of the round."""

    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    """What is judged before the first round and after each."""

    monitor: WatchConfig = field(default_factory=WatchConfig)
    """What is watched of the held-out images of each round, compared with the base's."""

    def __post_init__(self) -> None:
        """Refuse what rounds cannot have."""
        if self.dpo.adapter.train != "lora":
            raise InputError(
                f"dpo.adapter.train is {self.dpo.adapter.train}, but rounds are joined as LoRAs; give "
                "dpo.adapter.train=lora, or run `rpo curate` and `rpo train dpo` one after the other"
            )
        if self.curate.stop_after != "decisions":
            raise InputError(f"curate.stop_after is {self.curate.stop_after}, but a round needs pairs; leave it out")
        if self.rounds > 1 and self.curate.source.kind != "generate":
            raise InputError(
                f"rounds is {self.rounds} and curate.source.kind {self.curate.source.kind}, but only images that the "
                "model draws change from round to round; give rounds=1, or curate.source.kind=generate"
            )
