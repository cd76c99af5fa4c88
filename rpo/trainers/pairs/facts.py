"""What a preference objective has to know of every pair before training: gaps of scores, and the doubt of prompts.

The doubt is the dispersion in `mallows_scale`. For language models it is the entropy of the reference. The denoising
error of the reference at mid-time is the nearest thing that a diffusion model has: the errors over all times bound its
negative log-likelihood, hence its entropy, from above. It is measured on the clean captions, one noise for each pair,
mean over the pairs of a prompt. The alternative, how far the scores of a prompt's images scatter, says something only
where a prompt has several pairs: of a single one it is half the gap of the two scores.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.data.preference import PairSet, left_out
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.objectives.context_scale import mallows_scale
from rpo.trainers.pairs.batches import PairBatch, PairBatches
from rpo.trainers.pairs.loss import PairFacts
from rpo.trainers.pairs.reference_errors import ReferenceErrors
from rpo.trainers.preference_config import PreferenceConfig
from rpo.training.processes import Processes


def require_scores(pairs: PairSet, config: PreferenceConfig) -> None:
    """Refuse a set without scores where the objective asks for them; reads no image."""
    asked = [
        name
        for name, is_asked in (
            ("objective.margin_from: rewards", config.margin_from == "rewards"),
            ("objective.context: scores", config.context == "scores"),
        )
        if is_asked
    ]
    if not asked:
        return
    without = [pair.name for pair in pairs if pair.margin is None]
    if without:
        raise InputError(
            f"{without[0]} (and {len(without) - 1} more of {len(pairs)}) has no chosen_score and rejected_score, but "
            f"{asked[0]} needs both of every pair; score the set, or leave that setting out"
        )


def pair_facts(pairs: PairSet, config: PreferenceConfig, measure: Callable[[], Float[Tensor, " pairs"]]) -> PairFacts:
    """What the objective needs of the pairs.

    Args:
        measure: The reference's mid-time error of each pair; called only if it is asked for.
    """
    gaps = relative_gaps(pairs) if config.margin_from == "rewards" else None
    if config.context == "none":
        return PairFacts(gaps)
    dispersion = score_dispersion(pairs) if config.context == "scores" else per_prompt(pairs, measure())
    return PairFacts(gaps, mallows_scale(dispersion))


def set_notes(model: Checkpoint, pairs: PairSet) -> list[str]:
    """What a plan has to say of a set: captions that the text encoder cuts, rows that were left out."""
    return [f"  {note}" for note in (*model.notes_on(pairs.prompts), left_out(pairs)) if note]


def relative_gaps(pairs: PairSet) -> Float[Tensor, " pairs"]:
    """Chosen minus rejected score in units of the set's mean gap: rewards differ in scale by orders of magnitude."""
    gaps = torch.tensor([pair.margin for pair in pairs], dtype=torch.float32)
    if not gaps.any():
        raise InputError(
            f"chosen_score and rejected_score are equal in all {len(gaps)} pairs, but objective.margin_from: rewards "
            "asks how far they differ; score the set, or leave that setting out"
        )
    return gaps / gaps.abs().mean()


def score_dispersion(pairs: PairSet) -> Float[Tensor, " pairs"]:
    """Standard deviation of the scores of all images of each pair's prompt."""
    scores: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        scores[pair.prompt] += [score for score in (pair.chosen_score, pair.rejected_score) if score is not None]
    spread = {prompt: torch.tensor(values).std(correction=0) for prompt, values in scores.items()}
    return torch.stack([spread[pair.prompt] for pair in pairs])


def per_prompt(pairs: PairSet, values: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """Each pair's value replaced by the mean over the pairs of its prompt."""
    rows: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        rows[pair.prompt].append(index)
    means = {prompt: values[some].mean() for prompt, some in rows.items()}
    return torch.stack([means[pair.prompt] for pair in pairs])


def mid_time_errors(
    batches: PairBatches,
    kept: ReferenceErrors,
    errors: Callable[[PairBatch], Tensor],
    processes: Processes,
) -> Float[Tensor, " pairs"]:
    """The reference's error at mid-time, mean over the two sides of each pair; the same on every process.

    Args:
        kept: Where the errors are kept, so that a resumed run reads the same bits.
    """
    own = list(range(processes.index, len(batches.pairs), processes.count))
    size = batches.share.micro_batch
    known: dict[int, float] = {}
    for start in range(0, len(own), size):
        some: Sequence[int] = own[start : start + size]
        both = kept.of(batches.midway(some), errors).view(2, -1).mean(dim=0)
        known |= dict(zip(some, both.tolist(), strict=True))
    everyone = {index: value for part in processes.gather(known) for index, value in part.items()}
    return torch.tensor([everyone[index] for index in range(len(batches.pairs))])
