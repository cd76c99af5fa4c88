"""Steps of a masked-token generator, against everything that can happen on a grid of four tokens."""

import itertools
import math
from collections import Counter

import pytest
import torch
from diffusers import AmusedScheduler

from rpo.errors import InputError
from rpo.models.schedules import MaskingSchedule
from rpo.process.categorical import MASK, NUM_TRAIN_TIMESTEPS, MaskedDiffusion, MaskingProcess, Unmasking, is_masked
from rpo.process.prediction import from_x0_eps, to_x0_eps, x0_slope
from rpo.types import Node

PLACES, CODES = 4, 3
DIFFUSION = MaskedDiffusion()
ALL, SOME = (MASK,) * PLACES, (MASK, 1, MASK, MASK)


def node(time, sigma):
    return Node(*(torch.tensor(value, dtype=torch.float64) for value in (1 - sigma, sigma, time * NUM_TRAIN_TIMESTEPS)))


def state(tokens, drawn=None, rank=None):
    channels = [tokens, tokens if drawn is None else drawn, (0,) * PLACES if rank is None else rank]
    return torch.tensor(channels, dtype=torch.float64).view(1, 3, 2, 2)


def logits(seed=0, rows=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, CODES, 2, 2, generator=generator, dtype=torch.float64).mul(1.5)


def law(seen, *, kernel=None, sigma=0.5, output=None):
    return DIFFUSION.transition(
        logits() if output is None else output, state(seen), node(0.75, 0.9), node(0.5, sigma), kernel or Unmasking(0.5)
    )


def outcomes(seen, kept):
    """Every choice of tokens at the masked places, with every order of those that are kept where not all are."""
    masked = [place for place in range(PLACES) if seen[place] == MASK]
    for tokens in itertools.product(range(CODES), repeat=len(masked)):
        drawn = list(seen)
        for place, token in zip(masked, tokens, strict=True):
            drawn[place] = token
        orders = itertools.permutations(masked, kept) if kept < len(masked) else [masked]
        for order in orders:
            after = [drawn[place] if seen[place] != MASK or place in order else MASK for place in range(PLACES)]
            rest = [place for place in masked if place not in order]
            ranks = {place: rank for rank, place in enumerate([*order, *rest])}
            yield state(after, drawn, [ranks.get(place, PLACES) for place in range(PLACES)])


def chances(seen, kept, **given):
    found = Counter()
    for after in outcomes(seen, kept):
        found[tuple(after[0, 0].flatten().int().tolist())] += law(seen, **given).log_prob(after).exp().item()
    return found


@pytest.mark.parametrize(("seen", "kept"), [(ALL, 2), (SOME, 1)])
def test_tokens_and_their_order_are_all_that_can_happen(seen, kept):
    assert law(seen).kept.item() == kept
    assert sum(chances(seen, kept).values()) == pytest.approx(1)


