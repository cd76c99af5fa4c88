"""The value: exact at the data end, honest about its gradient, and able to learn a value that is known."""

import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from rpo.trainers.value.estimator import ValueEstimator
from rpo.trainers.value.inputs import ValuePoints, skip_weights
from rpo.trainers.value.network import ValueNetwork

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


def test_at_the_data_end_the_value_is_the_reward_bit_for_bit():
    points = points_at(torch.zeros(6))
    value = ValueEstimator(Opinion(), terminal=brightness)
    value.fit(points_at(torch.rand(64)), randn(64) * 7 - 300, steps=3, batch_size=32)
    assert torch.equal(value(points), brightness(points.x0_hat, points.prompts))


def test_at_the_noise_end_it_is_the_learnt_part():
    points = points_at(torch.ones(6))
    network = Opinion()
    assert torch.allclose(ValueEstimator(network, terminal=brightness)(points), network(points), atol=1e-5)


@pytest.mark.parametrize("has_reward", [True, False])
def test_a_constant_reward_is_no_work_for_the_learnt_part(has_reward):
    """F = 0 is then right at every time, also where c_skip + c_out is not 1."""
    points = points_at(torch.linspace(0, 1, 9))
    terminal = (lambda x_0, prompts: torch.full((len(x_0),), -40.0)) if has_reward else None
    value = ValueEstimator(ValueNetwork(SHAPE, DIM), terminal=terminal)
    value.fit(points, torch.full((9,), -40.0), steps=0, batch_size=4)
    assert value(points).tolist() == pytest.approx([-40.0] * 9)


def test_skip_weights_are_those_of_the_paper_s_code():
    time = torch.tensor([0.0, 0.5, 1.0])
    half = math.sqrt(0.5)
    for found, wanted in zip(skip_weights(time), ([1, half, 0], [0, half, 1]), strict=True):
        assert found.tolist() == pytest.approx(wanted, abs=1e-7)


def gradients(is_differentiable):
    points = points_at(torch.full((3,), 0.5))
    points.x_t.requires_grad_()
    points.x0_hat.requires_grad_()
    value = ValueEstimator(Opinion(), terminal=brightness, is_differentiable=is_differentiable)
    return torch.autograd.grad(value(points).sum(), (points.x_t, points.x0_hat))


def test_the_reward_of_x0_hat_is_differentiated_only_if_asked_for():
    """V = √½ (3 mean(x0_hat) + 0.37 (mean(x_t) + mean(x0_hat))) + constants, whose slopes are known."""
    dims, half = 4 * 8 * 8, math.sqrt(0.5)
    for is_differentiable, slope in ((False, 0.37 * half), (True, (3 + 0.37) * half)):
        by_x_t, by_x0_hat = gradients(is_differentiable)
        assert torch.allclose(by_x_t, torch.full_like(by_x_t, 0.37 * half / dims))
        assert torch.allclose(by_x0_hat, torch.full_like(by_x0_hat, slope / dims))


def test_a_reward_without_gradient_cannot_be_differentiated():
    points = points_at(torch.full((3,), 0.5))
    value = ValueEstimator(Opinion(), terminal=lambda x, _: brightness(x.detach(), _), is_differentiable=True)
    assert value(points).isfinite().all()  # nobody asks for a gradient
    points.x0_hat.requires_grad_()
    with pytest.raises(ValueError, match="without a gradient"):
        value(points)


def test_the_reward_is_asked_once_per_point_and_not_again_by_evaluating_or_fitting():
    asked = []

    def terminal(x_0, prompts):
        asked.extend(prompts)
        return brightness(x_0, prompts)

    points = points_at(torch.rand(10))
    value = ValueEstimator(Opinion(), terminal=terminal)
    plain = value.evaluate(points, batch_size=4)
    asked.clear()
    known = value.ask_reward(points, batch_size=4)
    assert asked == list(points.prompts)
    assert torch.equal(value.evaluate(known, batch_size=3), plain)
    value.fit(known, randn(10), steps=5, batch_size=4)
    assert asked == list(points.prompts)


