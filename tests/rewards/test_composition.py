"""What is in an image: against GenEval's rule as an independent program, on things that are found at random."""

import random

import numpy as np
import pytest
import torch

from rpo.data.prompts import AnnotatedPrompt
from rpo.rewards import RewardError, load_reward
from rpo.rewards.base import ask
from rpo.rewards.clip import ClipReward, clip_score
from rpo.rewards.composition import COLOURS, CompositionReward, relations
from rpo.rewards.detector import Thing
from tests.rewards.clip_models import EDGE, save_clip

NAMES = ("apple", "bowl", "traffic light")


class Given:
    """A detector that finds what it is told."""

    def __init__(self, *found):
        self.found, self.asked = found, []

    def __call__(self, images, names):
        self.asked += [list(one) for one in names]
        return [{name: one.get(name, []) for name in asked} for one, asked in zip(self.found, names, strict=True)]

    def leave(self):
        pass


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_score(str(save_clip(tmp_path_factory.mktemp("clip"))))


def at(left, top, right, bottom, confidence=0.5):
    return Thing((left, top, right, bottom), confidence)


def asked(found, include, exclude=(), clip=None):
    detector = Given(found)
    reward = load_reward(CompositionReward(detector, clip or ClipReward("nowhere")))
    prompt = AnnotatedPrompt("…", {"tag": "x", "include": list(include), "exclude": list(exclude)})
    found = ask(reward, torch.rand(1, 3, 64, 64), [prompt], name="composition")
    return found.values.item(), found.info["correct"]


def test_things_are_counted():
    two = {"apple": [at(0, 0, 9, 9), at(20, 0, 29, 9)]}
    assert asked(two, [{"class": "apple", "count": 1}]) == (1, 1)
    assert asked(two, [{"class": "apple", "count": 2}]) == (1, 1)
    assert asked(two, [{"class": "apple", "count": 4}]) == (0.5, 0)
    assert asked(two, [{"class": "apple", "count": 2}, {"class": "bowl", "count": 1}]) == (0.5, 0)
    assert asked(two, [{"class": "apple", "count": 2}], [{"class": "apple", "count": 3}]) == (1, 1)
    assert asked(two, [{"class": "apple", "count": 1}], [{"class": "apple", "count": 2}]) == (0.5, 0)


def test_things_are_placed():
    found = {"apple": [at(0, 40, 10, 50)], "bowl": [at(30, 40, 50, 50)]}

    def placed(relation):
        include = [{"class": "bowl", "count": 1}, {"class": "apple", "count": 1, "position": [relation, 0]}]
        return asked(found, include)

    assert placed("left of") == (1, 1)
    assert placed("right of") == placed("above") == (pytest.approx(2 / 3), 0)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 40, 20, 60), {"left of"}),
        ((80, 40, 100, 60), {"right of"}),
        ((40, 0, 60, 20), {"above"}),
        ((40, 80, 60, 100), {"below"}),
        ((0, 0, 20, 20), {"left of", "above"}),
        ((43, 42, 63, 62), set()),
        ((40, 40, 60, 60), set()),
        ((37, 0, 57, 20), {"above"}),
    ],
)
def test_relations(box, expected):
    assert relations(Thing(box, 1), Thing((40, 40, 60, 60), 1)) == expected


def geneval_relations(a, b):
    """GenEval's, in numpy."""
    boxes = np.array([a, b], dtype=float).reshape(2, 2, 2)
    centres, sizes = boxes.mean(1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    rest = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sizes.sum(0), 0)
    if (np.abs(rest) < 1e-3).all():
        return set()
    dx, dy = rest / np.sqrt((offset**2).sum())
    names = ("left of", dx < -0.5), ("right of", dx > 0.5), ("above", dy < -0.5), ("below", dy > 0.5)
    return {name for name, holds in names if holds}


def geneval_correct(found, metadata, colour_of):
    """GenEval's rule as one program: the first failure of anything is the end of it."""
    groups = []
    for one in metadata["include"]:
        things = found.get(one["class"], [])[: one["count"]]
        good = len(things) >= one["count"]
        if good and "color" in one:
            good = [colour_of(thing, one["class"]) for thing in things].count(one["color"]) >= one["count"]
        if good and "position" in one:
            relation, place = one["position"]
            good = groups[place] is not None and all(
                relation in geneval_relations(thing.box, target.box) for thing in things for target in groups[place]
            )
        groups.append(things if good else None)
    over = [one for one in metadata.get("exclude", []) if len(found.get(one["class"], [])) >= one["count"]]
    return not over and None not in groups


