"""The critic: exact at the data end, honest about its gradient, and able to learn a value that is known."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from rpo.trainers.value.estimator import Critic
from rpo.trainers.value.inputs import ValuePoints, skip_weights
from rpo.trainers.value.network import ValueNetwork

DESIGNS = ["cos_sin", "cos", "linear"]
SHAPE, TOKENS, DIM = (4, 8, 8), 5, 12


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points_at(time, *, shape=SHAPE, seed=0):
    count = len(time)
    return ValuePoints(
        randn(count, *shape, seed=seed),
        randn(count, *shape, seed=seed + 1),
        time,
        randn(count, TOKENS, DIM, seed=seed + 2),
        tuple(f"prompt {row}" for row in range(count)),
    )


class Opinion(nn.Module):
    """An F that is never 0, to see where it counts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.37))

    def forward(self, points):
        return self.weight * (1 + points.x_t.mean((1, 2, 3)) + points.x0_hat.mean((1, 2, 3)))


class Linear(nn.Module):
    """F = a x + b t + c, for what has a solution in closed form."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1)
        nn.init.zeros_(self.line.weight)
        nn.init.zeros_(self.line.bias)

    def forward(self, points):
        return self.line(torch.stack([points.x_t.flatten(), points.time], dim=1)).squeeze(1)


def brightness(x_0, prompts):
    return 3 * x_0.mean((1, 2, 3)) - 40.123


@pytest.mark.parametrize("design", DESIGNS)
def test_at_the_data_end_the_value_is_the_reward_bit_for_bit(design):
    points = points_at(torch.zeros(6))
    critic = Critic(Opinion(), design=design, terminal=brightness)
    critic.fit(points_at(torch.rand(64)), randn(64) * 7 - 300, steps=3, batch_size=32)
    assert torch.equal(critic(points), brightness(points.x0_hat, points.prompts))


@pytest.mark.parametrize("design", DESIGNS)
def test_at_the_noise_end_it_is_the_learnt_part(design):
    points = points_at(torch.ones(6))
    network = Opinion()
    assert torch.allclose(Critic(network, design=design, terminal=brightness)(points), network(points), atol=1e-5)


@pytest.mark.parametrize("design", [*DESIGNS, "none"])
def test_a_constant_reward_is_no_work_for_the_learnt_part(design):
    """F = 0 is then right at every time, also where c_skip + c_out is not 1."""
    points = points_at(torch.linspace(0, 1, 9))
    terminal = None if design == "none" else lambda x_0, prompts: torch.full((len(x_0),), -40.0)
    critic = Critic(ValueNetwork(SHAPE, DIM), design=design, terminal=terminal)
    critic.fit(points, torch.full((9,), -40.0), steps=0, batch_size=4)
    assert critic(points).tolist() == pytest.approx([-40.0] * 9)


def test_skip_weights_are_those_of_the_paper_s_code():
    time = torch.tensor([0.0, 0.5, 1.0])
    half = math.sqrt(0.5)
    expected = {
        "cos_sin": ([1, half, 0], [0, half, 1]),
        "cos": ([1, half, 0], [0, 1 - half, 1]),
        "linear": ([1, 0.5, 0], [0, 0.5, 1]),
        "none": ([0, 0, 0], [1, 1, 1]),
    }
    for design, weights in expected.items():
        for found, wanted in zip(skip_weights(design, time), weights, strict=True):
            assert found.tolist() == pytest.approx(wanted, abs=1e-7)


def gradients(branch, *, network=None):
    points = points_at(torch.full((3,), 0.5))
    points.x_t.requires_grad_()
    points.x0_hat.requires_grad_()
    critic = Critic(network or Opinion(), design="cos_sin", terminal=brightness, branch=branch)
    return torch.autograd.grad(critic(points).sum(), (points.x_t, points.x0_hat))


def test_differentiable_branch_passes_its_gradient_to_x0_hat_and_frozen_does_not():
    """V = √½ (3 mean(x0_hat) + 0.37 (mean(x_t) + mean(x0_hat))) + constants, whose slopes are known."""
    dims, half = 4 * 8 * 8, math.sqrt(0.5)
    for branch, slope in (("frozen", 0.37 * half), ("differentiable", (3 + 0.37) * half)):
        by_x_t, by_x0_hat = gradients(branch)
        assert torch.allclose(by_x_t, torch.full_like(by_x_t, 0.37 * half / dims))
        assert torch.allclose(by_x0_hat, torch.full_like(by_x0_hat, slope / dims))


def test_a_reward_without_gradient_cannot_be_the_differentiable_branch():
    points = points_at(torch.full((3,), 0.5))
    critic = Critic(Opinion(), design="cos", terminal=lambda x, _: brightness(x.detach(), _), branch="differentiable")
    assert critic(points).isfinite().all()  # nobody asks for a gradient
    points.x0_hat.requires_grad_()
    with pytest.raises(ValueError, match="without a gradient, but branch is 'differentiable'; use a reward that"):
        critic(points)


def test_the_reward_is_asked_once_per_point_and_not_again_by_evaluating_or_fitting():
    asked = []

    def terminal(x_0, prompts):
        asked.extend(prompts)
        return brightness(x_0, prompts)

    points = points_at(torch.rand(10))
    critic = Critic(Opinion(), design="linear", terminal=terminal)
    plain = critic.evaluate(points, batch_size=4)
    asked.clear()
    known = critic.ask_reward(points, batch_size=4)
    assert asked == list(points.prompts)
    assert torch.equal(critic.evaluate(known, batch_size=3), plain)
    critic.fit(known, randn(10), steps=5, batch_size=4)
    assert asked == list(points.prompts)


@pytest.mark.parametrize(("design", "terminal"), [("cos_sin", None), ("none", brightness)])
def test_a_design_needs_its_reward_and_none_has_none(design, terminal):
    with pytest.raises(ValueError, match=rf"design is '{design}' with (no|a) reward of clean latents; give `terminal`"):
        Critic(Opinion(), design=design, terminal=terminal)


@pytest.mark.parametrize(("shape", "inputs"), [((1, 1, 1), "both"), ((4, 8, 8), "x0_hat"), ((4, 9, 6), "x_t")])
def test_network_starts_at_zero_and_sees_what_it_is_told_to(shape, inputs):
    network = ValueNetwork(shape, DIM, inputs=inputs, channels=16)
    points = points_at(torch.rand(7), shape=shape)
    assert network(points).tolist() == [0] * 7
    nn.init.normal_(network.latents.head.weight, generator=torch.Generator().manual_seed(1))
    points.x_t.requires_grad_()
    points.x0_hat.requires_grad_()
    points.tokens.requires_grad_()
    network(points).sum().backward()
    assert (points.x_t.grad is not None) == (inputs != "x0_hat")
    assert (points.x0_hat.grad is not None) == (inputs != "x_t")
    assert (points.tokens.grad != 0).any()


def test_network_has_stable_diffusion_s_size_in_half_precision_embeddings():
    network = ValueNetwork((4, 64, 64), 768, channels=16)
    points = ValuePoints(randn(2, 4, 64, 64), randn(2, 4, 64, 64), torch.rand(2), randn(2, 77, 768).half(), ("a", "b"))
    assert network(points).shape == (2,)


def test_network_tells_the_order_of_tokens_that_know_their_place_apart():
    """As CLIP's do; the same words in another order must be able to mean another value."""
    network = ValueNetwork(SHAPE, DIM, channels=16)
    nn.init.normal_(network.latents.head.weight, generator=torch.Generator().manual_seed(1))
    points = points_at(torch.full((1,), 0.5))
    words, places = randn(1, TOKENS, DIM, seed=5), randn(1, TOKENS, DIM, seed=6)
    forth, back = (copy.copy(points) for _ in range(2))
    object.__setattr__(forth, "tokens", words + places)
    object.__setattr__(back, "tokens", words.flip(1) + places)
    assert (network(forth) - network(back)).abs().item() > 1e-3


