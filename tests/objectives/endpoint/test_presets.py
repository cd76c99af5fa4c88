"""Every preset has the gradient of the loss that its authors publish, written out here in double precision."""

from dataclasses import replace

import pytest
import torch

from rpo.errors import InputError
from rpo.objectives.advantages import group_normalize
from rpo.objectives.endpoint.awm import Awm
from rpo.objectives.endpoint.dgpo import Dgpo
from rpo.objectives.endpoint.nft import Nft
from rpo.objectives.endpoint.par import Par
from rpo.objectives.endpoint.ram import Ram
from rpo.objectives.endpoint.rebel import Rebel
from rpo.objectives.endpoint.rvm import Rvm
from rpo.objectives.endpoint.update import LagConfig, Moments, descend, group_means
from rpo.process.diffusion import diffusion_of
from rpo.process.prediction import add_noise, from_x0_eps, to_x0_eps, x0_slope
from rpo.types import Node

GROUPS, IMAGES = 3, 4
KINDS = ("epsilon", "flow", "v_prediction")
PRESETS = (
    Nft(),
    Nft(beta=0.1),
    Awm(),
    Awm(old_weight=0),
    Awm(clip=0.1),
    Awm(clip=1e-5, old_weight=0),
    Ram(),
    Rvm(reference_weight=0.3),
    Par(),
    Dgpo(beta=3),
    Dgpo(beta=3, clip=0.1),
    Dgpo(beta=3, clip=1e-3, reference_weight=0),
    Rebel(),
)


class Problem:
    """A linear network on few pixels, whose old self and reference are elsewhere, at noised images."""

    def __init__(self, kind, preset):
        self.kind, self.preset = kind, preset
        draw = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        count = GROUPS * IMAGES
        self.group = torch.arange(count) // IMAGES
        self.x_0, eps = normal(count, 1, 2, 3), normal(count, 1, 2, 3)
        time = 0.1 + 0.8 * torch.rand(count, generator=draw, dtype=torch.float64)
        if preset.times.shared:
            time, eps = time[self.group * IMAGES], eps[self.group * IMAGES]
        sigma = time[:, None, None, None]
        alpha = 1 - sigma if kind == "flow" else (1 - sigma**2).sqrt()
        self.t, self.time = Node(alpha, sigma, sigma), time
        self.x_t = add_noise(self.x_0, eps, self.t)
        self.target = from_x0_eps(self.x_0, eps, self.t, kind)
        self.weight = normal(6, 6).requires_grad_()
        self.of = {"old": normal(6, 6), "reference": normal(6, 6), "current": self.weight.detach().clone()}
        self.of["old"] = self.weight.detach() + 0.2 * self.of["old"]
        self.rewards = normal(count)

    def says(self, weight):
        return (self.x_t.flatten(1) @ weight).view_as(self.x_t)

    def x0(self, prediction):
        return to_x0_eps(prediction, self.x_t, self.t, self.kind)[0]

    @property
    def advantage(self):
        return self.preset.ranked(group_normalize(self.rewards, self.group, scale=self.preset.ranked.scale))

    def gradient(self):
        said = {name: self.says(self.of[name]) for name in self.preset.needs}
        errors = {name: mean((one - self.target) ** 2) for name, one in said.items()}
        worth = self.preset.worth(self.advantage, errors, self.group)
        moments = Moments(
            self.says(self.weight), self.target, self.x_t, self.t, self.time, worth, diffusion_of(self.kind), said
        )
        surrogate, _ = descend(moments, self.preset.terms(moments))
        return torch.autograd.grad(surrogate.mean(), self.weight)[0]


def mean(values):
    return values.flatten(1).mean(dim=1)


