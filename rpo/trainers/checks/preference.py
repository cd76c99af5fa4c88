"""What must hold of preference training at its start: the reference's loss, its direction, and the share of each term.

Before the first update no pair is favoured, so that the loss is what the objective gives at the reference: log 2 for
DPO. Its gradient must lead where the chosen side's error falls relative to the rejected one's.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rpo.trainers.checks.preflight import Check, gradient_of, kl_gradient_check
from rpo.trainers.dpo import DPO
from rpo.trainers.pairs.batches import PairBatch
from rpo.trainers.pairs.errors import denoise
from rpo.trainers.pairs.guard import START_TOLERANCE
from rpo.types import StepOutput

AGAINST = -0.1
"""Cosine of the loss's gradient with that of (chosen - rejected) error, below which it works against the labels; an
SFT term may turn it somewhat."""

FEW = 2
"""Pairs on which the slope of the distance from the reference is looked at."""

SHARES = (1e-3, 0.95)
"""Between which the SFT term's share of the gradient lies."""


def preference_checks(algorithm: DPO, batch: PairBatch) -> Iterator[Check]:
    """All of them, on one micro-batch."""
    output = algorithm.loss(batch)
    with algorithm.run.policy.reference():
        at_reference = algorithm.loss(batch)
    gradient = _gradient(algorithm, output.loss)  # before anything is perturbed, which graphs forbid
    yield _start(algorithm, output, at_reference)
    yield _kl(algorithm, algorithm.data.at(range(FEW)))
    yield _direction(algorithm, batch, gradient)
    objective: Any = algorithm.config.objective
    if getattr(objective, "sft_weight", 0) > 0:
        yield _share(algorithm, batch, gradient, replace(objective, sft_weight=0.0))


def _start(algorithm: DPO, output: StepOutput, at_reference: StepOutput) -> Check:
    loss, expected = output.loss.item(), at_reference.loss.item()
    is_zero = algorithm.config.objective.starts_at_zero and not _starts_elsewhere(algorithm)
    margin = output.metrics["dpo/margin"].item() if is_zero else 0.0
    is_equal = abs(loss - expected) <= 1e-3 * abs(expected) + 1e-6
    return Check(
        "loss at the start",
        (is_equal or _starts_elsewhere(algorithm)) and abs(margin) <= START_TOLERANCE,
        f"{loss:.4f}, at the reference {expected:.4f} (log 2 is 0.6931); margin {margin:.2g}, at which training ends "
        f"above {START_TOLERANCE:g}",
        "the policy is not its reference, or errors of the reference that were kept are of another model: empty the "
        "cache folder, and start without another adapter",
    )


def _starts_elsewhere(algorithm: DPO) -> bool:
    return not algorithm.run.policy.starts_at_reference


def _kl(algorithm: DPO, batch: PairBatch) -> Check:
    reference = algorithm.reference.denoise(batch)

    def gradient_norm() -> float:
        apart = denoise(algorithm.model, batch).apart(reference)
        return _gradient(algorithm, apart.mean()).norm().item()

    return kl_gradient_check(
        gradient_norm,
        algorithm.run.policy.parameters,
        seed=algorithm.config.seed,
        starts_elsewhere=_starts_elsewhere(algorithm),
    )


def _direction(algorithm: DPO, batch: PairBatch, gradient: Tensor) -> Check:
    chosen, rejected = denoise(algorithm.model, batch).errors().chunk(2)
    wanted = _gradient(algorithm, (chosen - rejected).mean())
    cosine = torch.nn.functional.cosine_similarity(gradient, wanted, dim=0).item()
    return Check(
        "chosen is favoured",
        cosine > AGAINST,
        f"the gradient's cosine with that of the chosen minus the rejected error is {cosine:.2f}",
        "the loss makes the rejected images likelier: beta or the argument of the link has the wrong sign, or chosen "
        "and rejected are exchanged in the objective",
    )


def _share(algorithm: DPO, batch: PairBatch, gradient: Tensor, without: Any) -> Check:
    config, algorithm.config = algorithm.config, replace(algorithm.config, objective=without)
    try:
        rest = _gradient(algorithm, algorithm.loss(batch).loss)
    finally:
        algorithm.config = config
    own, others = (gradient - rest).norm(), rest.norm()
    share, (low, high) = (own / (own + others).clamp_min(1e-30)).item(), SHARES
    return Check(
        "share of objective.sft_weight",
        low < share < high,
        f"{share:.1%} of the gradient of the first step, {low:.1%} to {high:.0%} is allowed",
        f"{'lower' if share >= high else 'raise'} objective.sft_weight, or leave it out",
    )


def _gradient(algorithm: DPO, loss: Tensor) -> Tensor:
    return torch.cat([part.flatten().float() for part in gradient_of(loss, algorithm.run.policy.parameters)])
