"""Diffusion-DPO (Wallace et al., arXiv:2311.12908, eq. 14) and its family: denoise what is preferred ever better.

With e the squared error of one noisy latent, *averaged* over its dimensions, at a noise and a time that the two sides
share, and Delta the chosen side's minus the rejected one's:

    z    = w(t) {-1/2 Delta[e_policy] + 1/2 alpha Delta[e_reference]} - (1 - alpha) gamma
    loss = f(beta phi(c) z) + sft_weight beta/2 (e_policy,w - alpha e_reference,w)

These are the seven directions of RainbowPO (arXiv:2410.04203) carried from tokens to denoising errors: normalisation
(the mean over dimensions, and w), link f, margin gamma, reference mixing alpha, contextual scaling phi and the SFT term
are arguments; the seventh, which pairs to learn from, is `rpo.data.rejection_sampling`. No paper is known that carries
all of them to diffusion. Without any of them it is Diffusion-DPO, to the bit:

    Delta_w = e_policy(x_w) - e_reference(x_w),   Delta_l likewise
    loss    = -log sigmoid(-beta/2 (Delta_w - Delta_l))

This is `beta` as the authors' code counts it. The flow-matching form (Flow-GRPO's SD3 script) is the same function of
errors whose target is eps - x_0; only the size of a sensible beta differs.

Because e is a mean, beta depends on the size of the latents: the paper's 5000 on the 4·64·64 = 16,384 dimensions of SD
1.5 is 0.305 per dimension, which is 78 on 256 dimensions. `beta_for_dims` converts.
"""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.config.ranges import Fraction, NotNegative, Positive, Range
from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.objectives.preference.base import PAPER_BETA, Comparison, Statistics, beta_for_dims, pair_output
from rpo.objectives.preference.links import LinkName, smoothed_link
from rpo.objectives.preference.winner_preserving import winner_preserving_scale
from rpo.types import StepOutput

TIME_BINS = 10
"""Equal bins of the times in which the spread of errors is told apart; 5 to 50 made no difference."""

TIME_DECAY = 0.99
"""Of the running spread: it looks back a hundred updates."""


