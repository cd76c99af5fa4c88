"""From judged images of one prompt to preference pairs by rejection sampling (RSO).

The verifier's score stands for the reward: images are accepted as often as a policy tilted towards it would draw them,
and those that pass are paired by chance.
"""

from rpo.data.preference import PreferencePair, encode_png
from rpo.data.rejection_sampling import rejection_sampled_pairs
from rpo.shapes.evaluation import ShapesEvaluation


def rejection_sampled(
    judged: ShapesEvaluation, *, temperature: float = 0.2, label_temperature: float = 0.0, seed: int = 0
) -> list[PreferencePair]:
    """Pair the images of each prompt by statistical rejection sampling (RSO); no image is used twice.

    Args:
        judged: Several images of each prompt, drawn by the base; those of one prompt lie beside each other.
        temperature: Of the tilt towards the verifier's score, which is between 0 and 1.
        label_temperature: Of the labels; 0 prefers the better score without noise.
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
