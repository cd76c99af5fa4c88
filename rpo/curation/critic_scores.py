"""What the critic of a run thinks of images overall, as one of the scores that decide: whether an edit did mend it.

The critique of a source is there already; only edits are asked about. An answer that is no critique is its record's
fault, as everywhere else.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import final

from PIL.Image import Image

from rpo.curation.blame import ask_each
from rpo.curation.records import Critic, Critique, Fault

CRITIC = "critic"
"""Its name among the rewards of `DecideConfig`."""


@final
class CriticScores:
    """Asks a critic for its overall judgement, 1 to 10."""

    def __init__(self, critic: Critic) -> None:
        """Take the critic."""
        self._critic = critic

    def __call__(
        self, images: Sequence[Image], captions: Sequence[str], known: Sequence[Critique | None]
    ) -> list[float | Fault]:
        """The judgement of each image."""
        places = [place for place, critique in enumerate(known) if critique is None]
        size = self._critic.batch_size
        batches = [places[start : start + size] for start in range(0, len(places), size)]

        def ask(batch: Sequence[int]) -> list[Critique | Fault]:
            return ask_each(
                lambda some: self._critic([images[one] for one in some], [captions[one] for one in some]), batch
            )

        with ThreadPoolExecutor(self._critic.concurrency) as pool:
            answers = [answer for some in pool.map(ask, batches) for answer in some]
        found: dict[int, object] = {place: critique for place, critique in enumerate(known) if critique is not None}
        found |= dict(zip(places, answers, strict=True))
        return [_overall(found[place]) for place in range(len(images))]


def _overall(answer: object) -> float | Fault:
    if isinstance(answer, Critique):
        return float(answer.overall)
    if isinstance(answer, Fault):
        return answer
    return Fault("invalid", f"the critic gave a {type(answer).__name__} for the edit; expected a Critique", str(answer))