def known_value(points):
    """The expectation of a linear reward, which flattens towards the noise end."""
    return 50 + 3 * points.x_t.flatten() * (1 - 0.5 * points.time)


def uniform(count, seed):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_learns_a_known_linear_value():
    train, unseen = (points_at(uniform(count, count), shape=(1, 1, 1), seed=count) for count in (8_000, 500))
    value = ValueEstimator(ValueNetwork((1, 1, 1), DIM, channels=32), learning_rate=3e-3)
    value.fit(train, known_value(train), steps=500, batch_size=128)
    truth = known_value(unseen)
    assert (value(unseen) - truth).norm() < 0.02 * (truth - truth.mean()).norm()


STEPS, COST = 8, 0.1


def walks(count=512, seed=0):
    """Random walks of variance 1 whose reward is where they end and whose steps cost 0.1: V(t, x) = x - 0.8 t."""
    x = torch.cat([torch.zeros(1, count), (randn(STEPS, count, seed=seed) / STEPS**0.5).cumsum(0)])
    time = torch.linspace(1, 0, STEPS + 1)[:, None].expand_as(x)
    flat = x.view(-1, 1, 1, 1)
    nodes = ValuePoints(flat, flat, time.flatten(), torch.zeros(len(flat), 1, 1), ("",) * len(flat))
    return nodes, x[-1], torch.full((STEPS, count), COST)


def fit_walks(value, *, steps, seed=0, **settings):
    nodes, rewards, costs = walks(seed=seed)
    values = value.evaluate(nodes, batch_size=1000).view(STEPS + 1, -1)
    values = torch.cat([values[:-1], rewards[None]])
    return value.fit_paths(nodes, values, costs, steps=steps, batch_size=512, **settings)


@pytest.mark.parametrize("trace", [0.0, 0.7, 1.0])
def test_every_trace_learns_the_value_of_a_walk_with_costs(trace):
    value = ValueEstimator(Linear(), learning_rate=0.02)
    fit_walks(value, steps=500, trace=trace)
    nodes, _, _ = walks(seed=1)
    truth = nodes.x_t.flatten() - STEPS * COST * nodes.time
    assert (value(nodes) - truth).norm() < 0.1 * truth.norm()


def test_reports_how_good_the_value_was_before_it_saw_the_returns():
    value = ValueEstimator(Linear(), learning_rate=0.02)
    first = fit_walks(value, steps=500, trace=1.0)
    assert first["value/explained_variance"].item() == pytest.approx(0, abs=1e-6)
    second = fit_walks(value, steps=1, seed=1, trace=0.3)  # held against the ends all the same
    # What the walk has covered by time t of its variance 1 can be foreseen: 1 - t, in bins of one, two, two and
    # three nodes: those at t = 0 are the rewards themselves and not counted.
    for index, expected in enumerate([7 / 8, 11 / 16, 7 / 16, 1 / 8]):
        found = second[f"value/explained_variance_{index + 1}"].item()
        assert found == pytest.approx(expected, abs=0.08)
    assert second["value/loss"].item() == pytest.approx((STEPS + 1) / 2 / STEPS, rel=0.15)
    assert second["value/loss"] < first["value/loss"]


def test_a_part_of_the_process_without_nodes_is_not_a_number():
    metrics = ValueEstimator(Opinion()).fit(points_at(torch.full((4,), 0.3)), randn(4), steps=0, batch_size=4)
    assert [metrics[f"value/explained_variance_{index}"].isnan().item() for index in (1, 2, 3, 4)] == [1, 0, 1, 1]


