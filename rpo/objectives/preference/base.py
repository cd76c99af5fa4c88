"""What preference objectives share: errors, how beta depends on the latents' size, and what is logged of a batch.

An objective is a settings class that can be called: with what policy and reference say of a micro-batch of pairs it
gives the loss. A new one is one file in this folder and one name in the union of `__init__.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from rpo.types import StepOutput

PAPER_BETA = 5000.0
"""The paper's beta for SD 1.5 and SDXL."""

PAPER_NUM_DIMS = 4 * 64 * 64
"""Latent dimensions of SD 1.5 at 512 px, where `PAPER_BETA` was tuned."""


def beta_for_dims(num_dims: int, *, beta: float = PAPER_BETA, tuned_dims: int = PAPER_NUM_DIMS) -> float:
    """The beta that regularises latents of `num_dims` dimensions as `beta` does those of `tuned_dims`.

    Args:
        num_dims: Dimensions of one latent, c·h·w.
        beta: A beta known to work.
        tuned_dims: Dimensions of the latents it is known to work on.

    Example:
        >>> beta_for_dims(4 * 8 * 8)
        78.125
    """
    return beta * num_dims / tuned_dims


@dataclass(frozen=True)
class Comparison:
    """What policy and reference say of a micro-batch of pairs, at a noise and a time that both sides share."""

    chosen: Float[Tensor, " pairs"]
    """Error of the policy on the preferred side, with its gradient."""
    rejected: Float[Tensor, " pairs"]
    """On the other side."""
    reference: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]] | None
    """The reference's, chosen and rejected; nothing if the objective needs none."""
    time: Float[Tensor, " pairs"]
    """0 at the data end up to but without 1 at the noise end."""
    beta: float
    num_dims: int
    """Dimensions of one latent."""
    residuals: Callable[[], tuple[Float[Tensor, "pairs c h w"], Float[Tensor, "pairs c h w"]]]
    """Prediction minus target of both sides, without gradient."""
    score_gap: Float[Tensor, " pairs"] | None = None
    """Chosen minus rejected score, in units of the set's mean gap."""
    context_scale: Float[Tensor, " pairs"] | None = None
    """phi of the pair's prompt."""

    @property
    def errors(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """The policy's, chosen and rejected."""
        return self.chosen, self.rejected


@runtime_checkable
class Statistics(Protocol):
    """Running mean and standard deviation, per bin of time, of numbers that earlier updates saw."""

    def mean(self) -> Float[Tensor, ""]:
        """Over all bins."""
        ...

    def relative_std(self) -> Float[Tensor, " bins"]:
        """Of each bin, by the mean over bins."""
        ...

    def observe(self, values: Float[Tensor, " batch"], bins: Int[Tensor, " batch"]) -> None:
        """See numbers, which count from the next update on."""
        ...


@runtime_checkable
class PreferenceObjective(Protocol):
    """From errors to a loss; also what has to be known before. The seam of a new objective; its tests look for it."""

    @property
    def kind(self) -> str:
        """Its name in a configuration."""
        ...

    @property
    def title(self) -> str:
        """What a person calls it."""
        ...

    @property
    def beta(self) -> float | None:
        """Its strength, if it was set."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether the reference is asked."""
        ...

    @property
    def starts_at_zero(self) -> bool:
        """Whether the margin must be 0 before the first update."""
        ...

    @property
    def bins(self) -> int:
        """Bins of time for which `Statistics` are kept; 0 for none."""
        ...

    @property
    def decay(self) -> float:
        """Weight of the past in them, per update."""
        ...

    @property
    def needs_scores(self) -> str:
        """Which setting asks for the scores of the pairs; empty for none."""
        ...

    @property
    def reduction(self) -> Literal["mean", "sum"]:
        """How an error is taken over the dimensions of a latent."""
        ...

    def default_beta(self, num_dims: int) -> float:
        """The beta of the paper, for latents of `num_dims` dimensions."""
        ...

    def __call__(self, pairs: Comparison, statistics: Statistics | None) -> StepOutput:
        """The loss of a micro-batch, as a mean over its pairs, and what to log."""
        ...


def pair_output(
    losses: Float[Tensor, " batch"],
    added: Float[Tensor, " batch"] | float,
    favour: Float[Tensor, " batch"],
    errors: tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]],
    reference_errors: tuple[Float[Tensor, " batch"] | None, Float[Tensor, " batch"] | None] = (None, None),
) -> StepOutput:
    """The loss of a batch of pairs with its metrics.

    Args:
        losses: The preference term of each pair.
        added: What is added to it.
        favour: How much the policy favours the chosen side of each pair.
        errors: Of the policy, chosen and rejected.
        reference_errors: Of the reference, if it was asked.
    """
    (chosen, rejected), (reference_chosen, reference_rejected) = errors, reference_errors
    metrics = {
        "dpo/loss": losses.mean(),
        "dpo/implicit_accuracy": (favour > 0).float().mean(),
        "dpo/margin": favour.mean(),
        "dpo/chosen_error": chosen.mean(),
        "dpo/rejected_error": rejected.mean(),
    }
    if reference_chosen is not None and reference_rejected is not None:
        metrics |= {
            "dpo/reference_chosen_error": reference_chosen.mean(),
            "dpo/reference_rejected_error": reference_rejected.mean(),
            "dpo/chosen_error_ratio": chosen.mean() / reference_chosen.mean(),
            "dpo/rejected_error_ratio": rejected.mean() / reference_rejected.mean(),
        }
    sample_losses = losses + added
    detached = {name: value.detach() for name, value in metrics.items()}
    return StepOutput(sample_losses.mean(), sample_losses.detach(), detached)
