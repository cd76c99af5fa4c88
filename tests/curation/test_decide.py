"""The rules, one by one, and what becomes of a given pair in all its orderings."""

from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from rpo.curation.curate import curate
from rpo.curation.curate_config import DecideConfig, SourceConfig
from rpo.curation.decide import Candidate, compare, outcomes_across, outcomes_of
from rpo.curation.export import export, pairs_of
from rpo.curation.records import Fault, Instructions, histories
from rpo.curation.score import ImageSimilarity, Scorer, ToScore, distance, score_images
from rpo.curation.store.run import CurationRun
from rpo.data.preference import SIDES
from rpo.data.readers import read_pairs
from rpo.data.writers import write_pairs
from tests.curation.fakes import brightness, config_of, fakes, greenness, picture, scored
from tests.data.samples import pair
from tests.rewards.clip_models import save_clip

RULES = DecideConfig(rewards={"a": 0.1, "b": 0.2})


def scores(a, b=0.0):
    return {"a": a, "b": b}


def source(a, b=0.0):
    return Candidate("1", "source", scores(a, b))


def edit(a, b=0.0):
    return Candidate("1", "edit", scores(a, b))


@pytest.mark.parametrize(
    ("a", "b", "changes", "expected"),
    [
        (0.5, 0.5, {}, "1/edit"),
        (0.1, 0.2, {}, "1/edit"),  # exactly the margin is enough
        (0.05, 0.5, {}, "small_margin"),
        (0.5, 0.1, {}, "small_margin"),
        (0.5, -0.5, {}, "disagreement"),
        (0.5, 0.0, {}, "disagreement"),
        (0.0, 0.5, {}, "equal_scores"),
        (-0.5, -0.5, {}, "got_worse"),
        (0.5, -0.5, {"agreement": False}, "1/edit"),
        (-0.5, -0.5, {"policy": "both_directions"}, "1/source"),
        (-0.5, 0.5, {"policy": "both_directions"}, "disagreement"),
        (-0.05, -0.5, {"policy": "both_directions"}, "small_margin"),
        (-0.5, 0.5, {"policy": "always_edit"}, "1/edit"),
    ],
)
def test_which_of_source_and_edit_is_better(a, b, changes, expected):
    outcome = compare(source(0.0), edit(a, b), replace(RULES, **changes))
    assert expected in (outcome.chosen, outcome.reason)
    assert bool(outcome.chosen) == (outcome.reason is None) == bool(outcome.label)
    if outcome.chosen:
        assert {outcome.chosen, outcome.rejected} == {"1/source", "1/edit"}
        assert outcome.label == ("edit" if changes.get("policy") == "always_edit" else "reward:a")


def test_exchanging_the_scores_exchanges_the_sides():
    rules = replace(RULES, policy="both_directions")
    for a, b in [(0.5, 0.5), (0.05, 0.5), (0.5, -0.5), (0.0, 0.0)]:
        there, back = compare(source(0.0), edit(a, b), rules), compare(source(a, b), edit(0.0), rules)
        assert (there.chosen, there.rejected, there.reason) == (
            back.rejected,
            back.chosen,
            back.reason,
        )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"distance": 0.001}, "too_close"),
        ({"distance": 0.4}, "too_far"),
        ({"distance": 0.1, "similarity": 0.3}, "too_dissimilar"),
        ({"distance": 0.1, "similarity": 0.99}, "too_similar"),
        ({"distance": 0.1, "similarity": 0.8}, None),
        ({"distance": 0.1}, None),
        ({"distance": DecideConfig().min_distance}, None),  # both ends belong to it
        ({"distance": DecideConfig().max_distance, "similarity": 0.95}, None),
        ({"distance": 0.1, "similarity": DecideConfig().min_similarity}, None),
    ],
)
def test_an_edit_must_lie_within_the_window(values, expected):
    rules = replace(RULES, max_similarity=0.95)
    (outcome,) = outcomes_of(scored("1", scores(0.0), scores(0.5, 0.5), **values), rules)
    assert outcome.reason == expected


NO_EDIT = {"edit": None, "scores": None}


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"critique": Fault("empty", "no"), "instructions": None, **NO_EDIT}, "critique_fault"),
        ({"instructions": None, **NO_EDIT}, "nothing_to_fix"),
        ({"instructions": Fault("empty", "no"), **NO_EDIT}, "instruction_fault"),
        ({"instructions": Instructions(instructions=()), **NO_EDIT}, "no_instructions"),
        ({**NO_EDIT, "edit": Fault("empty", "no")}, "edit_fault"),
        ({"scores": Fault("invalid", "nan")}, "score_fault"),
    ],
)
def test_a_record_without_an_edit_says_why(known, reason):
    (outcome,) = outcomes_of(scored("1", **known), RULES)
    assert (outcome.first, outcome.second, outcome.reason) == ("1/source", "1/edit", reason)