def test_same_seed_same_network_and_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    first, again, other = (ValueNetwork(SHAPE, DIM, channels=16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.latents.stem.weight, again.latents.stem.weight)
    assert not torch.equal(first.latents.stem.weight, other.latents.stem.weight)


def known_value(points):
    """The expectation of a linear reward, which flattens towards the noise end."""
    return 50 + 3 * points.x_t.flatten() * (1 - 0.5 * points.time)


def uniform(count, seed):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def test_learns_a_known_linear_value():
    train, unseen = (points_at(uniform(count, count), shape=(1, 1, 1), seed=count) for count in (8_000, 500))
    critic = Critic(ValueNetwork((1, 1, 1), DIM, inputs="x_t", channels=32), learning_rate=3e-3)
    critic.fit(train, known_value(train), steps=500, batch_size=128)
    truth = known_value(unseen)
    assert (critic(unseen) - truth).norm() < 0.02 * (truth - truth.mean()).norm()


STEPS, COST = 8, 0.1


def walks(count=512, seed=0):
    """Random walks of variance 1 whose reward is where they end and whose steps cost 0.1: V(t, x) = x - 0.8 t."""
    x = torch.cat([torch.zeros(1, count), (randn(STEPS, count, seed=seed) / STEPS**0.5).cumsum(0)])
    time = torch.linspace(1, 0, STEPS + 1)[:, None].expand_as(x)
    flat = x.view(-1, 1, 1, 1)
    nodes = ValuePoints(flat, flat, time.flatten(), torch.zeros(len(flat), 1, 1), ("",) * len(flat))
    return nodes, x[-1], torch.full((STEPS, count), COST)


def fit_walks(critic, *, steps, seed=0, **settings):
    nodes, rewards, costs = walks(seed=seed)
    values = critic.evaluate(nodes, batch_size=1000).view(STEPS + 1, -1)
    values = torch.cat([values[:-1], rewards[None]])
    return critic.fit_paths(nodes, values, costs, steps=steps, batch_size=512, **settings)


@pytest.mark.parametrize("loss", ["monte_carlo", "td0", "martingale"])
def test_every_loss_learns_the_value_of_a_walk_with_costs(loss):
    critic = Critic(Linear(), learning_rate=0.02)
    fit_walks(critic, steps=500, loss=loss, trace=0.7)
    nodes, _, _ = walks(seed=1)
    truth = nodes.x_t.flatten() - STEPS * COST * nodes.time
    assert (critic(nodes) - truth).norm() < 0.1 * truth.norm()


def test_martingale_runs_from_td0_to_monte_carlo():
    fitted = {}
    for loss, trace in (
        ("td0", 0.7),
        ("martingale", 0.0),
        ("martingale", 0.7),
        ("martingale", 1.0),
        ("monte_carlo", 0),
    ):
        critic = Critic(Linear(), learning_rate=0.02)
        fit_walks(critic, steps=30, loss=loss, trace=trace)
        fitted[loss, trace] = critic.network.line.weight.tolist()
    assert fitted["td0", 0.7] == fitted["martingale", 0.0]
    assert fitted["martingale", 1.0] == fitted["monte_carlo", 0]
    assert len({str(weights) for weights in fitted.values()}) == 3


def test_reports_how_good_the_value_was_before_it_saw_the_returns():
    critic = Critic(Linear(), learning_rate=0.02)
    first = fit_walks(critic, steps=500, loss="monte_carlo", trace=1.0)
    assert first["value/explained_variance"].item() == pytest.approx(0, abs=1e-6)
    second = fit_walks(critic, steps=1, seed=1, loss="martingale", trace=0.3)  # held against the ends all the same
    # What the walk has covered by time t of its variance 1 can be foreseen: 1 - t, in bins of one, two, two and
    # three nodes: those at t = 0 are the rewards themselves and not counted.
    for index, expected in enumerate([7 / 8, 11 / 16, 7 / 16, 1 / 8]):
        found = second[f"value/explained_variance_{index + 1}"].item()
        assert found == pytest.approx(expected, abs=0.08)
    assert second["value/loss"].item() == pytest.approx((STEPS + 1) / 2 / STEPS, rel=0.15)
    assert second["value/loss"] < first["value/loss"]


def test_a_part_of_the_process_without_nodes_is_not_a_number():
    metrics = Critic(Opinion()).fit(points_at(torch.full((4,), 0.3)), randn(4), steps=0, batch_size=4)
    assert [metrics[f"value/explained_variance_{index}"].isnan().item() for index in (1, 2, 3, 4)] == [1, 0, 1, 1]


def test_resumed_from_a_file_it_ends_in_the_same_weights_bit_for_bit():
    points, targets = points_at(torch.rand(40)), randn(40) * 5 + 100

    def fresh(seed):
        return Critic(ValueNetwork(SHAPE, DIM, channels=16, seed=seed), learning_rate=1e-2, seed=7)

    whole, killed, resumed = fresh(0), fresh(0), fresh(1)
    for critic in (whole, killed):
        critic.fit(points, targets, steps=5, batch_size=16)
    file = io.BytesIO()
    torch.save(killed.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for critic in (whole, resumed):
        torch.manual_seed(id(critic))  # the global generator must not matter
        critic.fit(points, -targets, steps=5, batch_size=16)
    assert torch.equal(whole(points), resumed(points))
    assert (whole(points) - killed(points)).abs().max() > 0


def test_the_order_of_points_follows_the_seed():
    points, targets = points_at(torch.rand(40)), randn(40)
    critics = [Critic(Opinion(), seed=seed) for seed in (0, 0, 1)]
    for critic in critics:
        critic.fit(points, targets, steps=3, batch_size=8)
    weights = [critic.network.weight.item() for critic in critics]
    assert weights[0] == weights[1] != weights[2]


class Watching(Opinion):
    """Remembers which points it was fitted to."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, points):
        if torch.is_grad_enabled():
            self.seen.extend(points.prompts)
        return super().forward(points)


def test_every_pass_of_every_fit_visits_each_point_once_in_another_order():
    network = Watching()
    critic, points = Critic(network), points_at(torch.rand(12))
    for _ in range(2):
        critic.fit(points, randn(12), steps=6, batch_size=4)
    passes = [tuple(network.seen[start : start + 12]) for start in range(0, 48, 12)]
    assert {frozenset(order) for order in passes} == {frozenset(points.prompts)}
    assert len(set(passes)) == 4


def test_every_step_descends_the_mean_over_its_points_also_of_a_short_last_one():
    network, mirror = Watching(), Opinion()
    critic, points, targets = Critic(network), points_at(torch.rand(12)), randn(12) * 3 - 5
    critic.fit(points, targets, steps=3, batch_size=8)
    mean, unit, optimizer = targets.mean(), targets.std(correction=0), torch.optim.AdamW(mirror.parameters(), lr=1e-3)
    for start, end in ((0, 8), (8, 12), (12, 20)):
        rows = torch.tensor([points.prompts.index(prompt) for prompt in network.seen[start:end]])
        optimizer.zero_grad()
        (0.5 * ((mean + unit * mirror(points.select(rows)) - targets[rows]) / unit) ** 2).mean().backward()
        nn.utils.clip_grad_norm_(mirror.parameters(), 1.0)
        optimizer.step()
    assert network.weight.item() == pytest.approx(mirror.weight.item(), abs=1e-6)


class Told(nn.Module):
    """F = what it is told of the reward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, points):
        return self.weight * points.x0_reward


def test_beyond_its_time_the_reward_is_neither_asked_nor_told():
    asked = []

    def terminal(x_0, prompts):
        asked.extend(prompts)
        return brightness(x_0, prompts)

    critic = Critic(Told(), design="linear", terminal=terminal, reward_until=0.5)
    critic.fit(points_at(torch.rand(16)), randn(16) * 3 - 20, steps=0, batch_size=8)
    points = replace(points_at(torch.tensor([0.25, 0.5, 0.75])), baseline=torch.tensor([1.0, 2.0, 3.0]))
    asked.clear()
    values, said = critic(points), brightness(points.x0_hat, points.prompts)
    assert asked == ["prompt 0", "prompt 1"]
    expected = (1 - points.time) * said + points.time * (points.baseline + said - critic.state_dict()["mean"])
    assert values[:2].tolist() == pytest.approx(expected[:2].tolist(), rel=1e-5)
    assert values[2].item() == pytest.approx(3.0)


@pytest.mark.parametrize(("scale", "shift"), [(8.0, 0.0), (1.0, -40.0), (0.1, 5.0)])
def test_neither_the_unit_nor_the_origin_of_a_reward_changes_what_is_learnt(scale, shift):
    """V of scale r + shift is scale V + shift, so that a learning rate means the same for every reward."""

    def learnt(scale, shift):
        points = replace(points_at(torch.linspace(0, 1, 32)), baseline=scale * randn(32, seed=8) + shift)
        critic = Critic(
            ValueNetwork(SHAPE, DIM, channels=16),
            design="cos_sin",
            terminal=lambda x_0, _: scale * 5 * x_0.mean((1, 2, 3)) + shift,
            reward_until=0.5,
            learning_rate=1e-2,
        )
        critic.fit(points, scale * randn(32, seed=9) + shift, steps=12, batch_size=12)
        return (critic(points) - shift) / scale

    assert torch.allclose(learnt(scale, shift), learnt(1.0, 0.0), atol=0.01)


def test_fitting_works_inside_no_grad_and_leaves_no_gradient_behind():
    critic = Critic(Opinion())
    with torch.no_grad():
        critic.fit(points_at(torch.rand(8)), randn(8), steps=2, batch_size=8)
    assert critic.network.weight.item() != pytest.approx(0.37, abs=1e-6)
    assert critic.network.weight.grad is None


def test_equal_first_rewards_do_not_set_the_unit():
    critic, points = Critic(Opinion()), points_at(torch.rand(16))
    critic.fit(points, torch.full((16,), 0.1), steps=1, batch_size=16)
    assert critic.state_dict()["std"] == 0
    critic.fit(points, 100 * randn(16), steps=1, batch_size=16)
    assert critic.state_dict()["std"] == pytest.approx((100 * randn(16)).std(correction=0).item())


def test_returns_must_be_finite():
    with pytest.raises(ValueError, match="1 of 3 returns are not finite, .*; look at the rewards and at the costs"):
        Critic(Opinion()).fit(points_at(torch.rand(3)), torch.tensor([0, math.inf, 1]), steps=1, batch_size=3)


def test_network_s_width_must_divide_into_heads():
    with pytest.raises(ValueError, match="channels is 20, but groups and heads need a multiple of 8; 64 is usual"):
        ValueNetwork(SHAPE, DIM, channels=20)


def test_selected_points_are_in_the_order_asked_for():
    points = points_at(torch.rand(4))
    some = points.select(torch.tensor([2, 0]))
    assert some.prompts == ("prompt 2", "prompt 0")
    assert torch.equal(some.x0_hat, points.x0_hat[[2, 0]])
    assert torch.equal(some.time, points.time[[2, 0]])