@pytest.mark.parametrize("order", ["policy", "reference"])
@pytest.mark.parametrize(("seen", "kept"), [(ALL, 2), (SOME, 1), (SOME, 3)])
def test_a_state_is_drawn_as_often_as_its_likelihood_says(seen, kept, order):
    sigma, many = (0.0 if kept == 3 else 0.5), 100_000
    kernel = Unmasking(0.5, order, None if order == "policy" else lambda x_t, t: logits(1).expand(len(x_t), -1, -1, -1))
    noise = torch.randn(many, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = DIFFUSION.transition(
        logits().expand(many, -1, -1, -1),
        state(seen).expand(many, -1, -1, -1),
        node(0.75, 0.9),
        node(0.5, sigma),
        kernel,
    )
    drawn = rows.sample(noise)
    assert (is_masked(drawn).sum(dim=1) == is_masked(state(seen)).sum() - kept).all()
    seen_often = Counter(tuple(one) for one in drawn[:, 0].flatten(1).int().tolist())
    if order == "policy":
        expected = chances(seen, kept, sigma=sigma)
    else:  # of the places that the reference chose
        sets = Counter(tuple(token == MASK for token in one) for one in seen_often.elements())
        expected = {
            one: law(seen, kernel=kernel, sigma=sigma).log_prob(state(one)).exp().item()
            * sets[tuple(token == MASK for token in one)]
            / many
            for one in seen_often
        }
    for tokens, chance in expected.items():
        assert seen_often[tokens] / many == pytest.approx(chance, abs=5 * math.sqrt(chance / many) + 1e-9)


def test_states_are_drawn_as_often_as_by_diffusers():
    scheduler = AmusedScheduler(mask_token_id=CODES)
    scheduler.set_timesteps(4, temperature=(2, 0))
    many, step = 100_000, 1
    grid = MaskingSchedule(scheduler).grid(4, PLACES)
    before = torch.tensor([CODES if token == MASK else token for token in SOME]).expand(many, -1)
    generator = torch.Generator().manual_seed(0)
    output = logits().float().flatten(2).transpose(1, 2).expand(many, -1, -1)
    drawn = scheduler.step(output, scheduler.timesteps[step], before, generator=generator).prev_sample
    often = Counter(tuple(MASK if token == CODES else token for token in one) for one in drawn.tolist())
    transition = DIFFUSION.transition(logits().float(), state(SOME).float(), grid[step], grid[step + 1], Unmasking(1.0))
    found = Counter()
    for after in outcomes(SOME, transition.kept.item()):
        found[tuple(after[0, 0].flatten().int().tolist())] += transition.log_prob(after.float()).exp().item()
    assert set(often) <= set(found)
    for tokens, chance in found.items():
        assert often[tokens] / many == pytest.approx(chance, abs=5 * math.sqrt(chance / many) + 1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_steps", [1, 3, 8, 12])
def test_as_many_tokens_stay_masked_as_in_diffusers(schedule, num_steps):
    scheduler = AmusedScheduler(mask_token_id=CODES, masking_schedule=schedule)
    scheduler.set_timesteps(num_steps)
    grid, places = MaskingSchedule(scheduler).grid(num_steps, 64), 64
    theirs = torch.full((1, places), CODES)
    ours = DIFFUSION.start(torch.zeros(1, 3, 8, 8))
    for step, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(torch.zeros(1, places, CODES), timestep, theirs).prev_sample
        law = DIFFUSION.transition(torch.zeros(1, CODES, 8, 8), ours, grid[step], grid[step + 1], Unmasking())
        ours = law.sample(torch.randn(1, 3, 8, 8))
        assert is_masked(ours).sum() == (theirs == CODES).sum()
    assert not is_masked(ours).any()


def test_an_order_without_noise_has_no_likelihood_but_where_all_are_kept():
    kernel = Unmasking(0.0)
    assert not kernel.has_density
    assert law(ALL, kernel=kernel).log_prob(next(outcomes(ALL, 2))).isnan().all()
    assert law(ALL, kernel=kernel, sigma=0.0).log_prob(next(outcomes(ALL, 4))).isfinite().all()


def test_the_kl_is_that_of_the_tokens():
    mine, theirs = law(SOME), law(SOME, output=logits(1))
    by_hand = 0.0
    p, q = (one.log_probs.exp().flatten(2)[0] for one in (mine, theirs))
    for place in (0, 2, 3):
        by_hand += sum(p[token, place] * (p[token, place] / q[token, place]).log() for token in range(CODES))
    assert mine.kl(theirs).item() == pytest.approx(float(by_hand))
    output = logits().float().requires_grad_()
    at_itself = law(SOME, output=output).kl(law(SOME, output=output.detach()))
    (slope,) = torch.autograd.grad(at_itself.sum(), output)
    assert at_itself.item() == 0 and not slope.any()


def test_kl_from_who_knows_the_tokens_is_their_surprise():
    known = DIFFUSION.target(state((0, 1, 2, 0)), torch.zeros(1, 3, 2, 2), node(0.5, 0.5))
    surprise = -law(SOME).log_probs.flatten(2)[0, [0, 2, 0], [0, 2, 3]].sum()
    assert law(SOME, output=known).kl(law(SOME)).item() == pytest.approx(surprise.item())


def test_half_the_gradient_of_the_error_is_the_gap():
    x_t, target = state(SOME).expand(2, -1, -1, -1), state((0, 1, 2, 2))[:, :1].expand(2, -1, -1, -1)
    output = logits(rows=2).requires_grad_()
    for other in (target, logits(1, rows=2)):
        (slope,) = torch.autograd.grad(DIFFUSION.error(output, other, x_t).sum(), output)
        assert torch.allclose(slope / 2, DIFFUSION.gap(output, other, x_t) / 3, atol=1e-7)
    surrogate = DIFFUSION.mean(DIFFUSION.gap(output, target, x_t).detach() * output, x_t).sum()
    (slope,) = torch.autograd.grad(surrogate, output)
    (wanted,) = torch.autograd.grad(DIFFUSION.error(output, target, x_t).sum() / 2, output)
    assert torch.allclose(slope, wanted, atol=1e-7)


def test_an_error_counts_masked_places_alone_by_their_weight():
    x_t, target = state(SOME), state((0, 1, 2, 2))[:, :1]
    said = logits().log_softmax(dim=1).flatten(2)[0]
    by_place = -2 * said[[0, 1, 2, 2], [0, 1, 2, 3]]
    assert DIFFUSION.error(logits(), target, x_t).item() == pytest.approx(by_place[[0, 2, 3]].mean().item(), rel=1e-6)
    weight = torch.tensor([1.0, 5.0, 0.0, 2.0]).view(1, 1, 2, 2)
    found = DIFFUSION.error(logits(), target, x_t, weight, reduction="sum").item()
    assert found == pytest.approx((by_place[0] + 2 * by_place[3]).item(), rel=1e-6)


def test_masks_are_as_many_as_asked_and_those_of_a_later_moment_are_among_them():
    x_0 = torch.randint(0, CODES, (5, 1, 4, 4)).repeat(1, 3, 1, 1).float()
    noise = torch.randn(5, 3, 4, 4)
    late, early, clean = (DIFFUSION.noised(x_0, noise, node(0.5, sigma)) for sigma in (0.7, 0.3, 0.0))
    assert [is_masked(one).sum(dim=1).tolist() for one in (late, early, clean)] == [[11] * 5, [5] * 5, [0] * 5]
    assert not (is_masked(early) & ~is_masked(late)).any()
    assert torch.equal(clean[:, 0], x_0[:, 0])
    assert is_masked(DIFFUSION.noised(x_0, noise, node(0.001, 0.001))).sum(dim=1).tolist() == [1] * 5


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_process_goes_from_masks_to_tokens(schedule):
    process, times = MaskingProcess(schedule), torch.linspace(0, 0.9, 10, dtype=torch.float64).requires_grad_()
    assert (process.alpha(times) + process.sigma(times)).allclose(torch.ones(10, dtype=torch.float64))
    (slope,) = torch.autograd.grad(process.alpha(times).log().sum(), times)
    assert torch.allclose(process.drift(times), slope)
    with pytest.raises(InputError):
        process.diffusion(times)


def test_noise_far_out_draws_no_token_that_cannot_be():
    """Where float32 has no number between 0 and the chance of what lies below."""
    output = torch.tensor([-60.0, 0.0, 1.0]).view(1, CODES, 1, 1).expand(1, CODES, 2, 2)
    noise = torch.full((1, 3, 2, 2), -6.0)
    law = DIFFUSION.transition(output, state(ALL).float(), node(0.75, 0.9), node(0.5, 0.0), Unmasking())
    assert law.sample(noise)[:, 0].unique().tolist() == [1]
    assert law.sample(-noise)[:, 0].unique().tolist() == [2]


def test_logits_are_no_view_of_latents():
    x = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    for ask in (
        lambda: to_x0_eps(x, x, node(0.5, 0.5), "logits"),
        lambda: from_x0_eps(x, x, node(0.5, 0.5), "logits"),
        lambda: x0_slope(node(0.5, 0.5), "logits"),
    ):
        with pytest.raises(InputError, match="logits"):
            ask()