def test_resumed_from_a_file_it_ends_in_the_same_weights_bit_for_bit():
    points, targets = points_at(torch.rand(40)), randn(40) * 5 + 100

    def fresh(seed):
        return ValueEstimator(ValueNetwork(SHAPE, DIM, channels=16, seed=seed), learning_rate=1e-2, seed=7)

    whole, killed, resumed = fresh(0), fresh(0), fresh(1)
    for value in (whole, killed):
        value.fit(points, targets, steps=5, batch_size=16)
    file = io.BytesIO()
    torch.save(killed.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for value in (whole, resumed):
        torch.manual_seed(id(value))  # the global generator must not matter
        value.fit(points, -targets, steps=5, batch_size=16)
    assert torch.equal(whole(points), resumed(points))
    assert (whole(points) - killed(points)).abs().max() > 0


def test_the_order_of_points_follows_the_seed():
    points, targets = points_at(torch.rand(40)), randn(40)
    values = [ValueEstimator(Opinion(), seed=seed) for seed in (0, 0, 1)]
    for value in values:
        value.fit(points, targets, steps=3, batch_size=8)
    weights = [value.network.weight.item() for value in values]
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
    value, points = ValueEstimator(network), points_at(torch.rand(12))
    for _ in range(2):
        value.fit(points, randn(12), steps=6, batch_size=4)
    passes = [tuple(network.seen[start : start + 12]) for start in range(0, 48, 12)]
    assert {frozenset(order) for order in passes} == {frozenset(points.prompts)}
    assert len(set(passes)) == 4


def test_every_step_descends_the_mean_over_its_points_also_of_a_short_last_one():
    network, mirror = Watching(), Opinion()
    value, points, targets = ValueEstimator(network), points_at(torch.rand(12)), randn(12) * 3 - 5
    value.fit(points, targets, steps=3, batch_size=8)
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

    value = ValueEstimator(Told(), terminal=terminal, reward_until=0.5)
    value.fit(points_at(torch.rand(16)), randn(16) * 3 - 20, steps=0, batch_size=8)
    points = replace(points_at(torch.tensor([0.25, 0.5, 0.75])), baseline=torch.tensor([1.0, 2.0, 3.0]))
    asked.clear()
    values, said = value(points), brightness(points.x0_hat, points.prompts)
    assert asked == ["prompt 0", "prompt 1"]
    skip, out = skip_weights(points.time)
    expected = skip * said + (1 - skip) * points.baseline + out * (said - value.state_dict()["mean"])
    assert values[:2].tolist() == pytest.approx(expected[:2].tolist(), rel=1e-5)
    assert values[2].item() == pytest.approx(3.0)


@pytest.mark.parametrize(("scale", "shift"), [(8.0, 0.0), (1.0, -40.0), (0.1, 5.0)])
def test_neither_the_unit_nor_the_origin_of_a_reward_changes_what_is_learnt(scale, shift):
    """V of scale r + shift is scale V + shift, so that a learning rate means the same for every reward."""

    def learnt(scale, shift):
        points = replace(points_at(torch.linspace(0, 1, 32)), baseline=scale * randn(32, seed=8) + shift)
        value = ValueEstimator(
            ValueNetwork(SHAPE, DIM, channels=16),
            terminal=lambda x_0, _: scale * 5 * x_0.mean((1, 2, 3)) + shift,
            reward_until=0.5,
            learning_rate=1e-2,
        )
        value.fit(points, scale * randn(32, seed=9) + shift, steps=12, batch_size=12)
        return (value(points) - shift) / scale

    assert torch.allclose(learnt(scale, shift), learnt(1.0, 0.0), atol=0.01)


def test_fitting_works_inside_no_grad_and_leaves_no_gradient_behind():
    value = ValueEstimator(Opinion())
    with torch.no_grad():
        value.fit(points_at(torch.rand(8)), randn(8), steps=2, batch_size=8)
    assert value.network.weight.item() != pytest.approx(0.37, abs=1e-6)
    assert value.network.weight.grad is None


def test_equal_first_rewards_do_not_set_the_unit():
    value, points = ValueEstimator(Opinion()), points_at(torch.rand(16))
    value.fit(points, torch.full((16,), 0.1), steps=1, batch_size=16)
    assert value.state_dict()["std"] == 0
    value.fit(points, 100 * randn(16), steps=1, batch_size=16)
    assert value.state_dict()["std"] == pytest.approx((100 * randn(16)).std(correction=0).item())


def test_images_that_could_not_be_judged_are_not_learnt_from():
    """As if they were not there, also in what is told of the fit: three moments of eight images, of which two fail."""
    judged, nan = torch.arange(8) % 4 != 2, math.nan
    points, targets = points_at(torch.rand(24)), randn(3, 8) * 3 - 5
    rows = judged.repeat(3).nonzero().flatten()
    with_failures, without = ValueEstimator(Watching()), ValueEstimator(Opinion())
    found = with_failures.fit(points, targets.masked_fill(~judged, nan), judged, steps=1, batch_size=24)
    expected = without.fit(points.select(rows), targets[:, judged], steps=1, batch_size=24)
    assert sorted(with_failures.network.seen) == sorted(points.prompts[row] for row in rows.tolist())
    for name, number in expected.items():
        assert found[name].item() == pytest.approx(number.item(), rel=1e-4, nan_ok=True)
    assert with_failures.network.weight.item() == pytest.approx(without.network.weight.item(), abs=1e-6)
    states = [value.state_dict() for value in (with_failures, without)]
    assert states[0]["mean"] == pytest.approx(states[1]["mean"]) and states[0]["std"] == pytest.approx(states[1]["std"])


def test_whole_rollouts_are_learnt_from_without_those_that_could_not_be_judged():
    nodes, rewards, costs = walks(count=64)
    judged = torch.arange(64) % 3 != 1
    rows = judged.repeat(STEPS + 1).nonzero().flatten()
    values = torch.zeros(STEPS + 1, 64)
    values[-1] = rewards
    with_failures, without = ValueEstimator(Linear(), learning_rate=0.02), ValueEstimator(Linear(), learning_rate=0.02)
    settings = {"trace": 0.7, "steps": 3, "batch_size": 1000}
    found = with_failures.fit_paths(nodes, values.masked_fill(~judged, math.nan), costs, judged, **settings)
    expected = without.fit_paths(nodes.select(rows), values[:, judged], costs[:, judged], **settings)
    for name, number in expected.items():
        assert found[name].item() == pytest.approx(number.item(), rel=1e-4, abs=1e-6)
    assert torch.allclose(with_failures.network.line.weight, without.network.line.weight, atol=1e-5)


def test_where_the_reward_could_not_judge_x0_hat_the_value_is_learnt_alone_and_its_slope_is_there():
    """Also where the slope of what the reward could not compute is no number: a root of less than 0."""

    def root(x_0, prompts):
        return x_0.mean((1, 2, 3)).sqrt()

    points = replace(points_at(torch.tensor([0.25, 0.25])), baseline=torch.tensor([3.0, math.nan]))
    points.x0_hat[0] = points.x0_hat[0].abs()
    points.x0_hat[1] = -points.x0_hat[1].abs()
    value = ValueEstimator(Opinion(), terminal=root, is_differentiable=True)
    value.load_state_dict(value.state_dict() | {"mean": 2.0, "std": 0.5})
    x0_hat = points.x0_hat.requires_grad_()
    found = value(replace(points, x0_hat=x0_hat))
    skip, out = (weight[0].item() for weight in skip_weights(points.time))
    learnt = 0.5 * value.network(points)
    assert found[0].item() == pytest.approx((skip * root(x0_hat, ())[0] + (1 - skip) * 3 + out * learnt[0]).item())
    assert found[1].item() == pytest.approx((2 + learnt[1]).item())
    (slope,) = torch.autograd.grad(found.sum(), x0_hat)
    (of_learnt,) = torch.autograd.grad(learnt.sum(), x0_hat)
    assert torch.allclose(slope[1], of_learnt[1]) and slope.isfinite().all()


def test_returns_must_be_finite():
    with pytest.raises(ValueError, match="1 of 3 returns are not finite"):
        ValueEstimator(Opinion()).fit(points_at(torch.rand(3)), torch.tensor([0, math.inf, 1]), steps=1, batch_size=3)


def test_selected_points_are_in_the_order_asked_for():
    points = points_at(torch.rand(4))
    some = points.select(torch.tensor([2, 0]))
    assert some.prompts == ("prompt 2", "prompt 0")
    assert torch.equal(some.x0_hat, points.x0_hat[[2, 0]])
    assert torch.equal(some.time, points.time[[2, 0]])