def draw(rng):
    found, things = {}, []
    for name in NAMES:
        found[name] = []
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            left, top = rng.randrange(0, 50), rng.randrange(0, 50)
            found[name].append(at(left, top, left + rng.randrange(3, 14), top + rng.randrange(3, 14)))
    for place in range(rng.choice([1, 2, 2, 3])):
        one = {"class": rng.choice(NAMES), "count": rng.choice([1, 1, 1, 2])}
        if rng.random() < 0.4:
            one["color"] = rng.choice(COLOURS[:2])
        if place and rng.random() < 0.6:
            one["position"] = [rng.choice(["left of", "right of", "above", "below"]), rng.randrange(place)]
        things.append(one)
    exclude = [{"class": rng.choice(NAMES), "count": rng.choice([2, 3])}] if rng.random() < 0.3 else []
    return found, {"include": things, "exclude": exclude}


def test_what_is_all_there_is_what_geneval_counts_as_correct(monkeypatch):
    def colour_of(thing, name):
        return COLOURS[int(sum(thing.box) + len(name)) % 2]

    monkeypatch.setattr(CompositionReward, "_colour", lambda self, image, thing, name: colour_of(thing, name))
    rng, seen = random.Random(0), []
    for _ in range(600):
        found, metadata = draw(rng)
        score, correct = asked(found, metadata["include"], metadata["exclude"])
        assert correct == geneval_correct(found, metadata, colour_of), (found, metadata)
        assert (score == 1) == bool(correct) and 0 <= score <= 1
        seen.append(correct)
    assert 60 < sum(seen) < 540


def test_a_colour_is_the_one_whose_texts_clip_finds_most_like_the_box(clip):
    """In logits of one text at a time: each colour by its three texts, normalised after their mean."""
    image, box = torch.rand(3, 80, 80), (10.3, 20.0, 10.3 + EDGE, 20.0 + EDGE)
    crop = image[None, :, 20 : 20 + EDGE, 10 : 11 + EDGE]
    (seen,) = clip.embed_images(crop)
    likeness = {}
    for colour in COLOURS:
        texts = [f"a photo of a {colour} bowl", f"a photo of a {colour}-colored bowl", f"a photo of a {colour} object"]
        mean = sum(clip.embed_texts([text], torch.device("cpu"))[0] for text in texts) / 3
        likeness[colour] = (mean @ seen / mean.norm()).item()
    reward = CompositionReward(Given(), clip)
    assert reward._colour(image, Thing(box, 1), "bowl") == max(likeness, key=likeness.get)


def test_a_box_beyond_the_image_is_looked_at_within_it(clip):
    reward = CompositionReward(Given(), clip)
    for box in ((-5.0, -5.0, 90.0, 90.0), (79.9, 79.9, 95.0, 95.0), (40.0, 40.0, 40.0, 40.0)):
        assert reward._colour(torch.rand(3, 80, 80), Thing(box, 1), "bowl") in COLOURS


def test_colours_count_only_where_enough_was_found(clip):
    include = [{"class": "apple", "count": 2, "color": "red"}]
    assert asked({"apple": [at(0, 0, 40, 40)]}, include, clip=clip) == (0.25, 0)


def test_each_image_is_asked_for_its_own_things():
    detector = Given({"apple": [at(0, 0, 9, 9)]}, {})
    prompts = [
        AnnotatedPrompt("a", {"include": [{"class": "apple", "count": 1}], "exclude": [{"class": "bowl", "count": 1}]}),
        AnnotatedPrompt("b", {"include": [{"class": "bowl", "count": 1}] * 2}),
    ]
    reward = load_reward(CompositionReward(detector, ClipReward("nowhere")))
    assert reward(torch.rand(2, 3, 16, 16), prompts).tolist() == [1, 0]
    assert detector.asked == [["apple", "bowl"], ["bowl"]]


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"include": []},
        {"include": [{"class": "apple"}]},
        {"include": [{"class": "apple", "count": 0}]},
        {"include": [{"class": "apple", "count": "1"}]},
        {"include": [{"class": "apple", "count": 1, "color": "crimson"}]},
        {"include": [{"class": "apple", "count": 1, "position": ["beside", 0]}]},
        {"include": [{"class": "apple", "count": 1, "position": ["above", 0]}]},
        {"include": [{"class": "apple", "count": 1}], "exclude": [{"count": 1}]},
        [1],
    ],
)
def test_a_prompt_that_does_not_say_what_is_asked_is_named(metadata):
    good = AnnotatedPrompt("good", {"include": [{"class": "apple", "count": 1}]})
    reward = load_reward(CompositionReward(Given(), ClipReward("nowhere")))
    with pytest.raises(RewardError, match="GenEval's form") as caught:
        ask(reward, torch.rand(2, 3, 8, 8), [good, AnnotatedPrompt("bad", metadata)], name="composition")
    assert caught.value.indices == (1,)
