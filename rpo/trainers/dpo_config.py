"""The settings of learning from preference pairs, refused at once when no run can have them."""

from dataclasses import field
from typing import Annotated, ClassVar, Literal

from rpo.config.ranges import LARGEST, Count, Fraction, Range, Side, Text
from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.objectives.preference import Objective
from rpo.objectives.preference.dpo import Dpo
from rpo.objectives.preference.region import RegionConfig
from rpo.trainers.settings import TrainingConfig


@settings
class DPOConfig(TrainingConfig):
    """Settings of `DPO`; the defaults suit a LoRA on a few hundred pairs."""

    renamed: ClassVar[dict[str, str]] = {
        **TrainingConfig.renamed,
        **{name: f"it is objective.{name} now" for name in ("beta", "sft_weight")},
        **{name: f"it is adapter.{name} now" for name in ("train", "rank", "target_modules", "gradient_checkpointing")},
        "region.is_on": "a region that is null is off",
        "lora_alpha": "it is adapter.alpha now",
        "micro_batch": "it is learning.micro_batch now",
    }

    objective: Objective = field(default_factory=Dpo)
    """Which preference objective; dpo is Diffusion-DPO with the components of RainbowPO."""

    region: RegionConfig | None = None
    """Learn from where the two images of a pair differ; nothing learns from all of them."""

    max_chosen_error_ratio: Annotated[float, Range(above=1, at_most=LARGEST, or_inf=True)] = 1.5
    """Training stops when the chosen side's error, smoothed, exceeds this many times the reference's: from there on
    DPO wins its margin by forgetting both sides. 1.1 to 2; `inf` never stops."""

    max_rejected_error_ratio: Annotated[float, Range(above=1, at_most=LARGEST, or_inf=True)] = 4.0
    """The same for the rejected side, which rises in good runs, too, to about 2: far beyond, the policy wins its margin
    by wrecking what it must not draw. `inf` never stops."""

    pairs_per_update: Count = 32
    """Pairs behind one optimiser step, over all processes and micro-batches: a multiple of `learning.micro_batch` times
    the number of processes. 32 to 256; the paper has 2048."""

    resolution: Side | tuple[Side, Side] | None = None
    """Size of the training images in pixels: a side, or [height, width]; nothing means the checkpoint's own."""

    bucket_step: Count | None = None
    """Train images in the shape that they have, in buckets of about one shape whose sides are multiples of so many
    pixels and whose area is at most that of `resolution`; none is enlarged. 64, or 32. Nothing crops every image to
    one canvas."""

    crop: Literal["center", "random"] = "center"
    """Which part of an image of another shape is used; the same for both sides of a pair of equal sizes."""

    flip: bool = False
    """Mirror half of the visits, both sides alike. Off, since it makes "left of" mean "right of" and writing
    unreadable."""

    caption_dropout: Fraction = 0.2
    """Share of visits with an empty caption, which keeps classifier-free guidance usable; 0 to 0.2."""

    draws_per_pair: Count | None = None
    """How many (noise, time) draws each pair has before they repeat; 4 to 32. With it, the reference's errors are kept
    on disk and later epochs and runs (other beta, other rate) skip the reference. Nothing: a new draw at every
    visit."""

    cache_folder: Text | None = None
    """Where latents, embeddings and reference errors are kept; share it between runs. Nothing means `cache` in the
    run's folder."""

    encode_ahead: bool = True
    """Encode every image and prompt that the run visits before its first update, with a progress bar. Off, each is
    encoded when it is first visited: a long run over a large set starts at once and costs the same."""

    encode_batch: Count = 1
    """Images, or prompts, encoded in one call. 8 to 32 is up to twice as fast; only with 1 are the last bits of what is
    kept the same whatever else was encoded with it."""

    @property
    def error_limits(self) -> dict[str, float]:
        """Where a side's error ends training, in units of the reference's."""
        return {"chosen": self.max_chosen_error_ratio, "rejected": self.max_rejected_error_ratio}

    def __post_init__(self) -> None:
        """Refuse an objective and settings beside it that cannot go together."""
        if self.region is None or self.region.anchor == 0:
            return
        if not self.objective.needs_reference:
            raise InputError(
                f"region.anchor is {self.region.anchor}, but the objective ({self.objective.kind}) needs no reference, "
                "and the anchor would ask it at every visit; give region.anchor=0, or an objective with a reference"
            )
        if self.draws_per_pair is not None:
            raise InputError(
                f"draws_per_pair is {self.draws_per_pair} and region.anchor {self.region.anchor}, but what is kept of "
                "the reference is its errors, and the anchor needs its predictions; give region.anchor=0, or leave "
                "draws_per_pair out"
            )
