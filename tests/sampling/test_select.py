"""Selection takes one of the images that `generate` draws, the one that it should, at the price that it says."""

import dataclasses

import pytest
import torch

from rpo.errors import InputError
from rpo.sampling.select import best_of_n, by_drafts, corrected
from tests.sampling.choices import HOW, PROMPTS, Asked, N, assert_chosen_is_drawn, counted, redness


@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_best_of_n_is_the_best_of_n(model, every, batch_size):
    how, judge = dataclasses.replace(HOW, batch_size=batch_size), Asked()
    found, evaluations = counted(model, lambda: best_of_n(model, PROMPTS, judge, N, how))
    scores = redness(every.flatten(0, 1), []).view(len(PROMPTS), N)
    assert torch.equal(found.chosen, scores.argmax(dim=1))
    torch.testing.assert_close(found.scores, scores.amax(dim=1), atol=1e-4, rtol=0)
    assert_chosen_is_drawn(found, every)
    assert found.evaluations == evaluations == len(PROMPTS) * N * 5 * 2
    assert found.judged == len(judge.prompts) == len(PROMPTS) * N
    assert judge.prompts == [prompt for prompt in PROMPTS for _ in range(N)]


@pytest.mark.parametrize("rendered", [1, 2])
def test_drafts_choose_what_is_rendered_in_full(model, every, rendered):
    judge = Asked()
    found, evaluations = counted(
        model, lambda: by_drafts(model, PROMPTS, judge, N, HOW, draft_steps=2, rendered=rendered)
    )
    assert_chosen_is_drawn(found, every)
    drafts = judge.judge(judge.images[0], []).view(len(PROMPTS), N)
    best = drafts.topk(rendered, dim=1).indices
    rows = torch.arange(len(PROMPTS))
    full = redness(every.flatten(0, 1), []).view(len(PROMPTS), N).gather(1, best)
    assert torch.equal(found.chosen, best[rows, full.argmax(dim=1)])
    assert found.evaluations == evaluations == len(PROMPTS) * (N * 2 + rendered * 5) * 2
    assert found.judged == len(judge.prompts)


def test_of_equals_the_first_is_taken(model):
    def says_nothing(images, prompts):
        return torch.zeros(len(images))

    assert best_of_n(model, PROMPTS, says_nothing, N, HOW).chosen.tolist() == [0, 0, 0]


def test_numbers_that_cannot_be_are_refused(model):
    with pytest.raises(InputError, match="n is 1"):
        best_of_n(model, PROMPTS, redness, 1, HOW)
    with pytest.raises(InputError, match="draft_steps is 6; expected 1 to 5"):
        by_drafts(model, PROMPTS, redness, N, HOW, draft_steps=6)


def test_a_correction_is_kept_where_it_is_better():
    images = torch.full((3, 3, 4, 4), 0.5)

    def correct(given, prompts, number):
        changed = given.clone()
        changed[0, 0] += 0.1  # better in every round
        changed[1, 1] += 0.1  # worse
        return changed

    found = corrected(images, PROMPTS, correct, redness, rounds=2)
    assert found.is_corrected.tolist() == [True, False, False]
    torch.testing.assert_close(found.scores, torch.tensor([0.2, 0.0, 0.0]))
    torch.testing.assert_close(found.images[0, 0], torch.full((4, 4), 0.7))
    assert torch.equal(found.images[1:], images[1:]) and torch.equal(images, torch.full((3, 3, 4, 4), 0.5))
