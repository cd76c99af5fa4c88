"""Reward gradients against what is known: the exact gradient of a chain, its optimum, and where the others end."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rpo.objectives.reward_gradient.adjoint_matching import AdjointMatching
from rpo.objectives.reward_gradient.alignprop import AlignProp
from rpo.objectives.reward_gradient.draft import Draft
from rpo.process.transition import Ddim, EulerMaruyama, added_variance
from rpo.trainers.reward_gradient import RewardGradient
from rpo.trainers.reward_gradient_config import RewardGradientConfig
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.trainers.trainer import Trainer
from tests.analytic.chains import all_nodes
from tests.analytic.closed_forms import OTHER, PRINTED, tilted_mixture
from tests.analytic.linear_quadratic import Case, double, error, gradient, moments, objective, shared, steps_of
from tests.analytic.linear_quadratic import Steps as ExactSteps
from tests.analytic.test_mixture import CASES as MIXTURES
from tests.analytic.test_mixture import ends, mass_below
from tests.analytic.test_training import Piecewise, check_optimum, fast, settled
from tests.analytic.toys import ImageReward, ToyModel, linear_vp

pytestmark = pytest.mark.analytic

NUM_STEPS, ROWS = 8, 16_000
CASES = {
    "vp, ddim": Case(PRINTED, (0.3, -0.2)),
    "vp, euler-maruyama, eta 0.7": Case(PRINTED, (-0.25, 0.35), solver="euler_maruyama", eta=0.7),
    "other vp, ode": Case(OTHER, (-0.25, 0.35), eta=0.0),
    "other flow, ddim": Case(OTHER, (-0.25, 0.35), "flow"),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def reward_gradient(case, folder, chosen, *, rows=ROWS, num_steps=NUM_STEPS, reward=None, model=None, **settings):
    own = {name: one for name, one in shared(case, folder).items() if name != "value"}
    given = own | {"rollout": case.rollout(rows, num_steps), "objective": chosen} | settings
    reward = ImageReward(reward or case.problem.quadratic)
    return Trainer(model or case.model(), RewardGradient(reward, ["x"], RewardGradientConfig(**given)))


def moved(trainer, case):
    """The exact steps of the policy at the case's theta."""
    model = trainer.run.model
    model.denoiser.correction.theta.data = torch.tensor(case.theta)
    return steps_of(model, trainer.algorithm.collector.rollouts.grid(0), case.kernel())


def through_the_last(steps, count):
    """The steps of which only the last depend on the policy."""
    kept = len(steps.slope) - count
    return ExactSteps(**{name: torch.cat([one[:kept].detach(), one[kept:]]) for name, one in vars(steps).items()})


def slope_of(value, trainer):
    return torch.autograd.grad(value, trainer.run.policy.parameters[0], retain_graph=True)[0]


@every
@pytest.mark.parametrize("last_steps", [1, 3, NUM_STEPS])
def test_draft_is_the_gradient_through_the_last_steps(tmp_path, case, last_steps):
    trainer = reward_gradient(case, tmp_path, Draft(last_steps=last_steps), kl_weight=0.0)
    exact = objective(through_the_last(moved(trainer, case), last_steps), case.problem.quadratic, 0.0)[0]
    assert error(-gradient(trainer, trainer.algorithm.loss), slope_of(exact, trainer)) < 0.03


def test_with_a_kl_it_is_the_gradient_of_reward_less_cost(tmp_path):
    case = Case(OTHER, (0.3, -0.2), solver="euler_maruyama")
    trainer = reward_gradient(case, tmp_path, Draft(last_steps=NUM_STEPS), rows=8 * ROWS)
    exact = objective(moved(trainer, case), case.problem.quadratic, case.problem.beta)[0]
    assert error(-gradient(trainer, trainer.algorithm.loss), slope_of(exact, trainer)) < 0.03


