import numpy as np
import pytest

from rpo.reports.html import Report, render
from rpo.shapes.evaluate import held_out_prompts, judge_images, usual_sampling
from rpo.shapes.report import SHOWN, result_sections, summary
from tests.shapes.test_evaluate import blank, right_images

SAMPLING = usual_sampling(seed=0, images_per_prompt=4)


@pytest.fixture(scope="module")
def two():
    """Of 32 in-domain images 20 were wrong, of which 15 are fixed, and one broke; out of domain two changed places."""
    asked = held_out_prompts(8, seed=0)
    images = right_images(asked, SAMPLING)
    wrong = [i for i in range(32) if i % 4 < 2] + [2, 6, 10, 14]
    before = blank(images, [*wrong, 40])
    after = blank(images, [0, 4, 8, 16, 24, 30, 50])
    return judge_images(before, asked, SAMPLING), judge_images(after, asked, SAMPLING)


def test_the_numbers_are_those_of_the_images(two):
    numbers, pairs, table = result_sections(*two)
    inside, outside = numbers.rows
    assert (inside.name, outside.name) == ("In-domain prompts", "Out-of-domain prompts")
    assert (inside.before.value, inside.after.value) == (12 / 32, 26 / 32)
    assert inside.gain.value == pytest.approx(14 / 32) and inside.gain.is_above_zero
    assert (outside.before.value, outside.after.value, outside.gain.value) == (31 / 32, 31 / 32, 0)
    assert [group.title for group in table.groups] == ["In-domain", "Out-of-domain"]
    assert all(sum(row.num_images for row in group.rows) == 32 for group in table.groups)


def test_examples_are_of_the_outcome_they_stand_under_and_counted(two):
    before, after = two
    _, pairs, _ = result_sections(*two)
    assert {group.outcome: group.total for group in pairs.groups} == {
        **{"fixed": 16, "broken": 2, "still holds": 41, "still fails": 5},
    }
    for group in pairs.groups:
        assert len(group.pairs) == min(SHOWN[group.outcome], group.total)
        for pair in group.pairs:
            held = (pair.before.holds, pair.after.holds)
            assert held == {"fixed": (False, True), "broken": (True, False), "still holds": (True, True)}.get(
                group.outcome, (False, False)
            )
            index = next(
                i
                for i in range(64)
                if (before.images[i] == pair.before.pixels).all()
                and (after.images[i] == pair.after.pixels).all()
                and before.texts[i] == pair.prompt
            )
            assert pair.before.reason == before.verdicts[index].reason
            assert pair.after.reason == after.verdicts[index].reason
    assert "from all 64 images" in pairs.selection and "seed 0" in pairs.selection


def test_the_summary_says_no_more_than_the_intervals(two):
    text = summary(*two).replace("\N{NO-BREAK SPACE}", " ")
    assert text == (
        "On in-domain prompts, the share of images that show what was asked for rose from 37.5 % to 81.2 %. "
        "On out-of-domain prompts, it did not change significantly (from 96.9 % to 96.9 %)."
    )
    assert "asked for fell from 81.2 % to 37.5 %." in summary(*reversed(two)).replace("\N{NO-BREAK SPACE}", " ")


def test_the_sections_make_a_page(two):
    page = render(Report("t", summary(*two), result_sections(*two)))
    assert "+43.8 points" in page and "fixed <b>16</b>" in page
    assert page.count('class="pixels"') == 2 * sum(min(SHOWN[o], n) for o, n in
        {"fixed": 16, "broken": 2, "still holds": 41, "still fails": 5}.items())  # fmt: skip


def test_another_seed_shows_other_examples(two):
    shown = [
        [
            pair.prompt + str(np.sum(pair.before.pixels))
            for group in result_sections(*two, seed=seed)[1].groups
            for pair in group.pairs
        ]
        for seed in (0, 1)
    ]
    assert shown[0] != shown[1]
