"""On the way the right images are dropped, the others go on with their paths, and the price is what was said."""

import dataclasses

import pytest
import torch

from rpo.errors import InputError
from rpo.sampling.select import best_of_n
from rpo.sampling.stepwise import Assessment, by_potential, by_pruning
from tests.sampling.choices import HOW, PROMPTS, Asked, N, assert_chosen_is_drawn, counted, redness

STEPS = HOW.num_steps


class Judge(Asked):
    """A judge on the way whose potential is a function of redness; it keeps what it was asked at which time."""

    def __init__(self, clear=1.0, potential=lambda red: (0.5 + red).clamp(0, 1)):
        super().__init__()
        self.clear, self.potential, self.times = clear, potential, []

    def assess(self, images, prompts, time):
        self.times.append((time, len(images)))
        return Assessment(torch.full((len(images),), self.clear), self.potential(redness(images, prompts)))


def test_pruning_goes_on_with_the_paths_that_it_began(model, every):
    judge = Asked()
    found, evaluations = counted(model, lambda: by_pruning(model, PROMPTS, judge, N, HOW, stages={2: 3, 4: 2}))
    assert_chosen_is_drawn(found, every)
    assert found.evaluations == evaluations == len(PROMPTS) * (2 * 4 + 2 * 3 + 1 * 2) * 2
    assert found.judged == len(judge.prompts) == len(PROMPTS) * (4 + 3 + 2)


def test_pruning_drops_what_is_about_to_become_worse(model):
    judge = Asked()
    found = by_pruning(model, PROMPTS, judge, N, HOW, stages={STEPS - 1: 1})
    told = redness(judge.images[0], []).view(len(PROMPTS), N)
    assert torch.equal(found.chosen, told.argmax(dim=1))
    torch.testing.assert_close(found.scores, told.amax(dim=1))


def test_on_the_way_a_judge_of_potential_is_asked_for_it(model):
    judge = Judge(potential=lambda red: (0.5 - red).clamp(0, 1))  # the least red
    found = by_pruning(model, PROMPTS, judge, N, HOW, stages={STEPS - 1: 1})
    least = by_pruning(model, PROMPTS, lambda *given: -redness(*given), N, HOW, stages={STEPS - 1: 1})
    assert torch.equal(found.chosen, least.chosen) and judge.prompts == []


def test_pruning_in_small_batches_chooses_the_same(model):
    whole, parts = (
        by_pruning(model, PROMPTS, redness, N, dataclasses.replace(HOW, batch_size=size), stages={2: 2})
        for size in (None, 3)
    )
    assert torch.equal(whole.chosen, parts.chosen)
    torch.testing.assert_close(whole.images, parts.images, atol=1e-4, rtol=0)


def test_of_equals_the_first_goes_on(model):
    nothing = lambda images, prompts: torch.zeros(len(images))  # noqa: E731
    assert by_pruning(model, PROMPTS, nothing, N, HOW, stages={2: 2}).chosen.tolist() == [0, 0, 0]


@pytest.mark.parametrize("judge", [Judge(clear=0.7), Judge(potential=torch.ones_like)], ids=["unclear", "promising"])
def test_what_is_not_clear_or_has_potential_goes_on(model, every, judge):
    found, evaluations = counted(model, lambda: by_potential(model, PROMPTS, judge, N, HOW, looks=[2, 4]))
    assert torch.equal(found.chosen, best_of_n(model, PROMPTS, redness, N, HOW).chosen)
    assert_chosen_is_drawn(found, every)
    assert found.evaluations == evaluations == len(PROMPTS) * N * STEPS * 2
    assert found.judged == len(PROMPTS) * N * 3
    grid = model.grid(STEPS)
    assert judge.times == [(float(grid.timestep[step]) / 1000, len(PROMPTS) * N) for step in (1, 3)]


def test_of_what_is_clear_and_has_none_the_best_alone_goes_on(model, every):
    judge = Judge(potential=lambda red: red.clamp(0, 0.49))
    found, evaluations = counted(model, lambda: by_potential(model, PROMPTS, judge, N, HOW, looks=[4]))
    pruned = by_pruning(model, PROMPTS, redness, N, HOW, stages={4: 1})
    assert torch.equal(found.chosen, pruned.chosen) and torch.allclose(found.images, pruned.images, atol=1e-5)
    assert found.evaluations == evaluations == pruned.evaluations
    assert judge.prompts == [], "an image that is alone has nobody to be compared with"
    assert_chosen_is_drawn(found, every)


def test_prompts_may_keep_different_numbers(model, every):
    """The line between potential and none is drawn so that of all images the better half go on."""
    seen = []
    watching = Judge(potential=lambda red: seen.append(red) or torch.ones_like(red))
    by_potential(model, PROMPTS, watching, N, HOW, looks=[3])
    red = seen[0]
    middle = red.median()
    halving = Judge(potential=lambda given: (given > middle).float())
    found, evaluations = counted(model, lambda: by_potential(model, PROMPTS, halving, N, HOW, looks=[3]))
    left = (red > middle).view(len(PROMPTS), N).sum(dim=1).clamp(min=1)
    assert len(set(left.tolist())) > 1, "else this tells nothing"
    assert found.evaluations == evaluations == 2 * (len(PROMPTS) * N * 3 + int(left.sum()) * (STEPS - 3))
    assert found.judged == len(PROMPTS) * N + int(left[left > 1].sum())
    assert_chosen_is_drawn(found, every)


@pytest.mark.parametrize("looks", [[], [0], [STEPS], [3, 2], [2, 2]])
def test_looks_that_cannot_be_are_refused(model, looks):
    with pytest.raises(InputError, match="looks are"):
        by_potential(model, PROMPTS, Judge(), N, HOW, looks=looks)


@pytest.mark.parametrize("stages", [{}, {0: 2}, {5: 2}, {2: 4}, {2: 0}, {3: 2, 2: 1}, {2: 2, 3: 3}])
def test_stages_that_cannot_be_are_refused(model, stages):
    with pytest.raises(InputError, match="stages are"):
        by_pruning(model, PROMPTS, redness, N, HOW, stages=stages)


def test_what_cannot_be_chosen_by_is_refused(model):
    with pytest.raises(InputError, match="dpm_solver"):
        by_pruning(model, PROMPTS, redness, N, dataclasses.replace(HOW, solver="dpm_solver", eta=0.0), stages={2: 2})
    with pytest.raises(InputError, match="expected numbers in"):
        by_potential(model, PROMPTS, Judge(potential=lambda red: red * torch.nan), N, HOW, looks=[2])
