"""The critic has a vote: it is asked about edits, not again about sources; and siblings of one prompt are ordered."""

from dataclasses import dataclass, field, replace

import pytest

from rpo.curation.curate import curate
from rpo.curation.curate_config import CurateConfig, DecideConfig, SourceConfig
from rpo.curation.decide import Candidate, check_rules, compare, outcomes_of_siblings
from rpo.curation.export import pairs_of
from rpo.curation.records import Critique, Edit, Fault, Problem, Scores, histories, image_of
from rpo.curation.score import check_filters, critic_marks
from rpo.curation.status import status_of
from rpo.curation.store.run import CurationRun
from rpo.errors import InputError
from rpo.rewards.clip import CLIP_CHECKPOINT, PICK_CHECKPOINT
from tests.curation.fakes import (
    FakeCritic,
    config_of,
    fakes,
    image_folder,
    in_child,
    lines_of,
    number_of,
    picture,
    scored,
)

BRIGHTNESS = "tests.curation.fakes:brightness"


@dataclass
class Grader(FakeCritic):
    """Gives images a mark that depends on all of their pixels, and remembers which it was shown."""

    seen: list[int] = field(default_factory=list)

    def one(self, image):
        self.seen.append(number_of(image))
        overall = 1 + number_of(image) % 10
        problems = () if overall == 10 else (Problem(what=f"number {overall}", severity=1),)
        return Critique(problems=problems, overall=overall)


def voted(tmp_path, **rules):
    base = config_of(tmp_path / "run", image_folder(tmp_path / "images", 24))
    decide = DecideConfig(rewards={"critic": 0.0}, policy="both_directions", **rules)
    return replace(base, decide=decide)


def test_a_critique_that_is_there_is_not_asked_for_again():
    critic = Grader()
    known = Critique(problems=(Problem(what="dark", severity=2),), overall=4)
    found = critic_marks(critic, [picture(0), picture(1)], ["a", "b"], [known, None])
    assert critic.seen == [number_of(picture(1))]
    assert found == [4.0, 1 + number_of(picture(1)) % 10]


def test_every_batch_is_of_the_size_and_in_as_many_threads_as_the_critic_wants():
    sizes = []

    class Sized(Grader):
        def __call__(self, images, captions):
            sizes.append(len(images))
            return super().__call__(images, captions)

    images = [picture(index) for index in range(8)]
    found = critic_marks(Sized(batch_size=3, concurrency=2), images, ["x"] * 8, [None] * 8)
    assert sorted(sizes) == [2, 3, 3]
    assert found == [1 + number_of(image) % 10 for image in images]


def test_an_answer_that_is_no_critique_is_the_fault_of_its_record_alone():
    class Odd(Grader):
        def one(self, image):
            number = image.getpixel((0, 0))[0]
            if number == 0:
                raise OSError("broken")
            odd = {1: "very nice", 2: Fault("parse_error", "no JSON", "hm")}
            return odd[number] if number in odd else super().one(image)

    images = [picture(index) for index in range(4)]
    for number, image in enumerate(images[:3]):
        image.putpixel((0, 0), (number, 0, 0))
    kinds = [getattr(one, "kind", one) for one in critic_marks(Odd(batch_size=2), images, ["x"] * 4, [None] * 4)]
    assert kinds == ["raised", "invalid", "parse_error", 1 + number_of(images[3]) % 10]


def test_the_mark_of_the_edit_decides_in_a_run_and_the_source_is_asked_about_once(tmp_path):
    critic = Grader()
    config = voted(tmp_path)
    run = CurationRun(curate(config, components=fakes(critic=critic)))
    edited = [one for one in histories(run) if isinstance(one.edit, Edit)]
    assert len(edited) > 10
    assert len(critic.seen) == 24 + len(edited)
    for one in edited:
        marks = {kind: 1 + number_of(image_of(run, one, kind)) % 10 for kind in ("source", "edit")}
        assert isinstance(one.scores, Scores)
        assert (one.scores.source["critic"], one.scores.edit["critic"]) == (marks["source"], marks["edit"])
        (outcome,) = one.outcomes
        better = max(marks, key=marks.get) if marks["source"] != marks["edit"] else ""
        assert outcome.chosen == (f"{one.source.id}/{better}" if better else "")


def test_a_critic_that_cannot_judge_an_edit_costs_that_record_only(tmp_path):
    class Shy(Grader):
        def one(self, image):
            is_edit = number_of(image) not in sources
            return Fault("parse_error", "no JSON", "?") if is_edit and number_of(image) % 3 == 0 else super().one(image)

    sources = {number_of(picture(index)) for index in range(24)}
    run = CurationRun(curate(voted(tmp_path), components=fakes(critic=Shy())))
    found = [one.scores for one in histories(run) if isinstance(one.edit, Edit)]
    faults = [one for one in found if isinstance(one, Fault)]
    assert 0 < len(faults) < len(found)
    assert {one.kind for one in faults} == {"parse_error"}
    assert status_of(run.store.address).dropped["score_fault"] == len(faults)


def test_the_same_judge_does_not_filter_and_evaluate():
    rules = DecideConfig(rewards={"critic": 0.0})
    with pytest.raises(ValueError, match="'critic' filters, and 'shapes' evaluates, which is the same judge"):
        check_filters(rules, "shapes", "shapes")
    check_filters(rules, "shapes", "server")
    check_filters(rules, "shapes-clip", "shapes")


