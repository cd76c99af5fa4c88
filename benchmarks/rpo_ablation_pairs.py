"""The pair sets of `rpo_ablation.py`, all made of the same images of one seed."""

import json
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from rpo.config.load import load_config
from rpo.curation.curate_config import CurateConfig, DecideConfig
from rpo.curation.records import Critique, Edit, History, Scores, encoded_of, histories, image_of
from rpo.curation.score import score_images
from rpo.curation.store.run import CurationRun
from rpo.data.preference import PreferencePair
from rpo.data.rejection_sampling import rejection_sampled_pairs
from rpo.files.text import read_text
from rpo.rewards import load_reward

CONFIG = Path(__file__).parent.parent / "configs" / "curate_shapes.yaml"
PROXY = "shapes-clip"
SOURCE_SCORES = "source_scores.json"
"""File of the proxy's scores of all of the model's own images, by record; curation scores only those it edits."""
BATCH = 64
LEAST_GAP = 0.25
"""Of the critic's marks within a pair."""
RSO_TEMPERATURE = 0.5
"""In standard deviations of the proxy's scores of a prompt."""


def source_scores(place: Path) -> dict[str, float]:
    """What the proxy thinks of every image that the model drew."""
    run = CurationRun(place)
    drawn = list(histories(run))
    found: dict[str, float] = {}
    for start in range(0, len(drawn), BATCH):
        some = drawn[start : start + BATCH]
        images = [image_of(run, one, "source") for one in some]
        scores = score_images(load_reward(PROXY), images, [one.source.caption for one in some], name=PROXY)
        found |= dict(zip([one.source.id for one in some], scores, strict=True))
    return found


def _ranked(data: Path) -> list[PreferencePair]:
    """Best against worst, and second against third, of the model's own images of a prompt."""
    found: list[PreferencePair] = []
    run, scores = CurationRun(data / "rich"), json.loads(read_text(data / SOURCE_SCORES))
    for some in _by_caption(run).values():
        order = sorted(some, key=lambda one: -scores[one.source.id])
        for better, worse in zip(order[: len(order) // 2], reversed(order), strict=False):
            if scores[better.source.id] > scores[worse.source.id]:
                pair = _pair(run, better, "source", worse, "source")
                gap = {"chosen_score": scores[better.source.id], "rejected_score": scores[worse.source.id]}
                found.append(replace(pair, **gap))
    return _shuffled(found)


def _rich(data: Path) -> list[PreferencePair]:
    """Edits that the proxy finds better than their source."""
    return _shuffled(_edits(CurationRun(data / "rich"), is_improved_only=True))


def _unfiltered(data: Path) -> list[PreferencePair]:
    """Every edit against its source, whatever the proxy says."""
    return _shuffled(_edits(CurationRun(data / "rich"), is_improved_only=False))


def _blind(data: Path) -> list[PreferencePair]:
    """Edits by what the caption alone suggests, that the proxy finds better."""
    return _shuffled(_edits(CurationRun(data / "blind"), is_improved_only=True))


def _mixed(data: Path) -> list[PreferencePair]:
    ranked, rich = _ranked(data), _rich(data)
    return [one for couple in zip(ranked, rich, strict=False) for one in couple]


def _rejection(data: Path) -> list[PreferencePair]:
    """Pairs by rejection sampling among all images of a prompt, edits included."""
    run, of_source = CurationRun(data / "rich"), json.loads(read_text(data / SOURCE_SCORES))
    found: list[PreferencePair] = []
    for caption, some in _by_caption(run).items():
        images = [(one, "source", of_source[one.source.id]) for one in some]
        images += [(one, "edit", score) for one in some if (score := _score(one, "edit")) is not None]
        scores = [score for _, _, score in images]
        spread = torch.tensor(scores).std().item()
        if spread > 0:
            couples = rejection_sampled_pairs(
                scores, temperature=RSO_TEMPERATURE * spread, label_temperature=0.0, seed=0, key=caption
            )
            found += [_pair(run, *images[chosen][:2], *images[rejected][:2]) for chosen, rejected in couples]
    return _shuffled(found)


def _verified(data: Path) -> list[PreferencePair]:
    """Edits that the critic, asked again, finds nothing wrong with, and the proxy better."""
    run = CurationRun(data / "rich")
    kept = [one for one in histories(run) if any(outcome.chosen for outcome in one.outcomes or ())]
    return _shuffled([_pair(run, one, "edit", one, "source") for one in kept if _mark(one, "edit") == 1])


def _siblings(data: Path) -> list[PreferencePair]:
    """Best against worst of the model's own images of a prompt, by the critic."""
    run, found = CurationRun(data / "rich"), list[PreferencePair]()
    for some in _by_caption(run).values():
        images = [(mark, one) for one in some if (mark := _mark(one, "source")) is not None]
        images.sort(key=lambda image: -image[0])
        for better, worse in zip(images[: len(images) // 2], reversed(images), strict=False):
            if better[0] == 1 and better[0] - worse[0] >= LEAST_GAP:
                found.append(_pair(run, better[1], "source", worse[1], "source"))
    return _shuffled(found)


def _verified_and_siblings(data: Path) -> list[PreferencePair]:
    return _shuffled([*_verified(data), *_siblings(data)])


def _mark(one: History, kind: str) -> float | None:
    """What the critic thinks of an image, 0 to 1; on shapes it is the verifier, which scored edits and sources."""
    if isinstance(one.scores, Scores):
        return one.scores.evaluation.get(kind)
    is_sound = isinstance(one.critique, Critique) and one.critique.nothing_to_fix
    return 1.0 if is_sound and kind == "source" else None


def _by_caption(run: CurationRun) -> dict[str, list[History]]:
    found: defaultdict[str, list[History]] = defaultdict(list)
    for one in histories(run):
        found[one.source.caption].append(one)
    return found


def _edits(run: CurationRun, *, is_improved_only: bool) -> list[PreferencePair]:
    rules: DecideConfig = load_config(CurateConfig, CONFIG, []).decide
    found: list[PreferencePair] = []
    for one in histories(run):
        if is_improved_only:
            found += [_pair(run, one, "edit", one, "source") for outcome in one.outcomes or () if outcome.chosen]
        elif isinstance(one.edit, Edit) and _is_in_window(one, rules):
            found.append(_pair(run, one, "edit", one, "source"))
    return found


def _is_in_window(one: History, rules: DecideConfig) -> bool:
    distance = one.scores.distance if isinstance(one.scores, Scores) else None
    return distance is not None and rules.min_distance <= distance <= rules.max_distance


def _pair(run: CurationRun, better: History, kind: str, worse: History, other: str) -> PreferencePair:
    images = [encoded_of(run, one, side) for one, side in ((better, kind), (worse, other))]
    return PreferencePair(
        better.source.caption, *images, chosen_score=_score(better, kind), rejected_score=_score(worse, other)
    )


def _score(one: History, kind: str) -> float | None:
    if not isinstance(one.scores, Scores):
        return None
    scores = one.scores.source if kind == "source" else one.scores.edit
    return None if scores is None else scores[PROXY]


def _shuffled(pairs: list[PreferencePair]) -> list[PreferencePair]:
    random.Random(0).shuffle(pairs)
    return pairs


SETS = {
    "ranked": _ranked,
    "rich": _rich,
    "unfiltered": _unfiltered,
    "blind": _blind,
    "mixed": _mixed,
    "rejection": _rejection,
    "verified": _verified,
    "siblings": _siblings,
    "verified_and_siblings": _verified_and_siblings,
}
"""From the folder of a seed's curation runs to its pairs, in an order of chance; by name."""
