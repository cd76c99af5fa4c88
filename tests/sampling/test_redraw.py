"""What is masked is drawn again, the rest stays as it is, and it costs the steps that are left for so many masks."""

import pytest
import torch

from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.process.categorical import TOKENS, Unmasking
from rpo.sampling.redraw import Remasking, redraw
from rpo.sampling.sample import generate, image_generator, sample
from rpo.sampling.select import How
from tests.sampling.choices import PROMPTS, counted
from tests.tiny import tiny_sd
from tests.tiny_amused import CODES, tiny_amused

HOW = How(num_steps=5, guidance_scale=2.0, seed=3)


@pytest.fixture(scope="module")
def tokens():
    return Checkpoint(tiny_amused())


@pytest.fixture(scope="module")
def grids():
    codes = torch.randint(CODES, (len(PROMPTS), 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    return torch.cat([codes, codes, torch.zeros_like(codes)], dim=1)


def places_of(*counts):
    order = torch.rand(len(counts), 64, generator=torch.Generator().manual_seed(1)).argsort(dim=1).argsort(dim=1)
    return (order < torch.tensor(counts)[:, None]).view(-1, 8, 8)


def test_what_is_not_masked_stays_and_no_mask_is_left(tokens, grids):
    places = places_of(3, 20, 60)
    found, evaluations = counted(tokens, lambda: redraw(tokens, grids, places, PROMPTS, HOW)[0])
    assert torch.equal(found[:, TOKENS][~places], grids[:, TOKENS][~places])
    assert (found[:, TOKENS] >= 0).all()
    assert (found[:, TOKENS][places] != grids[:, TOKENS][places]).any()
    # An image enters where no more than its own share is masked: at sin(pi t / 2) of t = 1, 0.8, 0.6, 0.4, 0.2.
    steps = [
        sum(torch.sin(torch.pi / 2 * t) <= count / 64 for t in tokens.grid(5).timestep[:5] / 1000)
        for count in (3, 20, 60)
    ]
    assert steps[0] == 0, "so few masks that the last step alone is left"
    assert evaluations == 2 * sum(max(1, step) for step in steps)
    assert redraw(tokens, grids, places, PROMPTS, HOW)[1] == evaluations


def test_a_whole_grid_is_drawn_as_the_sampler_draws_it(tokens, grids):
    found, evaluations = redraw(tokens, grids, torch.ones(3, 8, 8, dtype=torch.bool), PROMPTS, HOW)
    generators = [image_generator(3, row, 0) for row in range(3)]
    drawn = sample(
        tokens,
        tokens.encode_prompts(PROMPTS),
        tokens.grid(5),
        Unmasking(),
        guidance_scale=2.0,
        generators=generators,
    )
    assert torch.equal(found[:, TOKENS], drawn.x_0[:, TOKENS])
    assert evaluations == 3 * 5 * 2


def test_images_without_fault_stay_and_the_others_change_where_they_are_at_fault(tokens):
    images = generate(tokens, PROMPTS, seed=3, num_steps=5, guidance_scale=2.0)
    faults = torch.zeros(3, 64, 64, dtype=torch.bool)
    faults[1, :20, 30:40] = True
    correct = Remasking(tokens, lambda images, prompts: faults, HOW)
    found, evaluations = counted(tokens, lambda: correct(images, PROMPTS, 0))
    assert torch.equal(found[[0, 2]], images[[0, 2]]) and not torch.equal(found[1], images[1])
    assert (correct.redrawn, correct.evaluations) == (1, evaluations)
    again, other = (Remasking(tokens, lambda images, prompts: faults, HOW)(images, PROMPTS, turn) for turn in (0, 1))
    assert torch.equal(again, found) and not torch.equal(other, found)


def test_a_fault_smaller_than_a_token_is_one(tokens):
    faults = torch.zeros(3, 64, 64, dtype=torch.bool)
    faults[0, 17, 33] = True
    correct = Remasking(tokens, lambda images, prompts: faults, HOW)
    correct(torch.rand(3, 3, 64, 64), PROMPTS, 0)
    assert (correct.redrawn, correct.evaluations) == (1, 2)


def test_latents_are_left_to_an_editor():
    with pytest.raises(InputError, match="tokens can be masked"):
        Remasking(Checkpoint(tiny_sd()), lambda images, prompts: images[:, 0] > 0, HOW)