@pytest.mark.parametrize(("name", "checkpoint"), [("clip-score", CLIP_CHECKPOINT), ("pick-score", PICK_CHECKPOINT)])
def test_a_judge_is_the_same_with_and_without_the_name_of_its_checkpoint(name, checkpoint):
    for filtering, evaluation in ((name, f"{name}:{checkpoint}"), (f"{name}:{checkpoint}", name)):
        with pytest.raises(InputError, match="which is the same judge"):
            check_filters(DecideConfig(rewards={filtering: 0.0}), evaluation, "shapes")
    check_filters(DecideConfig(rewards={name: 0.0}), f"{name}:another/one", "shapes")


def candidate(record, kind, a, b=0.0):
    return Candidate(record, kind, {"a": a, "b": b})


def judged(record, source, edit=None):
    known = {} if edit is not None else {"instructions": None, "edit": None}
    return scored(record, {"a": source, "b": 0.0}, None if edit is None else {"a": edit, "b": 0.0}, **known)


RULES = DecideConfig(rewards={"a": 0.2}, orderings="prompt")


def couples(records, rules=RULES):
    return [(one.chosen, one.rejected) for one in outcomes_of_siblings(records, rules) if one.chosen]


def test_the_best_is_paired_with_the_worst_and_no_image_is_used_twice():
    records = [judged("1", 0.5), judged("2", 0.1, 0.8), judged("3", 0.9), judged("4", 0.8), judged("5", 0.2)]
    assert couples(records) == [("3/source", "2/source"), ("4/source", "5/source")]
    assert len(outcomes_of_siblings(records, RULES)) == 2  # the one in the middle is not compared with itself


def test_a_couple_that_does_not_differ_enough_is_dropped_for_a_reason_and_one_without_scores_is_none():
    (dropped,) = outcomes_of_siblings([judged("1", 0.5), judged("2", 0.4)], RULES)
    assert (dropped.chosen, dropped.reason) == ("", "small_margin")
    assert outcomes_of_siblings([scored("1"), judged("2", 0.1)], RULES) == []


def test_a_preferred_image_must_be_good_not_only_better():
    rules = replace(RULES, min_chosen={"a": 0.8})
    assert couples([judged("1", 0.7), judged("2", 0.1)], rules) == []
    assert couples([judged("1", 0.8), judged("2", 0.1)], rules) == [("1/source", "2/source")]
    worse = compare(candidate("1", "source", 0.1), candidate("1", "edit", 0.7), rules)
    assert (worse.chosen, worse.reason) == ("", "not_good")
    spoilt = compare(
        candidate("1", "source", 0.9), candidate("1", "edit", 0.2), replace(rules, policy="both_directions")
    )
    assert (spoilt.chosen, spoilt.reason) == ("1/source", None)
    with pytest.raises(ValueError, match=r"min_chosen names 'b', which is not among decide.rewards \(a\)"):
        check_rules(replace(RULES, min_chosen={"b": 1.0}))
    with pytest.raises(ValueError, match="policy 'always_edit', which orders no siblings"):
        check_rules(replace(RULES, policy="always_edit"))


def by_prompt(output, shards="", prompts=6):
    return CurateConfig(
        output=str(output),
        source=SourceConfig(images_per_prompt=3, limit=prompts, num_steps=3, batch_size=1),  # equal to the last bit
        decide=DecideConfig(rewards={"critic": 1.0, BRIGHTNESS: 0.0}, agreement=False, orderings="prompt"),
        evaluation="",
        shard=7,
        shards=shards,
        progress=False,
    )


def test_a_run_orders_the_images_of_a_prompt_alone_and_in_two_processes(tmp_path):
    run = CurationRun(curate(by_prompt(tmp_path / "one"), components=fakes(critic=Grader())))
    pairs = list(pairs_of(run))
    assert len(pairs) >= 6
    assert {pair.details["label_source"] for pair in pairs} == {"reward:critic"}
    sides = [(pair.details["chosen_is"], pair.details["rejected_is"]) for pair in pairs]
    assert set(sides) == {("source", "source"), ("edit", "source")}
    siblings = [pair for pair, kinds in zip(pairs, sides, strict=True) if kinds == ("source", "source")]
    assert len(siblings) <= 6  # three images of each of six prompts make one couple
    assert all("critique" in pair.details and "edit_instruction" not in pair.details for pair in siblings)
    for pair in pairs:
        assert pair.chosen_score >= pair.rejected_score + 1
    every = {one.source.id: one.source.caption for one in histories(run)}
    for one in histories(run):
        for outcome in one.outcomes:
            assert every[outcome.first.partition("/")[0]] == every[outcome.second.partition("/")[0]]
    calls = [
        lambda shards=shards: curate(by_prompt(tmp_path / "two", shards), components=fakes(critic=Grader()))
        for shards in ("0/2", "1/2")
    ]
    assert in_child(*calls) == [0, 0]
    assert lines_of(tmp_path / "two") == lines_of(tmp_path / "one")


@pytest.mark.slow
def test_more_prompts_may_be_asked_for_later(tmp_path):
    curate(by_prompt(tmp_path / "run", prompts=2), components=fakes(critic=Grader()))
    curate(by_prompt(tmp_path / "run", prompts=4), resume=True, components=fakes(critic=Grader()))
    curate(by_prompt(tmp_path / "whole", prompts=4), components=fakes(critic=Grader()))
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_only_generated_images_are_ordered_by_prompt(tmp_path):
    base = config_of(tmp_path / "run", image_folder(tmp_path / "images", 2))
    with pytest.raises(ValueError, match="orderings is 'prompt', and source.kind 'folder'; expected images"):
        curate(replace(base, decide=replace(base.decide, orderings="prompt")), components=fakes())