def sides(w_edit, l_edit):
    known = [{} if edit is not None else {"edit": Fault("empty", "no")} for edit in (w_edit, l_edit)]
    first = scored("w", scores(0.5, 0.5), w_edit, side="chosen", **known[0])
    second = scored("l", scores(0.0, 0.0), l_edit, side="rejected", **known[1])
    return first, second


def test_a_given_pair_makes_up_to_six():
    first, second = sides(scores(2, 2), scores(1, 1))
    across = outcomes_across(first, second, RULES)
    own = outcomes_of(first, RULES) + outcomes_of(second, RULES)
    chosen = {(one.chosen, one.rejected): one.label for one in across + own}
    assert chosen == {
        ("w/source", "l/source"): "given",
        ("w/edit", "l/source"): "reward:a",
        ("l/edit", "w/source"): "reward:a",
        ("w/edit", "l/edit"): "reward:a",
        ("w/edit", "w/source"): "reward:a",
        ("l/edit", "l/source"): "reward:a",
    }


def test_an_edit_outside_the_window_is_in_no_ordering():
    first, second = sides(scores(2, 2), scores(1, 1))
    across = outcomes_across(replace(first, scores=replace(first.scores, distance=0.9)), second, RULES)
    assert {(one.chosen, one.rejected) for one in across} == {("w/source", "l/source"), ("l/edit", "w/source")}


def test_the_given_label_holds_whatever_the_scores_say():
    first, second = sides(None, None)
    worse = replace(first, scores=replace(first.scores, source=scores(-9, -9)))
    (outcome,) = outcomes_across(second, worse, RULES)
    assert (outcome.chosen, outcome.label) == ("w/source", "given")


def test_all_orderings_of_given_pairs_in_a_run(tmp_path):
    write_pairs(tmp_path / "pairs", [pair(index) for index in range(10)])
    config = config_of(tmp_path / "run", tmp_path)
    given = SourceConfig(kind="pairs", path=str(tmp_path / "pairs"), batch_size=4)
    config = replace(config, source=given, decide=replace(config.decide, orderings="all"))
    curate(config, components=fakes())
    folder = CurationRun(config.output)
    labels = Counter(one.label for history in histories(folder) for one in history.outcomes)
    assert labels["given"] == 10
    assert labels["reward:tests.curation.fakes:brightness"] > 10
    written = read_pairs(export(folder.store.address).path)
    assert len(written) == len(list(pairs_of(folder)))
    originals = {tuple(one.facts(side).digest for side in SIDES) for one in (pair(index) for index in range(10))}
    as_given = [one for one in written if one.details["label_source"] == "given"]
    assert all(one.chosen_score is None for one in as_given)
    pixels = {tuple(one.decode(side).tobytes() for side in SIDES) for one in as_given}
    assert pixels == {tuple(pair(index).decode(side).tobytes() for side in SIDES) for index in range(10)}
    assert len(originals) == 10


def test_distance_and_scores_of_images_of_any_size():
    black, white = (Image.new("RGB", (4, 6), (level,) * 3) for level in (0, 255))
    assert distance(black, black) == 0
    assert distance(black, white) == 1
    images = [black, picture(1), white, picture(2)]
    scores = score_images(brightness, images, ["x"] * 4, name="brightness")
    alone = [score_images(brightness, [image], ["x"], name="brightness")[0] for image in images]
    assert scores == pytest.approx(alone)
    assert scores[0] == 0
    assert scores[2] == 1


def test_filter_and_evaluation_are_kept_apart():
    scorer = Scorer({"bright": brightness}, greenness)
    (both, alone) = scorer([ToScore("x", picture(0), picture(1)), ToScore("x", picture(2), None)])
    assert set(both.source) == set(both.edit) == {"bright"}
    assert both.evaluation == pytest.approx(
        {
            "source": score_images(greenness, [picture(0)], ["x"], name="g")[0],
            "edit": score_images(greenness, [picture(1)], ["x"], name="g")[0],
        }
    )
    assert both.distance == distance(picture(0), picture(1))
    assert (alone.edit, alone.distance, list(alone.evaluation)) == (None, None, ["source"])


def test_the_similarity_of_images_is_a_cosine(tmp_path):
    folder = save_clip(tmp_path)
    similarity = ImageSimilarity(str(folder))
    first, second = picture(0, (32, 32)), picture(1, (32, 32))
    assert similarity([(first, first)]) == pytest.approx([1], abs=1e-5)
    assert -1 <= similarity([(first, second)])[0] < 0.9999
    assert similarity([(first, second)]) == pytest.approx(similarity([(second, first)]), abs=1e-6)
    scorer = Scorer({"bright": brightness}, None, similarity)
    (scores,) = scorer([ToScore("x", first, second)])
    assert scores.similarity == pytest.approx(similarity([(first, second)])[0], abs=1e-6)
    assert scores.evaluation == {}