@settings
class Dpo:
    """Diffusion-DPO; the defaults are the plain method, and every further setting is a component of RainbowPO."""

    kind: Literal["dpo"] = "dpo"

    beta: Positive | None = None
    """Pull to the reference, > 0; larger stays closer. It counts errors averaged over the latents' dimensions, so a
    good value grows with their number: nothing takes the paper's 5000 for the 16,384 dimensions of SD 1.5 at 512 px,
    and in proportion for other sizes (78 for the 256 of `shapes`). Usual: half to four times that; for flow models
    100 to 2000 at any size. Too small and images turn to noise. The loss of diffusers' DPO script lacks a half: its
    beta_dpo 2500 is 5000 here."""

    sft_weight: NotNegative = 0.0
    """Weight of the chosen side's plain denoising loss, in units of beta/2. 0 is plain DPO; 0.05 to 0.5 keeps the
    chosen side in place and allows more updates. Give 0.05 to 0.2 where the model did not draw the chosen images
    itself, as with edits."""

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

    margin_cap: Positive | None = None
    """Log-odds, > 0, at which a pair counts as won: above, it has no gradient, so that nothing is gained by pushing a
    rejected image further away. 1 to 5, for few-step and small models, whose rejected side runs away. Nothing: a pair
    that is won pulls on, ever less."""

    winner_preserving: Fraction | None = None
    """SDPO: share of the chosen side's own descent that the push on the rejected side must leave it, 0 to 1; 0.9 is
    the authors'. Nothing: the rejected side is pushed in full."""

    def __post_init__(self) -> None:
        """Refuse settings that would do nothing."""
        _refuse_idle(self)

    @property
    def title(self) -> str:
        """What a person calls it."""
        return "Diffusion-DPO"

    @property
    def gamma(self) -> float:
        """The margin in force."""
        return (0.0 if self.margin_from == "constant" else 1.0) if self.margin is None else self.margin

    @property
    def needs_reference(self) -> bool:
        """Unless all of it is mixed away."""
        return self.reference_weight > 0

    @property
    def starts_at_zero(self) -> bool:
        """With the whole reference in the argument."""
        return self.reference_weight == 1

    @property
    def bins(self) -> int:
        """Where a setting asks how far errors usually lie apart."""
        return TIME_BINS if "time" in (self.normalization, self.margin_from) else 0

    @property
    def decay(self) -> float:
        """Weight of the past in that."""
        return TIME_DECAY

    @property
    def needs_scores(self) -> str:
        """Margins and doubt may come from scores."""
        asked = {"margin_from: rewards": self.margin_from == "rewards", "context: scores": self.context == "scores"}
        return next((name for name, is_asked in asked.items() if is_asked), "")

    def default_beta(self, num_dims: int) -> float:
        """The paper's, for latents of `num_dims` dimensions."""
        beta = beta_for_dims(num_dims, beta=PAPER_BETA)
        return beta if self.reduction == "mean" else beta / num_dims

    def __call__(self, pairs: Comparison, statistics: Statistics | None) -> StepOutput:
        """The loss of a micro-batch of pairs."""
        reference_chosen, reference_rejected = pairs.reference or (None, None)
        relative_std = None if statistics is None else self._relative_std(pairs, statistics)
        return preference_loss(
            pairs.chosen,
            pairs.rejected,
            reference_chosen,
            reference_rejected,
            beta=pairs.beta,
            link=self.link,
            time_weight=self._time_weight(pairs, relative_std),
            margin=self._margin(pairs, relative_std),
            is_margin_mixed=self.margin_mixed,
            reference_weight=self.reference_weight,
            context_scale=pairs.context_scale,
            rejected_gradient_scale=self._rejected_scale(pairs),
            label_smoothing=self.label_smoothing,
            sft_weight=self.sft_weight,
            margin_cap=self.margin_cap,
        )

    def _relative_std(self, pairs: Comparison, statistics: Statistics) -> Float[Tensor, " pairs"]:
        """How far errors usually lie apart at each pair's time, by earlier updates; this one is noted down."""
        chosen, rejected = pairs.reference or (pairs.chosen.detach(), pairs.rejected.detach())
        bins = (pairs.time * TIME_BINS).long()
        relative_std = statistics.relative_std()[bins]
        statistics.observe(chosen - rejected, bins)
        return relative_std

    def _time_weight(self, pairs: Comparison, relative_std: Tensor | None) -> Tensor | None:
        if self.normalization == "weights":
            bins = (pairs.time * len(self.time_weights)).long().clamp_max(len(self.time_weights) - 1)
            # A table of the weights would come from the host, and be waited for.
            return sum(
                ((bins == index) * one for index, one in enumerate(self.time_weights)), torch.zeros_like(pairs.time)
            )
        return 1 / relative_std if self.normalization == "time" and relative_std is not None else None

    def _margin(self, pairs: Comparison, relative_std: Tensor | None) -> Tensor | float:
        """Gamma in units of z; the settings count it on the scale of the link's argument."""
        gamma = self.gamma / pairs.beta
        if gamma == 0:
            return 0.0
        if self.margin_from == "time" and relative_std is not None:
            return gamma * relative_std
        if self.margin_from == "rewards" and pairs.score_gap is not None:
            return gamma * pairs.score_gap
        return torch.full_like(pairs.chosen, gamma, requires_grad=False)

    def _rejected_scale(self, pairs: Comparison) -> Tensor | None:
        if self.winner_preserving is None:
            return None
        return winner_preserving_scale(*pairs.residuals(), kept_share=self.winner_preserving)


def _refuse_idle(config: Dpo) -> None:
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


