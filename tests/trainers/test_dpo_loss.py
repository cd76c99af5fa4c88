"""The loss of a micro-batch against its formula written out: masks, anchors, labels, references in their places."""

import pytest
import torch

from rpo.objectives.preference.dpo import Dpo
from rpo.objectives.preference.kto import Kto
from rpo.objectives.preference.region import RegionConfig
from tests.trainers.pair_runs import edits, trainer_of

REGION = RegionConfig(floor=0.3, full_at=0.5, soften=1, anchor=0.7)
BETA = 40.0
DPO = Dpo(beta=BETA)


def moved(folder, *, objective=DPO, **changes):
    """A trainer whose policy is off its reference, the loss of its run, and a micro-batch."""
    trainer = trainer_of(folder, pairs=edits(), objective=objective, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.run.policy.parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return trainer, trainer.algorithm.loss, trainer.algorithm.data.at(range(4))


def written_out(trainer, batch):
    """(prediction, target, reference's prediction), each of the chosen and of the rejected side."""
    model, sides = trainer.run.model, []
    alphas = model.pipe.scheduler.alphas_cumprod[batch.timestep].double()[:, None, None, None]
    for x_0 in batch.x_0.chunk(2):
        x_t = (alphas.sqrt() * x_0 + (1 - alphas).sqrt() * batch.eps).float()
        prediction = model.predict(x_t, batch.timestep, batch.conditioning)
        with trainer.run.policy.reference():
            reference = model.predict(x_t, batch.timestep, batch.conditioning)
        sides.append((prediction, batch.eps, reference))
    return sides


def mean(values):
    return values.mean(dim=(1, 2, 3))


def gradient(loss, trainer):
    parts = torch.autograd.grad(loss, trainer.run.policy.parameters, allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def mask_of(batch):
    found = REGION.mask(batch.difference)
    assert REGION.floor <= found.min() < 0.5 < found.max() <= 1
    return found


def test_a_region_weighs_the_errors_once_and_its_anchor_holds_the_rest(tmp_path):
    trainer, loss, batch = moved(tmp_path, region=REGION)
    mask, sides = mask_of(batch), written_out(trainer, batch)
    error = [mean(mask * (prediction - target) ** 2) for prediction, target, _ in sides]
    before = [mean(mask * (reference - target) ** 2) for _, target, reference in sides]
    favour = -0.5 * BETA * ((error[0] - before[0]) - (error[1] - before[1]))
    anchor = sum(mean((1 - mask) * (prediction - reference) ** 2) for prediction, _, reference in sides)
    expected = (-torch.nn.functional.logsigmoid(favour) + 0.5 * BETA * REGION.anchor * anchor).mean()
    found = loss(batch).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(gradient(found, trainer), gradient(expected, trainer), rtol=1e-3, atol=1e-6)


def test_what_the_winner_keeps_is_counted_in_the_region(tmp_path):
    kept = 0.9
    region = RegionConfig(floor=0.0, full_at=0.5, soften=0, anchor=0.0)
    trainer, loss, batch = moved(tmp_path, region=region, objective=Dpo(beta=BETA, winner_preserving=kept))
    mask = region.mask(batch.difference)
    sides = written_out(trainer, batch)
    error = [mean(mask * (prediction - target) ** 2) for prediction, target, _ in sides]
    before = [mean(mask * (reference - target) ** 2) for _, target, reference in sides]
    slopes = [(mask * (prediction - target)).detach() for prediction, target, _ in sides]
    shared = (slopes[0] * slopes[1]).sum(dim=(1, 2, 3))
    scale = ((1 - kept) * (slopes[0] ** 2).sum(dim=(1, 2, 3)) / shared).clamp(max=1)
    scale = torch.where(shared > 0, scale, 1.0)
    assert (scale < 0.9).any()
    rejected = error[1].detach() + scale * (error[1] - error[1].detach())
    expected = -torch.nn.functional.logsigmoid(-0.5 * BETA * ((error[0] - before[0]) - (rejected - before[1]))).mean()
    found = gradient(loss(batch).loss, trainer)
    assert torch.allclose(found, gradient(expected, trainer), rtol=1e-3, atol=1e-6)


def test_each_side_is_held_against_its_own_reference(tmp_path):
    trainer, loss, batch = moved(tmp_path)
    sides = written_out(trainer, batch)
    gains = [mean((reference - target) ** 2) - mean((pred - target) ** 2) for pred, target, reference in sides]
    expected = -torch.nn.functional.logsigmoid(0.5 * BETA * (gains[0] - gains[1])).mean()
    assert loss(batch).loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_kto_observes_how_much_better_than_the_reference_the_policy_is(tmp_path):
    trainer, loss, batch = moved(tmp_path, objective=Kto(beta=BETA))
    gains = [
        mean((reference - target) ** 2) - mean((prediction - target) ** 2)
        for prediction, target, reference in written_out(trainer, batch)
    ]
    first = loss(batch).loss.item()
    signs = (1, -1)
    kept = [(1 - torch.sigmoid(sign * BETA * gain)).mean() for sign, gain in zip(signs, gains, strict=True)]
    assert first == pytest.approx(sum(kept).item() / 2, rel=1e-4)
    trainer.algorithm.after(1, {})
    observed = torch.cat(gains).mean()
    assert abs(observed.item()) > 1e-4
    assert trainer.algorithm.statistics.mean().item() == pytest.approx(observed.item(), rel=1e-3)
    again = [
        (1 - torch.sigmoid(sign * BETA * (gain - observed.clamp(min=0)))).mean()
        for sign, gain in zip(signs, gains, strict=True)
    ]
    assert loss(batch).loss.item() == pytest.approx(sum(again).item() / 2, rel=1e-4)
