"""Preflight: what has to hold before the first update, found out on a small rollout instead of after an hour.

A few images of two prompts are drawn with keys of their own; the rewards are asked about them, their likelihoods are
replayed, the trainer's loss and the KL are differentiated, and the memory is added up. Weights, random numbers and the
state of the trainer are afterwards what they were. A reward whose answers are all equal gets further images before it
is called constant.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.models.checkpoint import Checkpoint
from rpo.randomness import keyed_generator
from rpo.rewards import RewardError
from rpo.sampling.sample import Keep
from rpo.trainers.checks.memory import (
    AVERAGE,
    GRADIENT,
    MOMENTS,
    MemoryEstimate,
    SavedBytes,
    free_bytes,
    readable_bytes,
    tensor_bytes,
)
from rpo.trainers.online_settings import OnlineSettings
from rpo.trainers.policy import Policy
from rpo.trainers.rollouts.draw import Rollout, Rollouts, training_kernel
from rpo.trainers.rollouts.moments import current_prediction, step_cost, transition_of
from rpo.trainers.rollouts.points import Points, choose_steps, points_of
from rpo.training.randomness import undisturbed_randomness
from rpo.types import StepOutput

PROMPTS, IMAGES, POINTS = 2, 4, 8
"""At most so many prompts, images of each and trained moments are looked at."""

DRAWS = 8
"""Small rollouts in which a reward must differ once within a prompt, before it is called constant."""

PERTURBATION = 0.1
"""How far the weights are moved off the reference, in their root mean square."""
ZERO = 1e-6
"""A gradient that is smaller than another by this factor is zero; so are differences of rewards by their size."""

RATIO_TOLERANCE, HALF_RATIO_TOLERANCE = 1e-4, 1e-3
"""How far a replayed ratio per dimension may be from 1, in single and in half precision."""


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


@dataclass(frozen=True)
class Subject:
    """What is looked at: a run, and the loss that its trainer descends."""

    model: DiffusionModel
    policy: Policy
    rollouts: Rollouts
    settings: OnlineSettings
    loss: Callable[[Points], StepOutput]
    guidance_scale: float
    """Of the trained prediction."""
    freezes_negative: bool
    images: int
    """Images of a rollout, of this process."""
    trained_steps: int
    micro_batch: int


def preflight(subject: Subject, *, say: Callable[[str], None] | None = None) -> list[Check]:
    """Look at everything, and stop a run that cannot learn."""
    tell = say or (lambda line: None)
    tell("preflight")
    with undisturbed_randomness(subject.model.device):
        try:
            rollout, checks = _rewards(subject)
        except RewardError:
            tell(str(Check("rewards finite", False, "a reward failed; see below")))
            raise
        points = _points(subject, rollout)
        some = points.select(torch.linspace(0, len(points) - 1, min(POINTS, len(points))).round().long().unique())
        if subject.settings.has_ratio and subject.guidance_scale == subject.settings.rollout.guidance_scale:
            checks.append(_ratio(subject, some))
        checks.append(_kl_gradient(subject, some))
        checks += _loss_gradient(subject, rollout, points, some)
    for check in checks:
        tell(str(check))
    failed = [check for check in checks if not check.passed]
    if failed:
        reasons = "; ".join(f"{check.name}: {check.detail}; {check.advice}" for check in failed)
        raise PreflightError(
            f"preflight failed before the first update, nothing was trained. {reasons}. With preflight: false the run "
            "starts nevertheless"
        )
    return checks


def _rewards(subject: Subject) -> tuple[Rollout, list[Check]]:
    """The first small rollout, and what the rewards say of it."""
    config = subject.settings.rollout
    per_prompt = min(max(config.images_per_prompt, 2), IMAGES)
    rollouts = Rollouts(
        subject.model,
        subject.rollouts.prompts,
        subject.rollouts.rewards,
        replace(config, prompts=min(config.prompts, PROMPTS), images_per_prompt=per_prompt),
        seed=keyed_generator("preflight", subject.settings.seed).initial_seed(),
        evidence=subject.settings.evidence,
    )
    keep = Keep(predictions=True, freeze_negative=subject.freezes_negative)
    first = rollout = rollouts.draw(0, lambda grid: keep)
    spread, seen = _spread(rollout), rollout.num_images
    while not spread and rollout.index + 1 < DRAWS:
        rollout = rollouts.draw(rollout.index + 1, lambda grid: keep)
        spread, seen = _spread(rollout), seen + rollout.num_images
    low, high = first.rewards.min().item(), first.rewards.max().item()
    finite = Check("rewards finite", True, f"{first.num_images} images, {low:.4g} to {high:.4g}")
    varying = Check(
        "rewards vary within prompts",
        spread > 0,
        f"by {spread:.3g} among the images of one prompt"
        if spread
        else f"{low:.4g} for every image of a prompt, {seen} images seen",
        "images of one prompt have to differ in reward, or there is nothing to learn from: look at the reward "
        f"({', '.join(subject.rollouts.rewards.weights)}) on a few images, draw more rollout.images_per_prompt, or "
        "take a graded reward instead of one that says yes or no",
    )
    return first, [finite, varying]


def _spread(rollout: Rollout) -> float:
    """The widest range of rewards within a prompt; 0 where it is rounding."""
    rewards = rollout.rewards.view(int(rollout.group.max()) + 1, -1)
    widest = (rewards.amax(dim=1) - rewards.amin(dim=1)).max().item()
    return widest if widest > ZERO * rewards.abs().max().item() else 0.0


def _points(subject: Subject, rollout: Rollout) -> Points:
    settings = subject.settings
    steps, stands_for = choose_steps(
        rollout.trajectory.grid,
        rollout.num_images,
        settings.learning,
        keyed_generator("preflight steps", settings.seed),
        skips_clean_end=settings.skips_clean_end,
    )
    return points_of(rollout, steps, stands_for, is_frozen=subject.freezes_negative)


@torch.no_grad()
def _ratio(subject: Subject, points: Points) -> Check:
    noise_pred = current_prediction(subject.model, points, subject.guidance_scale)
    transition = transition_of(subject.model, noise_pred, points, training_kernel(subject.settings.rollout))
    ratio = ((transition.log_prob(points.x_s) - points.log_prob) / transition.num_dims).exp()
    error = (ratio - 1).abs().max().item()
    tolerance = HALF_RATIO_TOLERANCE if _is_half(subject.model) else RATIO_TOLERANCE
    return Check(
        "ratio 1 on replay",
        error <= tolerance,
        f"off by {error:.1g} per dimension, {tolerance:g} is allowed",
        "the network does not repeat what it drew: switch off what is random in it (dropout), or compute in float32",
    )


def _kl_gradient(subject: Subject, points: Points) -> Check:
    model, parameters = subject.model, subject.policy.parameters
    kernel = training_kernel(subject.settings.rollout)
    with subject.policy.reference():
        reference = current_prediction(model, points, subject.guidance_scale)

    def gradient_norm() -> float:
        noise_pred = current_prediction(model, points, subject.guidance_scale)
        return _norm(_gradient(step_cost(model, noise_pred, reference, points, kernel).mean(), parameters))

    at_reference = gradient_norm()
    with perturbed(parameters, seed=subject.settings.seed):
        off_reference = gradient_norm()
    return Check(
        "KL has its gradient",
        0 < off_reference < float("inf") and at_reference <= ZERO * off_reference,
        f"norm {at_reference:.2g} at the reference, {off_reference:.2g} off it",
        "it should be 0 at the reference and not off it: start from the checkpoint itself, without another adapter, "
        "and check that the adapter's layers are trainable",
    )


def _loss_gradient(subject: Subject, rollout: Rollout, points: Points, some: Points) -> list[Check]:
    """Whether the loss reaches the adapter; its graph also tells what memory a moment takes."""
    model, parameters = subject.model, subject.policy.parameters
    signs = 1.0 - 2.0 * (torch.arange(len(some), device=some.x_t.device) % 2)
    generator = keyed_generator("preflight slope", subject.settings.seed)
    direction = torch.randn(some.x_t.shape, generator=generator, dtype=torch.float32, device="cpu").to(some.x_t.device)
    # Some losses are flat where the policy predicts what the rollout did, so the rollout gets another prediction.
    prepared = replace(
        some,
        advantage=signs,
        cost_weight=torch.zeros_like(signs),
        value_gradient=direction,
        prediction=some.prediction + direction,
    )
    saved = SavedBytes(model.denoiser.parameters())
    with saved.counting():
        loss = subject.loss(prepared).loss
    gradient = _gradient(loss, parameters)
    norm, reached = _norm(gradient), sum(bool(part.any()) for part in gradient)
    reaches = Check(
        "adapter receives a gradient" if subject.settings.adapter.train == "lora" else "weights receive a gradient",
        0 < norm < float("inf"),
        f"norm {norm:.3g}, in {reached} of {len(gradient)} tensors",
        "the loss has to depend on what is trained: check adapter.target_modules, and that the adapter is active",
    )
    return [reaches, _memory(subject, rollout, points, graph=saved.total / len(some))]


def _memory(subject: Subject, rollout: Rollout, points: Points, *, graph: float) -> Check:
    settings, num_points = subject.settings, subject.images * subject.trained_steps
    estimate = MemoryEstimate(
        image=tensor_bytes(rollout.trajectory) / rollout.num_images,
        images=subject.images,
        point=tensor_bytes(points) / len(points),
        points=num_points,
        graph=graph,
        rows=num_points if settings.learning.keep_graph else subject.micro_batch,
        parameter=GRADIENT + MOMENTS + (AVERAGE if settings.loop.ema_decay is not None else 0),
        parameters=sum(parameter.numel() for parameter in subject.policy.parameters),
    )
    free = free_bytes(subject.model.device)
    return Check(
        "memory",
        free is None or estimate.total < free,
        f"{estimate}" + ("" if free is None else f"; {readable_bytes(free)} are free"),
        "lower learning.micro_batch or rollout.prompts, set learning.keep_graph: false, or "
        "adapter.gradient_checkpointing: true",
    )


@contextmanager
def perturbed(parameters: Sequence[nn.Parameter], *, seed: int) -> Iterator[None]:
    """Inside, every parameter is moved by noise; afterwards all are bit for bit what they were."""
    kept = [parameter.detach().clone() for parameter in parameters]
    squares = sum(float(value.double().square().sum()) for value in kept)
    scale = PERTURBATION * (squares / sum(value.numel() for value in kept)) ** 0.5
    generator = keyed_generator("preflight perturbation", seed)
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(
                    scale
                    * torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu").to(parameter)
                )
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Without touching `.grad`; zeros for what the loss does not depend on."""
    if not loss.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if part is None else part for p, part in zip(parameters, found, strict=True)]


def _norm(gradient: Sequence[Tensor]) -> float:
    return torch.stack([part.float().norm() for part in gradient]).norm().item()


def _is_half(model: DiffusionModel) -> bool:
    return isinstance(model, Checkpoint) and model.compute_dtype in (torch.float16, torch.bfloat16)