def preference_loss(
    chosen_error: Float[Tensor, " batch"],
    rejected_error: Float[Tensor, " batch"],
    reference_chosen_error: Float[Tensor, " batch"] | None = None,
    reference_rejected_error: Float[Tensor, " batch"] | None = None,
    *,
    beta: float,
    link: LinkName = "sigmoid",
    time_weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | float = 0.0,
    is_margin_mixed: bool = False,
    reference_weight: float = 1.0,
    context_scale: Float[Tensor, " batch"] | None = None,
    rejected_gradient_scale: Float[Tensor, " batch"] | None = None,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    margin_cap: float | None = None,
) -> StepOutput:
    """A preference loss of four errors, with what a person needs to see whether it works.

    Args:
        chosen_error: Error of the policy on the preferred side, carrying the gradient.
        rejected_error: Error of the policy on the other side, at the same noise and time.
        reference_chosen_error: Error of the frozen reference on the preferred side; none for `reference_weight` 0.
        reference_rejected_error: Error of the frozen reference on the other side.
        beta: Pull to the reference, > 0; larger stays closer. Depends on the latent size (see the module).
        link: f, by name.
        time_weight: w(t) >= 0 of each pair's time; None is 1.
        margin: gamma, in units of z (beta and phi multiply it too); a tensor is logged.
        is_margin_mixed: Whether gamma counts (1 - alpha) times, as the second reference of RainbowPO's mixture.
        reference_weight: alpha, 0 to 1: 1 is DPO, 0 is free of the reference, as SimPO.
        context_scale: phi > 0 of each pair's prompt, as in Mallows-DPO; None is 1.
        rejected_gradient_scale: Factor on the gradient of the rejected error; see `winner_preserving_scale`.
        label_smoothing: Probability that a label is wrong, 0 up to but without 1/2.
        sft_weight: Weight of the chosen side's denoising loss, in units of `beta`/2, >= 0; 0.05 … 0.5 keeps it in
            place, where DPO alone may let the errors of both sides grow as long as the gap does.
        margin_cap: Of beta phi z before gamma is taken off; a pair above it has no gradient.
    """
    _check(beta, sft_weight, reference_weight)
    pushed = rejected_error
    if rejected_gradient_scale is not None:
        pushed = with_gradient_scaled(rejected_error, rejected_gradient_scale)
    chosen_change = _change(chosen_error, reference_chosen_error, reference_weight)
    favour = -0.5 * beta * (chosen_change - _change(pushed, reference_rejected_error, reference_weight))  # eq. 14
    advantage = beta * (1 - reference_weight if is_margin_mixed else 1.0) * margin
    favour = favour if time_weight is None else favour * time_weight
    if context_scale is not None:
        favour, advantage = favour * context_scale, advantage * context_scale
    capped = favour if margin_cap is None else favour.clamp_max(margin_cap)
    losses = smoothed_link(capped - advantage, link=link, label_smoothing=label_smoothing)
    sft = sft_weight * 0.5 * beta * chosen_change
    references = (reference_chosen_error, reference_rejected_error)
    output = pair_output(losses, sft, favour, (chosen_error, rejected_error), references)
    metrics = _part_metrics(margin, advantage, rejected_gradient_scale)
    if margin_cap is not None:
        metrics["dpo/capped"] = (favour > margin_cap).float().mean()
    return replace(output, metrics=output.metrics | metrics)


def with_gradient_scaled(error: Float[Tensor, " batch"], scale: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The same numbers, to the bit, with `scale` times their gradient."""
    value = error.detach()
    return value + scale * (error - value)


def _check(beta: float, sft_weight: float, reference_weight: float) -> None:
    if not beta > 0:
        raise InputError(f"beta is {beta}, but it must be > 0; 5000 is usual for SD 1.5 (see beta_for_dims for others)")
    if not sft_weight >= 0:
        raise InputError(f"sft_weight is {sft_weight}, but it must be >= 0; give 0 for plain Diffusion-DPO")
    if not 0 <= reference_weight <= 1:
        raise InputError(
            f"reference_weight is {reference_weight}, but it must be between 0 (no reference) and 1 (DPO); give 1"
        )


def _change(
    error: Float[Tensor, " batch"], reference_error: Float[Tensor, " batch"] | None, reference_weight: float
) -> Float[Tensor, " batch"]:
    if reference_weight == 0:
        return error
    if reference_error is None:
        raise InputError(
            f"reference_weight is {reference_weight}, but the reference's errors are missing; expected both: give "
            "them, or reference_weight=0"
        )
    return error - reference_weight * reference_error


def _part_metrics(
    margin: Tensor | float, advantage: Tensor | float, rejected_gradient_scale: Tensor | None
) -> dict[str, Float[Tensor, ""]]:
    metrics: dict[str, Tensor] = {}
    if isinstance(margin, Tensor):
        metrics["dpo/home_advantage"] = torch.as_tensor(advantage).mean()
    if rejected_gradient_scale is not None:
        metrics["dpo/rejected_scale"] = rejected_gradient_scale.mean()
    return metrics
