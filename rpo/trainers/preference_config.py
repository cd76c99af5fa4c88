"""Which preference objective is trained: the components of RainbowPO by name, KTO and MaPO; refused when impossible."""

from dataclasses import fields
from typing import Annotated, Literal

from rpo.errors import InputError
from rpo.objectives.preference import PAPER_BETA, beta_for_dims
from rpo.objectives.preference_links import LinkName
from rpo.objectives.unpaired import PAPER_KTO_BETA
from rpo.ranges import Count, Fraction, NotNegative, Positive, Range
from rpo.settings import settings

MAPO_BETA = 0.1
"""Of the authors' SDXL run."""

TITLES = {"dpo": "Diffusion-DPO", "kto": "Diffusion-KTO", "mapo": "MaPO"}

_GENERAL = {"method", "reduction"}
_OF_KTO = {"desirable_weight", "undesirable_weight"}
_OF_MAPO = {"mapo_slope", "mapo_temperature"}


@settings
class PreferenceConfig:
    """The objective; the defaults are plain Diffusion-DPO. Formulas: `rpo.objectives.preference`."""

    method: Literal["dpo", "kto", "mapo"] = "dpo"
    """dpo compares the two sides of a pair with the reference; every setting down to `winner_preserving` is a component
    of it. kto takes each side for an image that is labelled good or bad. mapo needs no reference."""

    link: LinkName = "sigmoid"
    """What is descended of the argument z: sigmoid (DPO), ipo, hinge, square_hinge, cauchy (heavy tails, for noisy
    labels), linear."""

    label_smoothing: Annotated[float, Range(at_least=0, below=0.5)] = 0.0
    """Assumed share of wrong labels, 0 up to but without 0.5; 0 to 0.2."""

    reduction: Literal["mean", "sum"] = "mean"
    """Errors averaged over the latents' dimensions, or summed; with "sum", beta is per dimension (0.305 in the paper)
    and images of other sizes weigh differently."""

    normalization: Literal["none", "time", "weights"] = "none"
    """time: divide by how far the two sides' errors usually lie apart at this time (a running standard deviation per
    time bin, in units of the mean over bins, so that beta keeps its size). weights: `time_weights`."""

    time_bins: Count = 10
    """Equal bins of the times, for `normalization: time` and `margin_from: time`; 5 to 50."""

    time_weights: tuple[NotNegative, ...] = ()
    """Weights >= 0 of equal bins of the times, from data to noise; [0, 1, 1, 0] learns from the middle alone. For
    `normalization: weights`."""

    margin: NotNegative | None = None
    """Home advantage gamma >= 0 that is taken off the argument of the link (log-odds, for the sigmoid), so that the
    chosen side has to win by so much. 0.1 to 2. Nothing means 0, and 1 where `margin_from` asks for one. (RainbowPO's
    own gamma is this one divided by beta.)"""

    margin_from: Literal["constant", "time", "rewards"] = "constant"
    """What gamma multiplies: 1; how far errors usually lie apart at this time, mean 1 over times; or the pair's
    chosen_score minus its rejected_score, mean 1 over the set."""

    margin_mixed: bool = False
    """Count the margin only (1 - `reference_weight`) times, as the second reference of RainbowPO's mixture."""

    reference_weight: Fraction = 1.0
    """alpha, 0 to 1: how much of the reference's own preference the policy must beat. 1 is DPO; 0 needs no reference,
    is a forward pass cheaper, and should have a margin or `sft_weight` to hold it; RainbowPO found 0.25 to 0.5
    best."""

    context: Literal["none", "scores", "reference"] = "none"
    """Scale pairs by how little doubt their prompt leaves (Mallows-DPO), mean 1 over the set. reference: doubt is the
    reference's own denoising error at mid-time, which bounds the entropy that language models use; measured once before
    training. scores: doubt is the standard deviation of the scores of a prompt's images, for sets with several pairs a
    prompt."""

    winner_preserving: Fraction | None = None
    """SDPO: share of the chosen side's own descent that the push on the rejected side must leave it, 0 to 1; 0.9 is
    the authors'. Nothing: the rejected side is pushed in full."""

    desirable_weight: NotNegative = 1.0
    """kto: weight of chosen images."""

    undesirable_weight: NotNegative = 1.0
    """kto: weight of rejected images."""

    mapo_slope: Positive = 0.5
    """mapo: how fast the odds fall with the error."""

    mapo_temperature: Positive | None = None
    """mapo: how small a difference of odds counts, > 0. Nothing takes the authors' 1000 for the 65,536 dimensions of
    SDXL, and for smaller latents, whose errors scatter more, in proportion to the root of their number."""

    def __post_init__(self) -> None:
        """Refuse settings that no run can have, or that would do nothing."""
        _check_method(self)
        _check_combinations(self)

    @property
    def gamma(self) -> float:
        """The margin in force."""
        return (0.0 if self.margin_from == "constant" else 1.0) if self.margin is None else self.margin

    @property
    def needs_reference(self) -> bool:
        """Whether the loss asks for the reference's errors."""
        return self.method == "kto" or (self.method == "dpo" and self.reference_weight > 0)

    @property
    def starts_at_zero(self) -> bool:
        """Whether the margin must be 0 before the first update."""
        return self.method == "kto" or (self.method == "dpo" and self.reference_weight == 1)

    @property
    def title(self) -> str:
        """What a person calls the method."""
        return TITLES[self.method]

    @property
    def changed(self) -> dict[str, str]:
        """The settings that are not plain Diffusion-DPO's, in order."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: str(value) for name, (value, default) in values.items() if value != default}

    def default_beta(self, num_dims: int) -> float:
        """The beta of the paper, for latents of `num_dims` dimensions."""
        if self.method == "mapo":
            return MAPO_BETA
        beta = beta_for_dims(num_dims, beta=PAPER_KTO_BETA if self.method == "kto" else PAPER_BETA)
        return beta if self.reduction == "mean" else beta / num_dims


def _check_method(config: PreferenceConfig) -> None:
    own = {"kto": _OF_KTO, "mapo": _OF_MAPO}
    allowed = (
        {field.name for field in fields(config)} - _OF_KTO - _OF_MAPO
        if config.method == "dpo"
        else _GENERAL | own[config.method]
    )
    if foreign := [name for name in config.changed if name not in allowed]:
        raise InputError(
            f"objective.{foreign[0]} is {config.changed[foreign[0]]}, but method {config.method} has no such part; "
            f"leave it out, or choose the method that has it"
        )
    if config.method == "mapo" and config.reduction == "sum":
        raise InputError(
            "objective.reduction is sum, but the odds of mapo are defined for errors averaged over dimensions; "
            "give mean"
        )


def _check_combinations(config: PreferenceConfig) -> None:
    if (config.normalization == "weights") != bool(config.time_weights) or (
        config.time_weights and not any(config.time_weights)
    ):
        raise InputError(
            f"objective.normalization is {config.normalization} and time_weights {list(config.time_weights)}, but "
            "weights come with normalization: weights, and one of them must be above 0; give both, or neither"
        )
    if config.normalization == "time" and config.margin_from == "time":
        raise InputError(
            "objective.normalization and margin_from are both time, but a normalised argument has one scale at every "
            "time already; give margin_from: constant"
        )
    if config.margin_from != "constant" and config.gamma == 0:
        raise InputError(
            f"objective.margin_from is {config.margin_from} and margin 0, which does nothing; give a margin above 0, "
            "or margin_from: constant"
        )
    if config.margin_mixed and (config.reference_weight == 1 or config.gamma == 0):
        raise InputError(
            f"objective.margin_mixed counts the margin 1 - reference_weight = {1 - config.reference_weight:g} times, "
            f"and the margin is {config.gamma:g}, which does nothing; give reference_weight below 1 and a margin"
        )
