"""The likelihood gradient averaged over the paths to an image: exact where the policy reverses the noising process."""

import math

import pytest
import torch

from rpo.trainers.online_config import LearningConfig
from rpo.training.loop_config import LoopConfig
from tests.analytic.closed_forms import OTHER, PRINTED
from tests.analytic.linear_quadratic import (
    ALL,
    Case,
    error,
    exact_gradient,
    gradient,
    loss_of,
    move,
    objective,
    score_as_action,
    steps_of,
    value_config,
)
from tests.analytic.test_training import Piecewise

pytestmark = pytest.mark.analytic

AT_REFERENCE = {
    "vp": Case(PRINTED, (0.0, 0.0)),
    "other vp": Case(OTHER, (0.0, 0.0)),
    "flow": Case(PRINTED, (0.0, 0.0), "flow"),
}
NUM_STEPS, ROWS = 300, 10_000
"""It knows the continuous process, not the grid: what is left is the first order of the steps."""


def endpoint(case, folder, *, rows=ROWS, num_steps=NUM_STEPS, train_steps=16, **settings):
    learning = LearningConfig(train_steps=train_steps, micro_batch=ALL)
    defaults = {"advantage": "group", "rollout": case.rollout(rows, num_steps), "bound_clip": None}
    return score_as_action(case, folder, estimator="endpoint", learning=learning, **defaults | settings)


@pytest.mark.parametrize("case", AT_REFERENCE.values(), ids=AT_REFERENCE)
def test_it_is_the_exact_gradient_at_the_reference(tmp_path, case):
    trainer = endpoint(case, tmp_path)
    exact = exact_gradient(trainer, case, move(trainer, case))
    found = torch.stack([-gradient(trainer, loss_of(trainer), index) for index in range(3)]).mean(dim=0)
    assert error(found, exact) < 0.03


def test_at_the_reference_the_clip_holds_nothing_back(tmp_path):
    case, gradients = AT_REFERENCE["vp"], []
    for clip in (None, 0.3):
        trainer = endpoint(case, tmp_path / str(clip), rows=1000, num_steps=50, bound_clip=clip)
        move(trainer, case)
        gradients.append(gradient(trainer, loss_of(trainer), 0))
    assert error(gradients[1], gradients[0]) < 1e-5


def test_a_value_of_every_noised_moment_leaves_the_gradient_as_it_is(tmp_path):
    case = AT_REFERENCE["vp"]
    trainer = endpoint(case, tmp_path, advantage="return_minus_value", value=value_config())
    exact = exact_gradient(trainer, case, move(trainer, case))  # which gives it the value of the nearest node
    found = torch.stack([-gradient(trainer, loss_of(trainer), index) for index in range(3)]).mean(dim=0)
    assert error(found, exact) < 0.03


def test_an_ode_may_draw_the_images(tmp_path):
    case = AT_REFERENCE["vp"]
    trainer = endpoint(case, tmp_path, rollout=case.rollout(ROWS, NUM_STEPS, eta=0.0))
    exact = exact_gradient(trainer, case, move(trainer, case))
    found = torch.stack([-gradient(trainer, loss_of(trainer), index) for index in range(3)]).mean(dim=0)
    assert error(found, exact) < 0.03


def test_it_has_less_noise_than_the_path(tmp_path):
    """In one dimension half; what is averaged away grows with the number of dimensions."""
    case = AT_REFERENCE["vp"]
    spreads = []
    for name in ("endpoint", "likelihood"):
        settings = {"estimator": name, "advantage": "group", "rollout": case.rollout(64, 40)}
        trainer = score_as_action(case, tmp_path / name, **settings)
        move(trainer, case)
        found = torch.stack([gradient(trainer, loss_of(trainer), index) for index in range(40)])
        spreads.append(found.var(dim=0).sum().item())
    assert spreads[0] < 0.6 * spreads[1]


def test_training_reaches_the_tilted_law(tmp_path):
    case = AT_REFERENCE["vp"]
    model = case.model(Piecewise(*case.problem.prior.means, 26))
    loop = LoopConfig(
        updates=150,
        learning_rate=0.05,
        lr_schedule="linear",
        max_grad_norm=math.inf,
        adam_beta2=0.99,
        checkpoint_every=150,
        progress=False,
    )
    endpoint(case, tmp_path, rows=700, num_steps=300, train_steps=40, model=model, loop=loop).train()
    steps = steps_of(model, model.grid(1000), case.kernel())
    _, mean, variance = objective(steps, case.problem.quadratic, case.problem.beta)
    assert mean.item() == pytest.approx(0.9727, rel=0.03)
    assert variance.item() == pytest.approx(0.1818, rel=0.05)
