"""The settings of a study: which algorithm, with which reward, and how each of them scales."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

from rpo.config.ranges import Count, Fraction, NotEmpty, NotNegative, Positive, Range, Seed, Text
from rpo.config.settings import settings
from rpo.curation.curate_config import CurateConfig, SourceConfig
from rpo.errors import InputError
from rpo.evaluation.held_out import HeldOutConfig
from rpo.models.config import ModelConfig
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.grpo_config import GRPOConfig

Way = Literal["dpo", "rich", "grpo", "endpoint"]
"""DPO on the model's own images, ranked by the reward; on images and their edits, judged by it; GRPO; an endpoint
objective."""

TRUTH = "truth"
"""What the reward of `held_out` is called beside the others."""

Share = Annotated[float, Range(above=0, at_most=1)]
Several = Annotated[int, Range(at_least=2, at_most=1024)]


@settings
class StudyConfig:
    """A whole study: `rpo study CONFIG key=value …`.

    Every algorithm meets every reward at the first value of each axis; along an axis, its other values take turns while
    the other two stay at their first.
    """

    output: Text = "runs/study"
    """The study's folder; a folder for each cell."""

    seeds: Annotated[tuple[Seed, ...], NotEmpty()] = (0, 1, 2)
    """Of the cells; three or more. May be added to in a resumed study."""

    budget: Count = 100_000
    """Evaluations of the denoiser that every cell costs: one image through it, forward, as `rpo plan` counts. Drawing,
    the reference, learning and edits count; judging does not."""

    algorithms: Annotated[tuple[Way, ...], NotEmpty()] = ("dpo", "rich", "grpo", "endpoint")
    """What learns: dpo from the model's own images, ranked by the reward; rich from them and their edits by critique,
    judged by it; grpo; endpoint, by the objective of its section."""

    rewards: Annotated[Mapping[str, Text], NotEmpty()] = field(
        default_factory=lambda: {
            "verifier": "shapes",
            "proxy": "shapes-clip",
            "critic": "shapes-critic",
            "mixture": "mixture:shapes-critic=1,shapes-clip=0.05",
        }
    )
    """What is learnt from, each by a name of your own: a reward as everywhere, or several with weights as
    mixture:NAME=WEIGHT,NAME=WEIGHT."""

    images_per_prompt: Annotated[tuple[Several, ...], NotEmpty()] = (4, 2, 8, 16)
    """An axis: the group of grpo and endpoint, and what is ranked or edited by the others."""

    shares: Annotated[tuple[Share, ...], NotEmpty()] = (1.0, 0.5, 0.25)
    """An axis: the share of the prompts that is trained on."""

    rounds: Annotated[tuple[Count, ...], NotEmpty()] = (1, 2, 3)
    """An axis: how often training starts anew from what it came to, which is then its reference and draws the images.
    The budget is divided among them."""

    walked: tuple[Text, ...] | None = None
    """Rewards with which the axes are walked; nothing is all of them, and none leaves their first values alone."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The checkpoint."""

    prompts: Text = "shapes"
    """What is trained on: a text file with one prompt per line, a .jsonl file whose lines have a "prompt", or
    "shapes"."""

    prompt_count: Count | None = None
    """The first so many of them are the share 1; nothing is all."""

    held_out: HeldOutConfig = field(default_factory=lambda: HeldOutConfig(prompts="shapes:in_domain"))
    """What models are judged on in domain, how, and by which reward, which is the truth here. A set of
    `rpo evaluate --prompts`."""

    out_of_domain: Text = "shapes:out_of_domain"
    """What they are judged on out of domain, in the same way."""

    best_of: Several = 8
    """Images of a prompt among which each reward chooses before anything is trained."""

    drawing: Annotated[float, Range(above=0, below=1)] = 0.5
    """Largest share of a round that dpo and rich spend on images, and on edits; the rest is for learning from them."""

    edit_cost: NotNegative = 24.0
    """Evaluations of an edit, in those of the denoiser; 8 steps of three branches for the editor of shapes."""

    edited: Fraction = 1.0
    """The share of images that is edited, for the plan; 0.4 of shapes, the rest being right."""

    backward: Positive | None = None
    """Evaluations of an image through the denoiser and back; nothing counts them from the configuration of the
    checkpoint, as `rpo plan` does. About 2 for a LoRA, 3 with gradient checkpointing."""

    curate: CurateConfig = field(
        default_factory=lambda: CurateConfig(source=SourceConfig(num_steps=20, eta=1.0, guidance_scale=2.0, seed=1000))
    )
    """How images are drawn for pairs and, for rich, criticised and edited. Checkpoint, prompts, number of images and
    rewards are those of the cell."""

    dpo: DPOConfig = field(default_factory=DPOConfig)
    """How dpo and rich learn from pairs; the number of updates is that of the cell."""

    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """How grpo learns. Images of a rollout are divided into the groups of the cell, whose number of updates it is."""

    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """The same for endpoint."""

    progress: bool = True
    """Show how far the study is."""

    def __post_init__(self) -> None:
        """Refuse what no study can have."""
        for name in ("seeds", "algorithms", "images_per_prompt", "shares", "rounds"):
            _refuse_twice(name, getattr(self, name))
        for label in self.rewards:
            if label == TRUTH or not re.fullmatch(r"[a-z][a-z0-9_]*", label):
                raise InputError(
                    f"rewards names {label!r}; expected small letters, digits and underscores, and not {TRUTH!r}, "
                    "which held_out.reward is called; give it another name"
                )
        if strange := [one for one in self.walked or () if one not in self.rewards]:
            raise InputError(
                f"walked names {strange[0]!r}, which is none of the rewards; expected some of "
                f"{', '.join(self.rewards)}; correct it, or leave it out for all"
            )
        for name in ("dpo", "grpo", "endpoint"):
            if getattr(self, name).adapter.train != "lora":
                raise InputError(
                    f"{name}.adapter.train is full, but cells are kept and compared as LoRAs; leave it out"
                )
        source = self.curate.source
        if source.kind != "generate" or source.num_steps is None or source.guidance_scale is None:
            raise InputError(
                f"curate.source has kind {source.kind}, num_steps {source.num_steps} and guidance_scale "
                f"{source.guidance_scale}, but a budget needs images that are drawn at a known cost; give "
                "curate.source.kind=generate, curate.source.num_steps and curate.source.guidance_scale"
            )


def _refuse_twice(name: str, values: Sequence[Any]) -> None:
    if twice := [one for one in values if values.count(one) > 1]:
        raise InputError(f"{name} has {twice[0]} twice; expected each once; leave one out")
