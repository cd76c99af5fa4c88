"""What every preference objective logs about a batch of pairs, under the names of `rpo.training.log`."""

from jaxtyping import Float
from torch import Tensor

from rpo.types import StepOutput


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
            "dpo/chosen_error_ratio": chosen.mean() / reference_chosen.mean(),
            "dpo/rejected_error_ratio": rejected.mean() / reference_rejected.mean(),
        }
    sample_losses = losses + added
    detached = {name: value.detach() for name, value in metrics.items()}
    return StepOutput(sample_losses.mean(), sample_losses.detach(), detached)