def published(one):  # noqa: C901, PLR0911, one for each preset
    """The loss of each image, as the papers or their authors' code have it."""
    now, preset, target = one.says(one.weight), one.preset, one.target
    old, base = one.says(one.of["old"]), one.says(one.of["reference"])
    error, old_error, base_error = (mean((said - target) ** 2) for said in (now, old, base))
    from_base = mean((now - base) ** 2)
    match preset:
        case Nft(beta=beta):
            q = (one.advantage.clamp(-1, 1) + 1) / 2
            plus, minus = (1 - beta) * old + beta * now, (1 + beta) * old - beta * now
            losses = []
            for branch in (plus, minus):
                gap = one.x0(branch) - one.x_0
                far = mean(gap.abs()).detach().clamp(min=1e-5)
                losses.append(mean(gap**2) / far)
            return 5 * (q * losses[0] + (1 - q) * losses[1]) / beta + preset.reference_weight * from_base
        case Awm(clip=clip):
            p, small = 0.25, 1e-10
            likelihood, before = (-(one.time / p) * ((each + small) ** p - small**p) for each in (error, old_error))
            held = preset.old_weight * mean((now - old) ** 2) + preset.reference_weight * from_base
            if clip is None:
                return -one.advantage * torch.exp(likelihood - likelihood.detach()) + held
            ratio = torch.exp(likelihood - before)
            return torch.maximum(-one.advantage * ratio, -one.advantage * ratio.clamp(1 - clip, 1 + clip)) + held
        case Ram():
            return mean((now - (base + one.advantage[:, None, None, None] * (target - now)).detach()) ** 2)
        case Rvm():
            return one.advantage * error + preset.reference_weight * from_base
        case Par():
            gap, old_gap = one.x0(now) - one.x_0, one.x0(old) - one.x_0
            likelihood = -mean(gap**2) / mean(gap.abs()).detach()
            gain = likelihood + mean(old_gap**2) / mean(old_gap.abs())
            return 0.5 * gain.detach().exp() * (one.advantage - gain) ** 2 + preset.reference_weight * from_base
        case Dgpo(beta=beta, clip=clip):
            lost = one.advantage * (error.detach() - base_error)
            total = torch.stack([lost[one.group == group].mean() for group in one.group])
            if clip is not None:  # as the authors' code does it: by a mask
                ratio = torch.exp(old_error - error)
                is_over = torch.where(one.advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
                error = torch.where(is_over, error.detach(), error)
            return torch.sigmoid(beta * total) * one.advantage * error + preset.reference_weight * from_base
        case Rebel(eta=eta):
            left = eta * (old_error - error) - one.advantage
            pairs = [
                torch.stack([0.5 * (left[i] - left[j]) ** 2 for j in range(len(left)) if j // IMAGES == i // IMAGES])
                for i in range(len(left))
            ]
            return torch.stack([some.sum() / (IMAGES - 1) for some in pairs])
    raise AssertionError(preset)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_the_gradient_is_that_of_the_published_loss(preset, kind):
    one = Problem(kind, preset)
    (expected,) = torch.autograd.grad(published(one).mean(), one.weight)
    found = one.gradient()
    assert expected.norm() > 1e-3
    assert (found - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("preset", [Awm(clip=0.1), Dgpo(beta=3, clip=0.1)], ids=str)
def test_a_clip_holds_some_images_and_not_others(preset):
    one, plain = (Problem("flow", each) for each in (preset, replace(preset, clip=None)))
    worth = one.preset.worth(one.advantage, {"current": mean(one.x_0), "reference": mean(one.x_0)}, one.group)
    said = {name: one.says(one.of[name]) for name in one.preset.needs}
    now = one.says(one.weight).detach()
    moments = Moments(now, one.target, one.x_t, one.t, one.time, worth, diffusion_of(one.kind), said)
    pull = one.preset.terms(moments).pull
    assert 0 < (pull == 0).sum() < len(pull)
    told = descend(moments, one.preset.terms(moments))[1]["policy/clipped"]
    assert told.item() == pytest.approx((pull == 0).double().mean().item())
    assert (plain.preset.terms(moments).pull != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_pepg_has_the_gradient_of_par(kind):
    one = Problem(kind, Par(reference_weight=0))
    now, old = one.says(one.weight), one.says(one.of["old"])
    gap, old_gap = one.x0(now) - one.x_0, one.x0(old) - one.x_0
    likelihood = -mean(gap**2) / mean(gap.abs()).detach()
    gain = (likelihood + mean(old_gap**2) / mean(old_gap.abs())).detach()
    pepg = -gain.exp() * (one.advantage - gain) * likelihood
    (expected,) = torch.autograd.grad(pepg.mean(), one.weight)
    assert torch.allclose(one.gradient(), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_nft_without_its_weights_is_one_regression_from_the_old_policy(kind):
    """Where all distances are equal: towards v_old + (2q - 1)/β (v* - v_old), the oracle of the paper's appendix."""
    one = Problem(kind, Nft(beta=0.7, reference_weight=0))
    now, old = one.says(one.weight), one.says(one.of["old"])
    q = (one.advantage + 1) / 2
    plus, minus = old + 0.7 * (now - old), old - 0.7 * (now - old)
    unweighted = q * mean((plus - one.target) ** 2) + (1 - q) * mean((minus - one.target) ** 2)
    sign = (2 * q - 1)[:, None, None, None]
    regression = mean((0.7 * (now - old) - sign * (one.target - old)) ** 2)
    (found,) = torch.autograd.grad(unweighted.mean(), one.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(regression.mean(), one.weight)
    assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(("preset", "strength"), [(Rvm(), 2), (Ram(), 2), (Rebel(), 4)])
def test_the_first_step_climbs_the_reward_as_far_as_the_image_is_open(preset, strength):
    """The closed form for x_0 ~ N(0, s²), the reward x_0 and a policy that is exact.

    Given x_t, x_0 is normal with variance s²σ² / (α²s² + σ²), and v* = (x_t - x_0) / σ, so that the mean of
    a (v - v*) is a/A times Cov(A, -v* | x_t): a step down moves x̂_0 = x_t - σ v by the variance that is left.
    """
    spread, sigma, count = 1.5, 0.6, 400_000
    alpha, draw = 1 - sigma, torch.Generator().manual_seed(0)
    left = (spread * sigma) ** 2 / ((alpha * spread) ** 2 + sigma**2)
    x_t = torch.full((count, 1, 1, 1), 0.4, dtype=torch.float64)
    mean_x0 = 0.4 * alpha * left / sigma**2
    x_0 = mean_x0 + left**0.5 * torch.randn(count, 1, 1, 1, generator=draw, dtype=torch.float64)
    node = torch.full_like(x_t, sigma)
    said = ((x_t - mean_x0) / sigma).requires_grad_()
    target, group = (x_t - x_0) / sigma, torch.zeros(count, dtype=torch.long)
    still = dict.fromkeys(preset.needs, said.detach())
    errors = {name: mean((one - target) ** 2) for name, one in still.items()}
    # Of the reward itself: how authors scale it is another matter.
    worth = preset.worth(x_0.flatten() - mean_x0, errors, group)
    moments = Moments(said, target, x_t, Node(1 - node, node, node), node.flatten(), worth, diffusion_of("flow"), still)
    surrogate, _ = descend(moments, preset.terms(moments))
    (gradient,) = torch.autograd.grad(surrogate.sum(), said)
    assert (sigma * gradient.mean()).item() == pytest.approx(strength * left, rel=0.02)


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_equal_rewards_pull_nothing_where_the_policy_is_its_old_self(preset):
    """Then all advantages are 0: what is left is what holds to old policy and reference, and those are here, too."""
    one = Problem("flow", preset)
    one.rewards = torch.ones_like(one.rewards)
    one.of = dict.fromkeys(one.of, one.weight.detach())
    gradient = one.gradient()
    # NFT's two branches stand against each other with equal weight, whose distances are then the same.
    assert gradient.norm() < 1e-9


def test_an_old_policy_follows_ever_more_slowly_up_to_its_decay():
    lag = LagConfig(decay=0.3, rise=0.1)
    assert [lag.at(update) for update in (1, 2, 3, 4)] == pytest.approx([0.1, 0.2, 0.3, 0.3])


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_what_does_not_count_is_in_no_size_that_is_logged(preset):
    one = Problem("flow", preset)
    rows = torch.arange(GROUPS * IMAGES) % IMAGES != 1
    errors = {name: mean((one.says(one.of[name]) - one.target) ** 2) for name in preset.needs}
    worth = preset.worth(one.advantage, errors, one.group)

    def sizes(kept, counts):
        node = Node(*(each[kept] for each in (one.t.alpha, one.t.sigma, one.t.timestep)))
        said = {name: one.says(one.of[name])[kept] for name in preset.needs}
        given = one.says(one.weight)[kept], one.target[kept], one.x_t[kept], node, one.time[kept], worth[kept]
        moments = Moments(*given, diffusion_of(one.kind), said, counts=counts)
        facts = descend(moments, preset.terms(moments))[1]
        return [facts["policy/pull"].item(), facts["policy/hold"].item()]

    every = torch.ones_like(rows)
    assert sizes(every, rows * (IMAGES / (IMAGES - 1))) == pytest.approx(sizes(rows, 1.0))
    assert sizes(every, rows.new_ones(len(rows)).double()) == sizes(every, 1.0)


@pytest.mark.parametrize("words", [{"old_weight": 0}, {}])
def test_an_old_policy_that_nobody_asks_cannot_be_told_how_to_follow(words):
    kind = Awm if words else Dgpo
    with pytest.raises(InputError, match="objective.old says how .* leave it out"):
        kind(old=LagConfig(decay=0.9), **words)
    for asked in ({"clip": 0.1}, {"old_weight": 1.0} if words else {"old_draws_after": 3}):
        assert kind(old=LagConfig(decay=0.9), **words | asked).lag == LagConfig(decay=0.9)


def test_means_over_groups_know_labels_in_any_order():
    means, sizes = group_means(torch.tensor([1.0, 5.0, 3.0, 7.0]), torch.tensor([4, 0, 4, 0]))
    assert (means.tolist(), sizes.tolist()) == ([2.0, 6.0, 2.0, 6.0], [2, 2, 2, 2])


@pytest.mark.parametrize("kind", [*KINDS, "sample"])
def test_the_slope_of_x0_is_that_of_its_conversion(kind):
    one = Problem("flow" if kind == "flow" else "epsilon", Rvm())
    gap = torch.ones_like(one.x_t)
    moved = to_x0_eps(one.target + gap, one.x_t, one.t, kind)[0] - to_x0_eps(one.target, one.x_t, one.t, kind)[0]
    assert torch.allclose(moved.abs(), x0_slope(one.t, kind).expand_as(gap), rtol=1e-9)
