"""From judged images of one prompt to preference pairs: the stand-in for a critic, in a world with a ground truth.

Images that hold are paired with images of the same prompt that do not; both came from the same model, so what tells
them apart is what the prompt asks for. Where none holds, the nearest miss may be preferred to the worst, if that is
asked for and the verifier sees a clear difference. `rejection_sampled` pairs by chance instead, among images that a
better policy would have drawn.
"""

from collections.abc import Iterable

from rpo.data.preference import PreferencePair, encode_png
from rpo.data.rejection_sampling import rejection_sampled_pairs
from rpo.shapes.evaluation import ShapesEvaluation


def preference_pairs(
    judged: ShapesEvaluation, *, pairs_per_prompt: int, min_chosen_score: float, min_margin: float
) -> list[PreferencePair]:
    """Pair the images of each prompt, best against worst; no image is used twice.

    Args:
        judged: Several images of each prompt; those of one prompt lie beside each other.
        pairs_per_prompt: At most this many of each prompt.
        min_chosen_score: Least score of the better image; 1 means that it shows exactly what the prompt asks for.
        min_margin: Least difference of the verifier's scores; 0.3 is one wrong attribute of one object among two.

    Raises:
        ValueError: If `pairs_per_prompt` is not positive.
    """
    if pairs_per_prompt < 1:
        raise ValueError(f"pairs_per_prompt is {pairs_per_prompt}, but at least 1 is needed; 1 to 4 are usual")
    size = judged.sampling.images_per_prompt
    starts = range(0, len(judged.prompts), size)
    return [
        _pair(judged, better, worse)
        for start in starts
        for better, worse in _ranked(judged, range(start, start + size), pairs_per_prompt)
        if judged.scores[better] >= min_chosen_score and judged.scores[better] - judged.scores[worse] >= min_margin
    ]


def rejection_sampled(
    judged: ShapesEvaluation, *, temperature: float = 0.2, label_temperature: float = 0.0, seed: int = 0
) -> list[PreferencePair]:
    """Pair the images of each prompt by statistical rejection sampling (RSO); no image is used twice.

    Args:
        judged: Several images of each prompt, drawn by the base; those of one prompt lie beside each other.
        temperature: Of the tilt towards the verifier's score, which is between 0 and 1.
        label_temperature: Of the labels; 0 prefers the better score without noise.
        seed: Of the draws.

    Raises:
        ValueError: If a temperature is outside its range.
    """
    size = judged.sampling.images_per_prompt
    pairs: list[PreferencePair] = []
    for start in range(0, len(judged.prompts), size):
        scores = [float(score) for score in judged.scores[start : start + size]]
        key = f"{start}/{judged.texts[start]}"
        couples = rejection_sampled_pairs(
            scores, temperature=temperature, label_temperature=label_temperature, seed=seed, key=key
        )
        pairs += [_pair(judged, start + chosen, start + rejected) for chosen, rejected in couples]
    return pairs


def _ranked(judged: ShapesEvaluation, images: Iterable[int], count: int) -> list[tuple[int, int]]:
    order = sorted(images, key=lambda index: -judged.scores[index])  # stable: ties stay in the order of their seeds
    half = min(count, len(order) // 2)
    return [(order[place], order[-1 - place]) for place in range(half)]


def _pair(judged: ShapesEvaluation, better: int, worse: int) -> PreferencePair:
    return PreferencePair(
        judged.texts[better],
        encode_png(judged.images[better]),
        encode_png(judged.images[worse]),
        chosen_score=float(judged.scores[better]),
        rejected_score=float(judged.scores[worse]),
        source="rpo.shapes",
        seed=judged.sampling.seed,
        details={"label_source": "rpo.shapes.verifier"},
    )