@every
def test_alignprop_is_the_mean_over_where_the_gradient_ends(tmp_path, case):
    trainer = reward_gradient(case, tmp_path, AlignProp(), kl_weight=0.0)
    steps = moved(trainer, case)
    values = [objective(through_the_last(steps, count), case.problem.quadratic, 0.0)[0] for count in range(1, 9)]
    mean = torch.stack([slope_of(value, trainer) for value in values]).sum(dim=0) / (NUM_STEPS + 1)
    assert error(-gradient(trainer, trainer.algorithm.loss), mean) < 0.03


def trained(case, folder, chosen, *, updates=120, rows=300, num_steps=50, knots=51, **settings):
    """The policy after `train()`."""
    model = case.model(Piecewise(*case.problem.prior.means, knots))
    given = {"rows": rows, "num_steps": num_steps, "model": model, "learning": fast(updates=updates)}
    settled(reward_gradient(case, folder, chosen, **given | settings)).train()
    return model


@pytest.mark.parametrize(
    "case",
    [Case(PRINTED, (0.0, 0.0)), Case(OTHER, (0.0, 0.0), solver="euler_maruyama")],
    ids=["printed", "other, euler-maruyama"],
)
def test_adjoint_matching_ends_at_the_optimum_of_its_grid(tmp_path, case):
    check_optimum(trained(case, tmp_path, AdjointMatching()), case)


def test_steps_chosen_at_random_lead_to_the_same_optimum(tmp_path):
    case = Case(PRINTED, (0.0, 0.0))
    check_optimum(trained(case, tmp_path, AdjointMatching(), steps=StepsConfig(train_steps=15), rows=600), case)


class Shifts(nn.Module):
    """A change of score for each step of a grid, whatever x_t is."""

    def __init__(self, num_steps):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(num_steps))

    def forward(self, x_t, alpha, sigma, time):
        step = len(self.theta) - (time.double() * len(self.theta)).round().long()
        return self.theta[step].to(x_t).expand_as(x_t)


