"""What the first update would do, done on one micro-batch and undone.

At the start the policy equals its reference. Then AdamW's first step is taken, which moves every number by the
learning rate against its gradient: the loss has to fall, and the policy to move a little.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpo.trainers.checks.preflight import Check, gradient_of, norm_of, undone
from rpo.trainers.trainer import Run
from rpo.types import Latents

EQUAL = 1e-5
"""How far two predictions of the same weights may be apart, of the largest number in them."""

FAR = 0.1
"""A step that moves predictions by more than this part of them is no small step."""

SHORTER = 0.1
"""Of the learning rate: a clipped objective may rise where a whole step leaves its clip, and falls on the way."""


@dataclass(frozen=True)
class FirstBatch:
    """The first micro-batch, with all that is asked about it."""

    run: Run
    loss: Callable[[], Tensor]
    predict: Callable[[], Latents]
    """The network's output at its noisy latents."""


def starts_at_reference(batch: FirstBatch) -> Check:
    """Whether policy and reference are one before anything is learnt."""
    run = batch.run
    with torch.no_grad():
        policy = batch.predict()
    with run.policy.reference():
        reference = batch.predict()
    apart = _apart(policy, reference)
    is_meant = run.config.adapter.reference == "base" and apart > EQUAL
    return Check(
        "reference equals start",
        apart <= EQUAL or is_meant,
        f"predictions differ by {apart:.2g}"
        + (", as training goes on from a LoRA that the reference is without" if is_meant else ""),
        "the adapter does something already, or the network is random (dropout): load the checkpoint again; a LoRA to "
        "start from is model.lora, and the reference has it with adapter.reference: start",
    )


def first_step(batch: FirstBatch) -> list[Check]:
    """What one step against the gradient does to loss and policy; weights are afterwards what they were."""
    rate, loss = batch.run.config.learning.learning_rate, batch.loss()
    before, gradient = loss.item(), gradient_of(loss, batch.run.policy.parameters)
    del loss
    if not norm_of(gradient) > 0:
        return [Check("a step lowers the loss", False, "it has no gradient", "see the line of the gradient")]
    with torch.no_grad():
        old = batch.predict()
    after, moved = _after(batch, gradient, rate, old)
    told, lowers = f"{before:.4g} to {after:.4g} at learning.learning_rate {rate:g}", after < before
    if not lowers:
        shorter, _ = _after(batch, gradient, SHORTER * rate, old)
        told, lowers = f"{told}, {shorter:.4g} at {SHORTER:g} of it", shorter < before
    return [
        Check(
            "a step lowers the loss",
            lowers,
            told,
            "lower learning.learning_rate; if the loss rises however short the step, it does not follow its own "
            "gradient: look for a part of it that is detached",
        ),
        Check(
            "a step moves the policy a little",
            0 < moved < FAR,
            f"predictions by {moved:.2g} of their size, {FAR:g} is allowed",
            "lower learning.learning_rate: one update wrecks what the checkpoint knows"
            if moved > 0
            else "raise learning.learning_rate, and see that the adapter is active",
        ),
    ]


@torch.no_grad()
def _after(batch: FirstBatch, gradient: Sequence[Tensor], rate: float, old: Latents) -> tuple[float, float]:
    """The loss after a step, and how far it moved the predictions; the step is undone."""
    parameters = batch.run.policy.parameters
    with undone(parameters):
        for parameter, slope in zip(parameters, gradient, strict=True):
            parameter -= rate * slope.sign()
        return batch.loss().item(), _apart(batch.predict(), old)


def _apart(one: Latents, other: Latents) -> float:
    """Root mean square of the difference, of the other's."""
    size = other.square().mean().sqrt().clamp_min(1e-12)
    return ((one - other).square().mean().sqrt() / size).item()
