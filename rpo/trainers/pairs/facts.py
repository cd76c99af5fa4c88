"""What a preference objective has to know of every pair before training: gaps of scores, and the doubt of prompts.

The doubt is the dispersion in `mallows_scale`. For language models it is the entropy of the reference. The denoising
error of the reference at mid-time is the nearest thing that a diffusion model has: the errors over all times bound its
negative log-likelihood, hence its entropy, from above. It is measured on the clean captions, one noise for each pair,
mean over the pairs of a prompt. The alternative, how far the scores of a prompt's images scatter, says something only
where a prompt has several pairs: of a single one it is half the gap of the two scores.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.data.preference import PairSet
from rpo.errors import InputError
from rpo.models.base import Edits
from rpo.objectives.preference import Objective
from rpo.objectives.preference.context_scale import mallows_scale
from rpo.objectives.preference.dpo import Dpo
from rpo.trainers.pairs.batches import PairBatch


@dataclass(frozen=True)
class PairFacts:
    """What an objective has to know of every pair of the set."""

    score_gaps: Float[Tensor, " pairs"] | None = None
    """Chosen minus rejected score, in units of the set's mean gap."""
    context_scale: Float[Tensor, " pairs"] | None = None
    """phi of the pair's prompt."""

    def of(self, batch: PairBatch, like: Tensor) -> dict[str, Tensor | None]:
        """Those of a micro-batch, as `Comparison` has them."""
        rows = list(batch.pairs)
        found = {"score_gap": self.score_gaps, "context_scale": self.context_scale}
        return {name: None if values is None else values[rows].to(like) for name, values in found.items()}


def require_originals(pairs: PairSet, edits: Edits, family: str) -> None:
    """Refuse pairs of edits for a model that edits nothing, and the reverse; reads no image."""
    edited = [pair.name for pair in pairs if pair.original is not None]
    others = [pair.name for pair in pairs if pair.original is None]
    if edited and edits == "never":
        raise InputError(
            f"{edited[0]} (and {len(edited) - 1} more of {len(pairs)}) has an original that its images are edits of, "
            f"but {family} edits nothing; give pairs of images that a prompt describes, or train an editing model"
        )
    if others and (edited or edits == "always"):
        raise InputError(
            f"{others[0]} (and {len(others) - 1} more of {len(pairs)}) has no original, but "
            f"{'others have' if edited else f'{family} edits images'}; give the image that its two are edits of as "
            "`original` (`original_file_name` in metadata.jsonl), or leave the record out"
        )


def require_scores(pairs: PairSet, objective: Objective) -> None:
    """Refuse a set without scores where the objective asks for them; reads no image."""
    if not objective.needs_scores:
        return
    without = [pair.name for pair in pairs if pair.margin is None]
    if without:
        raise InputError(
            f"{without[0]} (and {len(without) - 1} more of {len(pairs)}) has no chosen_score and rejected_score, but "
            f"objective.{objective.needs_scores} needs both of every pair; score the set, or leave that setting out"
        )


def pair_facts(pairs: PairSet, objective: Objective, measure: Callable[[], Float[Tensor, " pairs"]]) -> PairFacts:
    """What the objective needs of the pairs.

    Args:
        measure: The reference's mid-time error of each pair; called only if it is asked for.
    """
    if not isinstance(objective, Dpo):
        return PairFacts()
    gaps = relative_gaps(pairs) if objective.margin_from == "rewards" else None
    if objective.context == "none":
        return PairFacts(gaps)
    dispersion = score_dispersion(pairs) if objective.context == "scores" else per_prompt(pairs, measure())
    return PairFacts(gaps, mallows_scale(dispersion))


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