def matched_ode(case, num_steps, last, a):
    """Of a linear reward: the changes of score at which every step's pull is its cost's, and how far they move x_0."""
    model = case.model()
    steps, (t, s) = steps_of(model, model.grid(num_steps), case.kernel()), all_nodes(double(model.grid(num_steps)))
    by_score = (s.alpha * t.sigma**2 / t.alpha - s.sigma * t.sigma).flatten()
    ahead = torch.cat([steps.slope.detach().flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    shifts = a * ahead * by_score / (case.problem.beta * added_variance(t, s).flatten())
    shifts[: num_steps - last] = 0
    return shifts.float(), (shifts * by_score * ahead).sum().item()


def test_along_an_ode_every_step_ends_where_its_pull_is_its_cost(tmp_path):
    case, last, num_steps = Case(PRINTED, (0.0, 0.0), eta=0.0), 6, 20
    shifts, moves = matched_ode(case, num_steps, last, PRINTED.linear.a)
    chosen, model, found = AdjointMatching(last_steps=last), case.model(Shifts(num_steps)), []
    given = {"reward": PRINTED.linear, "num_steps": num_steps, "rows": 64, "model": model}
    trainer = reward_gradient(case, tmp_path, chosen, **given)
    for index, theta in enumerate((torch.zeros(num_steps), shifts)):
        model.denoiser.correction.theta.data = theta
        found.append(gradient(trainer, trainer.algorithm.loss, index).norm().item())
        found.append(moments(steps_of(model, model.grid(num_steps), case.kernel()))[1][-1].item())
    at_start, mean, at_end, mean_at_end = found
    assert at_end < 1e-3 * at_start
    assert mean_at_end - mean == pytest.approx(moves, rel=1e-3)


def test_how_far_it_goes_is_how_many_steps_there_are(tmp_path):
    """(S a/β) ¼ ∫ g²/Σ dt over them: not the tilt, S a/β, which would need another number of steps."""
    case, num_steps, (_, variance) = Case(PRINTED, (0.0, 0.0), eta=0.0), 2000, PRINTED.prior.moments
    process, tilt = case.model().process, variance * PRINTED.linear.a / PRINTED.beta
    for share in (0.1, 0.3, 0.6):
        times = torch.linspace(0, share, 20_001, dtype=torch.float64)
        total = process.alpha(times) ** 2 * variance + process.sigma(times) ** 2
        reach = torch.trapezoid(process.diffusion(times) / total, times).item() / 4
        _, moves = matched_ode(case, num_steps, round(share * num_steps), PRINTED.linear.a)
        assert moves == pytest.approx(tilt * reach, rel=0.02)


def test_without_a_kl_draft_ends_in_the_mode(tmp_path):
    """Every path leads to what scores best, and nothing is left of the tilted law's spread."""
    case, num_steps = Case(PRINTED, (0.0, 0.0)), 20
    chosen, few = Draft(last_steps=num_steps), {"num_steps": num_steps, "knots": num_steps + 1, "updates": 400}
    model = trained(case, tmp_path, chosen, kl_weight=0.0, **few)
    _, means, variances = moments(steps_of(model, model.grid(num_steps), case.kernel()))
    _, tilted = PRINTED.quadratic.tilted(*PRINTED.prior.moments, PRINTED.beta)
    assert means[-1].item() == pytest.approx(PRINTED.quadratic.c, rel=0.02)
    assert variances[-1].item() < 0.25 * tilted


class Perceptron(nn.Module):
    """A change of score that is any smooth function of x_t and the time."""

    def __init__(self, width=64):
        super().__init__()
        torch.manual_seed(0)
        sizes = [(6, width), (width, width), (width, 1)]
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x_t, alpha, sigma, time):
        dtype = self.layers[0].weight.dtype
        x, level = x_t.to(dtype), (alpha / sigma.clamp_min(1e-3)).log().to(dtype).expand_as(x_t) / 3
        share = alpha.to(dtype).expand_as(x)
        hidden = torch.stack([x, x * share, level, level.square(), share, x * level], dim=-1)
        for layer in self.layers[:-1]:
            hidden = torch.nn.functional.silu(layer(hidden))
        return (self.layers[-1](hidden)[..., 0] * share).to(x_t)


@pytest.mark.timeout(900)
def test_on_two_modes_adjoint_matching_ends_at_the_tilted_law(tmp_path):
    """A small network, trained on random grids by the SDE and drawn on a fine one; a mode's mass is what is hard."""
    case, width = MIXTURES["towards the small mode"], 64
    of_chain = Case(replace(PRINTED, beta=case.beta), (0.0, 0.0), solver="euler_maruyama")
    process, policy = linear_vp(num_train_timesteps=100_000), Perceptron()
    trainer = reward_gradient(
        of_chain,
        tmp_path,
        AdjointMatching(),
        reward=case.reward,
        model=ToyModel(case.prior, process, policy, "epsilon", latent_shape=(1, 1, width)),
        kl_weight=case.beta / width,
        rollout=of_chain.rollout(32, 80, spacing="random"),
        steps=StepsConfig(train_steps=26),
        learning=replace(fast(updates=300), learning_rate=5e-3),
    )
    settled(trainer).train()
    tilted = tilted_mixture(case.prior, case.reward, case.beta)
    spread = tilted.moments[1] ** 0.5
    for kernel in (EulerMaruyama(1.0), Ddim(0.0)):
        x_0 = ends(case, "vp", kernel, control=policy)
        below = (x_0 < case.valley).double().mean().item()
        assert below == pytest.approx(mass_below(tilted, case.valley), rel=0.02)
        assert x_0.mean().item() == pytest.approx(tilted.moments[0], abs=0.04 * spread)
        assert x_0.var().item() == pytest.approx(tilted.moments[1], rel=0.05)
