"""The shipped judge knows right from wrong, early from late, whose image it is, and serves as a reward."""

import pytest
import torch
from torch.nn import functional

from rpo.errors import InputError
from rpo.rewards import load_reward, score
from rpo.rewards.version import version_of
from rpo.sampling.stepwise import CLEAR, PotentialJudge
from rpo.shapes import POTENTIAL
from rpo.shapes.potential import SOURCES, ShapesPotential, load_heads
from tests.shapes.test_reward import scenes

JUDGES = {"shapes": "shapes-potential", "shapes-tokens": "shapes-tokens-potential"}


@pytest.fixture(scope="module")
def seen():
    """Images and prompts, the first half right."""
    return scenes(64)


@pytest.mark.parametrize("source", SOURCES)
def test_as_a_reward_it_tells_right_from_wrong(source, seen):
    judge = load_reward(JUDGES[source])
    assert isinstance(judge, PotentialJudge) and judge.source == source
    said = score(judge, *seen, name=source)
    right, wrong = said[:32], said[32:]
    assert (right[:, None] > wrong).float().mean() > 0.75 and right.mean() - wrong.mean() > 0.2
    assert ((said >= 0) & (said <= 1)).all()


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_seen_early_is_not_clear_and_late_it_is(source, seen):
    judge = load_reward(JUDGES[source])
    blurred = functional.interpolate(functional.avg_pool2d(seen[0], 16), scale_factor=16, mode="bilinear")
    early = judge.assess(blurred, seen[1], 0.95).clear
    late = judge.assess(seen[0], seen[1], 0.05).clear
    assert (early >= CLEAR).float().mean() < 0.3 and (late >= CLEAR).float().mean() > 0.55
    potential = judge.assess(seen[0], seen[1], 0.05).potential
    assert (potential[:32, None] > potential[32:]).float().mean() > 0.65


def test_the_two_are_two_versions_of_one_judge(seen):
    one, other = (load_reward(name) for name in JUDGES.values())
    assert version_of(one) != version_of(other) and version_of(one) == version_of(ShapesPotential())
    assert not torch.equal(one(*seen), other(*seen))
    one.leave()


def test_its_gradient_goes_through_the_image(seen):
    image = seen[0][:2].clone().requires_grad_()
    (slope,) = torch.autograd.grad(ShapesPotential()(image, seen[1][:2]).sum(), image)
    assert slope.abs().sum() > 0


def test_it_is_small():
    assert sum(file.stat().st_size for file in POTENTIAL.iterdir()) < 1_000_000


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="holds no judge of potential"):
        load_heads(tmp_path)
    with pytest.raises(InputError, match="expected one of shapes, shapes-tokens"):
        ShapesPotential("sdxl")
