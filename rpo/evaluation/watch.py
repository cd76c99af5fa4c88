"""What is watched beside what is trained, and when it has fallen: for runs that draw, and for rounds.

Held-out rewards, and how far images of one prompt lie apart, should not fall. How images look may change: the images of
a better model look different, too. It is told to say *what* a model does.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from rpo.config.ranges import Positive, Text
from rpo.config.settings import settings
from rpo.evaluation.drift import Move, moved
from rpo.evaluation.image_statistics import (
    STATISTICS,
    embedding_diversity,
    image_statistics,
    pixel_diversity,
)
from rpo.types import Images

WATCHED = "watched/"

SURE = 3.0
"""From which z on a fall is sure: of a thousand numbers that did not move one has fallen so far."""

DIVERSITIES = (f"{WATCHED}pixel_diversity", f"{WATCHED}diversity")
LEAST_DIVERSITY = 0.5
"""The share of its diversity that a model must keep; a better one loses some, since its images are right alike."""


@settings
class WatchConfig:
    """What is watched, and what an alarm is; it changes nothing that is learnt."""

    held_out: tuple[Text, ...] = ()
    """Rewards that judge the watched images and are not trained on; cheap ones, such as clip-score."""

    alarm: Positive = 0.2
    """How far a held-out reward must fall, in standard deviations between prompts; 0.1 to 0.5."""

    stop: bool = False
    """Whether an alarm ends the run."""


def looks_of(images: Images, per_prompt: int, *, eyes: Callable[[Images], Tensor] | None) -> dict[str, Tensor]:
    """How images look and how far those of a prompt lie apart: one number per prompt, by metric.

    Args:
        images: RGB in [0, 1], those of a prompt beside each other.
        eyes: From images to unit vectors; without, diversity is that of pixels.
    """
    statistics = image_statistics(images)
    found = {
        f"{WATCHED}{name}": values.unflatten(0, (-1, per_prompt)).mean(dim=1) for name, values in statistics.items()
    }
    if per_prompt > 1:
        found[f"{WATCHED}pixel_diversity"] = pixel_diversity(images, per_prompt)
        if eyes is not None:
            found[f"{WATCHED}diversity"] = embedding_diversity(eyes(images), per_prompt)
    return found


def sure_falls(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, Move]:
    """What of it has surely fallen and should not have, by metric; one number per prompt, of the same prompts."""
    moves = {name: moved(before[name], now[name]) for name in now if name.removeprefix(WATCHED) not in STATISTICS}
    return {name: move for name, move in moves.items() if move is not None and move.z <= -SURE}


def alarming(falls: Mapping[str, Move], *, spreads: float) -> dict[str, Move]:
    """Those that are large enough to matter.

    Args:
        falls: By metric.
        spreads: How far a reward must fall.
    """
    return {
        name: move
        for name, move in falls.items()
        if (move.now <= LEAST_DIVERSITY * move.before if name in DIVERSITIES else -move.spreads >= spreads)
    }


def in_words(metric: str, move: Move) -> str:
    """A fall, for a person."""
    return (
        f"{metric} fell from {move.before:.4g} to {move.now:.4g} (by {-move.spreads:.2f} spreads between prompts, z = "
        f"{move.z:.1f})"
    )
