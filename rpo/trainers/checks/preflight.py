"""Preflight: what has to hold before the first update, found out on a little data instead of after an hour.

An algorithm says what it checks; weights, random numbers and its state are afterwards what they were.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rpo.devices import dealt, own_part
from rpo.errors import InputError
from rpo.randomness import keyed_generator
from rpo.training.randomness import undisturbed_randomness

PERTURBATION = 0.1
"""How far the weights are moved off the reference, in their root mean square."""

ZERO = 1e-6
"""A gradient that is smaller than another by this factor is zero; so are differences of rewards by their size."""


class PreflightError(InputError):
    """A run that cannot learn, told before its first update."""


@dataclass(frozen=True)
class Check:
    """One line of the list."""

    name: str
    passed: bool
    detail: str
    advice: str = ""
    """What to do if it failed."""

    def __str__(self) -> str:
        """The line."""
        return f"  {'pass' if self.passed else 'FAIL'}  {self.name}: {self.detail}"


def preflight(
    checks: Callable[[], list[Check]], *, device: torch.device, say: Callable[[str], None] | None = None
) -> list[Check]:
    """Look at everything, and stop a run that cannot learn."""
    tell = say or (lambda line: None)
    tell("preflight")
    with undisturbed_randomness(device):
        found = checks()
    for check in found:
        tell(str(check))
    failed = [check for check in found if not check.passed]
    if failed:
        reasons = "; ".join(f"{check.name}: {check.detail}; {check.advice}" for check in failed)
        raise PreflightError(
            f"preflight failed before the first update, nothing was trained. {reasons}. With preflight: false the run "
            "starts nevertheless"
        )
    return found


def gradient_check(loss: Tensor, parameters: Sequence[nn.Parameter], *, is_lora: bool) -> Check:
    """Whether a loss reaches what is trained."""
    gradient = gradient_of(loss, parameters)
    norm, reached = norm_of(gradient), sum(bool(part.any()) for part in gradient)
    return Check(
        "adapter receives a gradient" if is_lora else "weights receive a gradient",
        0 < norm < float("inf"),
        f"norm {norm:.3g}, in {reached} of {len(gradient)} tensors",
        "the loss has to depend on what is trained: check adapter.target_modules, and that the adapter is active",
    )


def kl_gradient_check(
    gradient_norm: Callable[[], float], parameters: Sequence[nn.Parameter], *, seed: int, starts_elsewhere: bool
) -> Check:
    """Whether the distance from the reference has its least there, and a slope elsewhere.

    Args:
        starts_elsewhere: Whether training goes on from a LoRA that the reference is without.
    """
    at_reference = gradient_norm()
    with perturbed(parameters, seed=seed):
        off_reference = gradient_norm()
    return Check(
        "KL has its gradient",
        0 < off_reference < float("inf") and (starts_elsewhere or at_reference <= ZERO * off_reference),
        f"norm {at_reference:.2g} at the {'start' if starts_elsewhere else 'reference'}, {off_reference:.2g} off it",
        "it should be 0 at the reference and not off it: start from the checkpoint itself, without another adapter, "
        "and check that the adapter's layers are trainable",
    )


@contextmanager
def perturbed(parameters: Sequence[nn.Parameter], *, seed: int) -> Iterator[None]:
    """Inside, every parameter is moved by noise; afterwards all are bit for bit what they were."""
    own = [own_part(parameter.detach()) for parameter in parameters]
    squares = sum(float(parameter.double().square().sum()) for parameter in own)
    scale = PERTURBATION * (squares / sum(parameter.numel() for parameter in own)) ** 0.5
    generator = keyed_generator("preflight perturbation", seed)
    with undone(parameters):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            parameter.data.add_(dealt(scale * noise.to(parameter.device, parameter.dtype), parameter))
        yield


@contextmanager
def undone(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Afterwards, every parameter is bit for bit what it was, errors or not."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def gradient_of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Of this process's parts, with `.grad` as before; zeros for what the loss does not depend on."""
    if not loss.requires_grad:
        return [torch.zeros_like(own_part(parameter)) for parameter in parameters]
    if isinstance(parameters[0], DTensor):  # whose gradients backward alone puts in their places
        loss.backward()
        divided = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return [own_part(part) for part in divided]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if part is None else part for p, part in zip(parameters, found, strict=True)]


def norm_of(gradient: Sequence[Tensor]) -> float:
    """Of all parts together."""
    return torch.stack([part.float().norm() for part in gradient]).norm().item()
