"""What was measured of a model on held-out prompts, as its card shows it: beside the base, with intervals."""

from dataclasses import replace

import numpy as np

from rpo.evaluation.comparison import PairedComparison, compare, mean_comparison
from rpo.evaluation.held_out import Judged, check_comparable
from rpo.publishing.model_card import CardFacts, Sample

SAMPLES = 6
"""Images in the gallery."""


def results_of(base: Judged, aligned: Judged) -> dict[str, tuple[PairedComparison, ...]]:
    """A row for each domain: shares where a judge says yes or no, else mean scores."""
    check_comparable(base, aligned)
    is_claim = bool(np.isin([base.scores, aligned.scores], (0.0, 1.0)).all())
    rows: list[PairedComparison] = []
    for domain in aligned.by_domain:
        groups = [aligned.texts[one] for one in aligned.where(domain)]
        before, after = base.by_domain[domain], aligned.by_domain[domain]
        if is_claim:
            rows.append(compare(domain, before == 1, after == 1, groups=groups, seed=0))
        else:
            rows.append(mean_comparison(domain, before.tolist(), after.tolist(), groups=groups))
    return {"On prompts that were not trained on:": tuple(rows)}


def measured(card: CardFacts, base: Judged, aligned: Judged, reward: str) -> CardFacts:
    """A card with what was measured, and with held-out images."""
    return replace(
        card,
        results=results_of(base, aligned),
        results_note=note_of(aligned, reward),
        samples=samples_of(aligned),
        samples_note="Held-out prompts, drawn at random.",
    )


def note_of(aligned: Judged, reward: str) -> str:
    """How it was measured, in a sentence."""
    drawn = aligned.sampling
    how = [f"eta {drawn.eta:g}"] if drawn.solver == "ddim" else [drawn.solver]
    how += [f"{drawn.num_steps} steps"] if drawn.num_steps else ["the pipeline's usual steps"]
    how += [f"guidance {drawn.guidance_scale:g}"] if drawn.guidance_scale else ["its usual guidance"]
    return (
        f"Judged by `{reward}`, on the same prompts and noise for both, drawn with {', '.join(how)} from seed "
        f"{drawn.seed}."
    )


def samples_of(aligned: Judged, *, seed: int = 0) -> tuple[Sample, ...]:
    """Held-out images by the model, drawn at random: nobody picked them."""
    count = min(SAMPLES, len(aligned.images))
    picked = sorted(np.random.default_rng(seed).permutation(len(aligned.images))[:count].tolist())
    return tuple(Sample(aligned.texts[one], aligned.images[one]) for one in picked)
