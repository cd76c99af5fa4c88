"""Selection takes one of the images that `generate` draws, the one that it should, at the price that it says."""

import dataclasses

import pytest
import torch

from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.sampling.sample import generate
from rpo.sampling.select import How, best_of_n, by_drafts, corrected
from rpo.sampling.stepwise import by_pruning
from tests.tiny import tiny_sd

PROMPTS = ("a red circle", "two dogs", "a house")
N = 4
HOW = How(num_steps=5, guidance_scale=2.0, eta=1.0, seed=3)


@pytest.fixture(scope="module")
def model():
    return Checkpoint(tiny_sd())


@pytest.fixture(scope="module")
def every(model):
    """All candidates as `generate` draws them, [prompts, N, …]."""
    images = generate(model, PROMPTS, seed=3, images_per_prompt=N, num_steps=5, guidance_scale=2.0, eta=1.0)
    return images.unflatten(0, (len(PROMPTS), N))


def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2))


class Asked:
    """A judge that keeps what it was asked about."""

    def __init__(self, judge=redness):
        self.judge, self.images, self.prompts = judge, [], []

    def __call__(self, images, prompts):
        self.images.append(images)
        self.prompts += prompts
        return self.judge(images, prompts)


def counted(model, call):
    """What the call gives, and how many latents went through the denoiser."""
    seen = []
    handle = model.denoiser.register_forward_hook(lambda network, args, output: seen.append(len(args[0])))
    try:
        return call(), sum(seen)
    finally:
        handle.remove()


def assert_chosen_is_drawn(found, every):
    rows = torch.arange(len(PROMPTS))
    torch.testing.assert_close(found.images, every[rows, found.chosen], atol=1e-4, rtol=0)


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


def test_pruning_goes_on_with_the_paths_that_it_began(model, every):
    judge = Asked()
    found, evaluations = counted(model, lambda: by_pruning(model, PROMPTS, judge, N, HOW, stages={2: 3, 4: 2}))
    assert_chosen_is_drawn(found, every)
    assert found.evaluations == evaluations == len(PROMPTS) * (2 * 4 + 2 * 3 + 1 * 2) * 2
    assert found.judged == len(judge.prompts) == len(PROMPTS) * (4 + 3 + 2)


def test_pruning_drops_what_is_about_to_become_worse(model):
    judge = Asked()
    found = by_pruning(model, PROMPTS, judge, N, HOW, stages={5 - 1: 1})
    told = redness(judge.images[0], []).view(len(PROMPTS), N)
    assert torch.equal(found.chosen, told.argmax(dim=1))
    torch.testing.assert_close(found.scores, told.amax(dim=1))


def test_pruning_in_small_batches_chooses_the_same(model):
    whole, parts = (
        by_pruning(model, PROMPTS, redness, N, dataclasses.replace(HOW, batch_size=size), stages={2: 2})
        for size in (None, 3)
    )
    assert torch.equal(whole.chosen, parts.chosen)
    torch.testing.assert_close(whole.images, parts.images, atol=1e-4, rtol=0)


def test_of_equals_the_first_is_taken(model):
    def says_nothing(images, prompts):
        return torch.zeros(len(images))

    for call in (
        lambda: best_of_n(model, PROMPTS, says_nothing, N, HOW),
        lambda: by_pruning(model, PROMPTS, says_nothing, N, HOW, stages={2: 2}),
    ):
        assert call().chosen.tolist() == [0, 0, 0]


@pytest.mark.parametrize("stages", [{}, {0: 2}, {5: 2}, {2: 4}, {2: 0}, {3: 2, 2: 1}, {2: 2, 3: 3}])
def test_stages_that_cannot_be_are_refused(model, stages):
    with pytest.raises(InputError, match="stages are"):
        by_pruning(model, PROMPTS, redness, N, HOW, stages=stages)


def test_numbers_that_cannot_be_are_refused(model):
    with pytest.raises(InputError, match="n is 1"):
        best_of_n(model, PROMPTS, redness, 1, HOW)
    with pytest.raises(InputError, match="draft_steps is 6; expected 1 to 5"):
        by_drafts(model, PROMPTS, redness, N, HOW, draft_steps=6)
    with pytest.raises(InputError, match="dpm_solver"):
        by_pruning(model, PROMPTS, redness, N, dataclasses.replace(HOW, solver="dpm_solver", eta=0.0), stages={2: 2})


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
