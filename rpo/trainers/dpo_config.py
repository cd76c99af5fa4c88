"""The settings of Diffusion-DPO, refused at once when no run can have them, and what they mean for one process."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from rpo.errors import InputError
from rpo.from_environment import as_compared
from rpo.ranges import LARGEST, Count, Fraction, Names, NotNegative, Positive, Range, Seed, Side, Text
from rpo.settings import settings
from rpo.trainers.online_config import AdapterConfig
from rpo.trainers.preference_config import PreferenceConfig
from rpo.trainers.region_config import RegionConfig
from rpo.training.loop_config import LoopConfig


@settings
class DPOConfig:
    """Settings of `DPOTrainer`; the defaults suit a LoRA on a few hundred pairs."""

    beta: Positive | None = None
    """Pull to the reference, > 0; larger stays closer. It counts errors averaged over the latents' dimensions, so a
    good value grows with their number: nothing takes the paper's 5000 for the 16,384 dimensions of SD 1.5 at 512 px,
    and in proportion for other sizes (78 for the 256 of `shapes`). Usual: half to four times that. Too small and
    images turn to noise. The loss of diffusers' DPO script lacks a half: its beta_dpo 2500 is 5000 here. Other
    objectives have their own: nothing takes their paper's."""

    sft_weight: NotNegative = 0.0
    """Weight of the chosen side's plain denoising loss, in units of beta/2. 0 is plain DPO; 0.05 to 0.5 keeps the
    chosen side in place and allows more updates. Give 0.05 to 0.2 where the model did not draw the chosen images
    itself, as with edits."""

    max_chosen_error_ratio: Annotated[float, Range(above=1, at_most=LARGEST, or_inf=True)] = 1.5
    """Training stops when the chosen side's error, smoothed, exceeds this many times the reference's: from there on
    DPO wins its margin by forgetting both sides. 1.1 to 2; `inf` never stops."""

    train: Literal["lora", "full"] = "lora"
    """A LoRA adapter, or all weights of the denoiser (which keeps a frozen copy as reference)."""

    rank: Count = 16
    """Of the LoRA; 4 to 64."""

    lora_alpha: Positive | None = None
    """Strength of the LoRA; nothing means `rank`, the one value on which every program that loads LoRAs agrees."""

    target_modules: Names | None = None
    """Name endings of the layers that get a LoRA; nothing means the attention projections."""

    pairs_per_update: Count = 32
    """Pairs behind one optimiser step, over all processes and micro-batches. 32 to 256; the paper has 2048."""

    micro_batch: Count = 8
    """Pairs at once on one process; lower it when memory runs out. `pairs_per_update` must be a multiple of it times
    the number of processes."""

    resolution: Side | tuple[Side, Side] | None = None
    """Size of the training images in pixels: a side, or [height, width]; nothing means the checkpoint's own."""

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

    gradient_checkpointing: bool = False
    """Recompute activations in backward: about a third slower, several times less memory."""

    cache_folder: Text | None = None
    """Where latents, embeddings and reference errors are kept; share it between runs. Nothing means `cache` in the
    run's folder."""

    encode_ahead: bool = True
    """Encode every image and prompt that the run visits before its first update, with a progress bar. Off, each is
    encoded when it is first visited: a long run over a large set starts at once and costs the same."""

    encode_batch: Count = 1
    """Images, or prompts, encoded in one call. 8 to 32 is up to twice as fast; only with 1 are the last bits of what is
    kept the same whatever else was encoded with it."""

    cache_dtype: Literal["float32", "float16"] = "float32"
    """How latents are kept; float16 halves the file and rounds them, in every epoch alike."""

    folder: Text = "runs/dpo"
    """The run's folder: metrics, checkpoints and, after `save`, the LoRA."""

    seed: Seed = 0
    """Of the adapter's start, the order of pairs, times and noise."""

    objective: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Which preference objective; plain Diffusion-DPO unless told otherwise. See `PreferenceConfig`."""

    region: RegionConfig = field(default_factory=RegionConfig)
    """Learn from where the two images of a pair differ; off. See `RegionConfig`."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    """How long and how fast to train; see `LoopConfig`. Its `accumulate` is worked out from `pairs_per_update`."""

    @property
    def adapter(self) -> AdapterConfig:
        """What is trained, as the other trainers have it."""
        return AdapterConfig(
            train=self.train,
            rank=self.rank,
            alpha=self.lora_alpha,
            target_modules=self.target_modules,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def __post_init__(self):
        """Refuse settings that no run can have."""
        if self.loop.accumulate != 1:
            raise InputError(
                f"loop.accumulate is {self.loop.accumulate}, but DPO works it out; set pairs_per_update and micro_batch"
            )
        _check_objective(self)


def _check_objective(config: DPOConfig) -> None:
    """Refuse an objective and settings beside it that cannot go together."""
    objective, region = config.objective, config.region
    if config.sft_weight and objective.method != "dpo":
        raise InputError(
            f"sft_weight is {config.sft_weight}, but objective.method {objective.method} has no such term (that of "
            "mapo is built in); give sft_weight=0"
        )
    if region.needs_reference and not objective.needs_reference:
        raise InputError(
            f"region.anchor is {region.anchor}, but the objective ({objective.method}, reference_weight "
            f"{objective.reference_weight:g}) needs no reference, and the anchor would ask it at every visit; give "
            "region.anchor=0, or an objective with a reference"
        )
    if region.needs_reference and config.draws_per_pair is not None:
        raise InputError(
            f"draws_per_pair is {config.draws_per_pair} and region.anchor {region.anchor}, but what is kept of the "
            "reference is its errors, and the anchor needs its predictions; give region.anchor=0, or leave "
            "draws_per_pair out"
        )


def identity(config: DPOConfig) -> dict[str, str]:
    """What of the settings decides about a run's result, as text by name.

    How long it is, where it lies and when it encodes may change. Of objective and region only what is not as usual is
    named.
    """
    free = {"loop", "folder", "cache_folder", "encode_ahead", "objective", "region"}
    settings = {name: str(value) for name, value in as_compared(asdict(config)).items() if name not in free}
    settings |= {f"objective.{name}": value for name, value in config.objective.changed.items()}
    if config.region.is_on:
        settings |= {f"region.{name}": str(value) for name, value in asdict(config.region).items()}
    return settings


def describe_objective(config: DPOConfig, *, beta: float, num_dims: int) -> str:
    """Beta as it counts, and what is not plain Diffusion-DPO, in a line or two."""
    objective = config.objective
    ratio = f"{beta / objective.default_beta(num_dims):.2g} times the paper's"
    if objective.method == "mapo":
        text = f"beta {beta:g} ({ratio}), the weight of the odds term"
    else:
        is_mean = objective.reduction == "mean"
        per_dim, script = (beta / num_dims, f"; beta_dpo {beta / 2:g} of diffusers' script") if is_mean else (beta, "")
        text = f"beta {beta:g} over {num_dims} latent dimensions = {per_dim:.3f} per dimension ({ratio}{script})"
    if objective.changed:
        text += "\n  objective: " + ", ".join(f"{name} {value}" for name, value in objective.changed.items())
    else:
        text += "; loss starts at log 2 = 0.693"
    if config.region.is_on:
        text += "\n  region: " + ", ".join(f"{name} {value}" for name, value in asdict(config.region).items())
    return text


@dataclass(frozen=True)
class Share:
    """Which part of every update this process computes."""

    micro_batch: int
    """Pairs per micro-batch on this process."""
    accumulate: int
    """Micro-batches per update."""
    process: int = 0
    processes: int = 1


def share_of(config: DPOConfig, *, process: int, processes: int) -> Share:
    """This process's part of every update."""
    at_once = config.micro_batch * processes
    if config.pairs_per_update % at_once:
        per_process = config.pairs_per_update / processes
        fitting = [n for n in range(1, int(per_process) + 1) if per_process % n == 0]
        raise InputError(
            f"pairs_per_update={config.pairs_per_update} is not a multiple of micro_batch={config.micro_batch} times "
            f"{processes} process(es); use a micro_batch of "
            f"{', '.join(map(str, fitting)) or f'1 and a multiple of {processes} pairs'}"
        )
    return Share(config.micro_batch, config.pairs_per_update // at_once, process, processes)
