"""`evaluation.json`: all that came of an evaluation, with all that makes its numbers comparable; read strictly.

    pinned         models, prompts, how images are drawn, rewards and libraries: with equal ones numbers can be compared
    compared       every two models by every reward, over all prompts and by category
    diversity      the same of the diversity within prompts, where there are several images of each
    chosen         of best-of-N, which of its candidates each image is
    scores         of every image, by model and reward: prompt by prompt, the images of one beside each other
    sha256         of all of this: a file that was changed is refused

A file without exactly these parts is of another version of rpo: it is refused, and the evaluation is made again.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo.errors import InputError
from rpo.evaluation.comparison import PairedComparison
from rpo.evaluation.contest import Contest
from rpo.evaluation.intervals import Interval
from rpo.files.text import read_text
from rpo.files.whole import write_whole

RESULT = "evaluation.json"
"""The file in the folder of an evaluation."""

_PARTS = ("pinned", "compared", "diversity", "chosen", "scores")


@dataclass(frozen=True)
class Compared:
    """Two models by one reward, or by one measure of diversity."""

    before: str
    after: str
    by: str
    rows: tuple[Contest, ...]
    """Over all prompts first."""


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation."""

    pinned: Mapping[str, Any]
    compared: tuple[Compared, ...]
    diversity: tuple[Compared, ...]
    chosen: tuple[int, ...]
    scores: Mapping[str, Mapping[str, tuple[float, ...]]]

    @property
    def models(self) -> list[Mapping[str, Any]]:
        """What was compared, the base first; each has a "label"."""
        return self.pinned["models"]

    @property
    def prompts(self) -> list[str]:
        """The prompt of every image."""
        return self._of_images("prompt")

    @property
    def categories(self) -> list[str]:
        """That of every image."""
        return self._of_images("category")

    def of(self, before: str, after: str, *, among: tuple[Compared, ...] | None = None) -> list[Compared]:
        """Two models by every reward by which they are compared."""
        every = self.compared if among is None else among
        return [one for one in every if (one.before, one.after) == (before, after)]

    def write(self, file: Path) -> None:
        """Write it, whole or not at all."""
        told = {
            "pinned": dict(self.pinned),
            "compared": [_told(one) for one in self.compared],
            "diversity": [_told(one) for one in self.diversity],
            "chosen": list(self.chosen),
            "scores": {model: {name: list(of) for name, of in own.items()} for model, own in self.scores.items()},
        }
        whole = {"sha256": _hash(told), **told}
        write_whole(file, json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def _of_images(self, name: str) -> list[str]:
        every = self.pinned["prompts"]["list"]
        return [one[name] for one in every for _ in range(self.pinned["sampling"]["images_per_prompt"])]


def read_evaluation(path: Path) -> Evaluation:
    """What a file, or the one in a folder, says.

    Raises `InputError` if it is none, is of another version of rpo, or was changed.
    """
    file = path / RESULT if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no {file}; expected that of an evaluation that has ended; finish it with --resume")
    try:
        found = json.loads(read_text(file))
        told = {name: found[name] for name in _PARTS}
        is_whole = set(found) == {"sha256", *_PARTS} and found["sha256"] == _hash(told)
        if not is_whole:
            raise ValueError("its hash is that of other content")
        return Evaluation(
            told["pinned"],
            tuple(_compared(one) for one in told["compared"]),
            tuple(_compared(one) for one in told["diversity"]),
            tuple(told["chosen"]),
            {model: {name: tuple(of) for name, of in own.items()} for model, own in told["scores"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{file} is not what `rpo evaluate` of this version wrote ({error}); expected it unchanged; evaluate again"
        ) from error


def _told(one: Compared) -> dict[str, Any]:
    rows = [
        {
            "category": row.means.name,
            "images": row.means.num_images,
            "prompts": row.means.num_prompts,
            "before": _ends(row.means.before),
            "after": _ends(row.means.after),
            "difference": _ends(row.means.gain),
            "win_rate": _ends(row.win_rate),
            "wins": row.wins,
            "ties": row.ties,
            "losses": row.losses,
        }
        for row in one.rows
    ]
    return {"before": one.before, "after": one.after, "by": one.by, "rows": rows}


def _compared(told: Mapping[str, Any]) -> Compared:
    rows = tuple(
        Contest(
            PairedComparison(
                name=row["category"],
                num_images=row["images"],
                num_prompts=row["prompts"],
                before=_interval(row["before"]),
                after=_interval(row["after"]),
                gain=_interval(row["difference"]),
                outcomes=(),
                is_share=False,
            ),
            _interval(row["win_rate"]),
            row["wins"],
            row["ties"],
            row["losses"],
        )
        for row in told["rows"]
    )
    return Compared(told["before"], told["after"], told["by"], rows)


def _ends(one: Interval) -> dict[str, float | None]:
    """An interval as JSON has it; the ends of an unbounded one are nothing."""
    ends = {"low": one.low, "high": one.high}
    return {"value": one.value, **{name: end if math.isfinite(end) else None for name, end in ends.items()}}


def _interval(told: Mapping[str, float | None]) -> Interval:
    low, high = told["low"], told["high"]
    value = told["value"]
    if value is None:
        raise ValueError("an interval has no value")
    return Interval(value, -math.inf if low is None else low, math.inf if high is None else high)


def _hash(told: Mapping[str, Any]) -> str:
    text = json.dumps(told, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
