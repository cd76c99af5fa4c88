"""What an algorithm that draws what it learns from checks before its first update, on a small rollout.

A few images of two prompts are drawn with keys of their own; the rewards are asked about them, their likelihoods are
replayed, loss and KL are differentiated, and the memory is added up. A reward whose answers are all equal gets further
images before it is called constant.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rpo.devices import own_part
from rpo.process.transition import Kernel
from rpo.randomness import keyed_generator
from rpo.rewards import RewardError
from rpo.sampling.sample import Keep
from rpo.trainers.checks.canaries import canary_checks
from rpo.trainers.checks.memory import (
    AVERAGE,
    GRADIENT,
    MemoryEstimate,
    SavedBytes,
    free_bytes,
    readable_bytes,
    tensor_bytes,
)
from rpo.trainers.checks.preflight import (
    ZERO,
    Check,
    gradient_check,
    gradient_of,
    kl_gradient_check,
    norm_of,
)
from rpo.trainers.checks.prepared import computes_in
from rpo.trainers.rollouts.costs import step_cost
from rpo.trainers.rollouts.draw import Rollout, Rollouts, training_kernel
from rpo.trainers.rollouts.settings import OnlineConfig
from rpo.trainers.rollouts.steps import Steps, choose_steps, replayed, steps_of
from rpo.trainers.trainer import Run
from rpo.training.optimizer import MOMENTS
from rpo.types import Images, StepOutput

PROMPTS, IMAGES, POINTS = 2, 4, 8
"""At most so many prompts, images of each and trained moments are looked at."""

DRAWS = 8
"""Small rollouts in which a reward must differ once within a prompt, before it is called constant."""

RATIO_TOLERANCE, HALF_RATIO_TOLERANCE = 1e-4, 1e-3
"""How far a replayed ratio per dimension may be from 1, in single and in half precision."""


@dataclass(frozen=True)
class Subject:
    """What is looked at: a run, its rollouts, and the loss that is descended."""

    run: Run
    config: OnlineConfig
    rollouts: Rollouts
    loss: Callable[[Steps], StepOutput]
    skips_clean_end: bool
    has_ratio: bool
    kernel: Kernel
    """In which the KL of a step is measured."""
    images: int
    """Images of a rollout, of this process."""
    trained_steps: int
    micro_batch: int
    said: frozenset[str] = frozenset()
    """Predictions besides the policy's own that the loss asks for, by name."""


def online_checks(subject: Subject) -> list[Check]:
    """All of them; a reward that fails ends the run by itself."""
    rollout, checks = _rewards(subject)
    steps = _steps(subject, rollout)
    some = steps.select(torch.linspace(0, len(steps) - 1, min(POINTS, len(steps))).round().long().unique())
    if subject.has_ratio and subject.config.guidance_scale == subject.config.rollout.guidance_scale:
        checks.append(_ratio(subject, some))
    checks.append(_kl_gradient(subject, some))
    return checks + _loss_gradient(subject, rollout, steps, some)


def _rewards(subject: Subject) -> tuple[Rollout, list[Check]]:
    """The first small rollout, and what the rewards say of it."""
    config = subject.config.rollout
    per_prompt, prompts = min(max(config.images_per_prompt, 2), IMAGES), min(config.prompts, PROMPTS)
    shown = list[Images]()
    rollouts = subject.rollouts.aside(
        config.of_few(prompts, per_prompt),
        seed=keyed_generator("preflight", subject.config.seed).initial_seed(),
        on_images=lambda index, images, *rest: shown.append(images),
    )
    keep = Keep(predictions=True, negatives=subject.config.freezes_negative)
    try:
        first = rollout = rollouts.draw(0, lambda grid: keep)
    except RewardError as error:
        error.add_note(str(Check("rewards finite", False, "a reward failed; see above")))
        raise
    spread, seen = _spread(rollout), rollout.num_images
    while not spread and rollout.index + 1 < DRAWS:
        rollout = rollouts.draw(rollout.index + 1, lambda grid: keep)
        spread, seen = _spread(rollout), seen + rollout.num_images
    judged = first.rewards[first.judged]
    low, high = judged.min().item(), judged.max().item()
    failed = f", {num_failed} could not be judged" if (num_failed := first.num_images - len(judged)) else ""
    finite = Check("rewards finite", True, f"{first.num_images} images{failed}, {low:.4g} to {high:.4g}")
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
    canaries = list[Check]()
    if subject.config.monitor.canaries:
        canaries += canary_checks(subject.rollouts, first, shown[0], seed=subject.config.seed)
    return first, [finite, varying, *canaries]


def _spread(rollout: Rollout) -> float:
    """The widest range of rewards within a prompt; 0 where it is rounding."""
    rewards = rollout.rewards.view(int(rollout.group.max()) + 1, -1)
    failed = rewards.isnan()
    highest = rewards.masked_fill(failed, -math.inf).amax(dim=1)
    widest = (highest - rewards.masked_fill(failed, math.inf).amin(dim=1)).max().item()
    return widest if widest > ZERO * rewards[~failed].abs().max().item() else 0.0


def _steps(subject: Subject, rollout: Rollout) -> Steps:
    config = subject.config
    chosen, stands_for = choose_steps(
        rollout.trajectory.grid,
        rollout.num_images,
        config.steps,
        keyed_generator("preflight steps", config.seed),
        skips_clean_end=subject.skips_clean_end,
    )
    return steps_of(rollout, chosen, stands_for, is_frozen=config.freezes_negative)


@torch.no_grad()
def _ratio(subject: Subject, steps: Steps) -> Check:
    model, kernel = subject.run.model, training_kernel(subject.run.model, subject.config.rollout)
    _, transition = replayed(model, steps, kernel, guidance_scale=subject.config.guidance_scale)
    ratio = ((transition.log_prob(steps.x_s) - steps["log_prob"]) / transition.num_dims).exp()
    error = (ratio - 1).abs().max().item()
    tolerance = HALF_RATIO_TOLERANCE if computes_in(model, torch.float16, torch.bfloat16) else RATIO_TOLERANCE
    return Check(
        "ratio 1 on replay",
        error <= tolerance,
        f"off by {error:.1g} per dimension, {tolerance:g} is allowed",
        "the network does not repeat what it drew: switch off what is random in it (dropout), or compute in float32",
    )


def _kl_gradient(subject: Subject, steps: Steps) -> Check:
    model, parameters = subject.run.model, subject.run.policy.parameters
    kernel, guidance = subject.kernel, subject.config.guidance_scale
    with subject.run.policy.reference():
        reference, _ = replayed(model, steps, kernel, guidance_scale=guidance)

    def gradient_norm() -> float:
        noise_pred, _ = replayed(model, steps, kernel, guidance_scale=guidance)
        return norm_of(gradient_of(step_cost(model, noise_pred, reference, steps, kernel).mean(), parameters))

    return kl_gradient_check(
        gradient_norm,
        parameters,
        seed=subject.config.seed,
        starts_elsewhere=subject.config.adapter.reference == "base",
    )


def _loss_gradient(subject: Subject, rollout: Rollout, steps: Steps, some: Steps) -> list[Check]:
    """Whether the loss reaches what is trained; its graph also tells what memory a step takes."""
    model, parameters = subject.run.model, subject.run.policy.parameters
    signs = 1.0 - 2.0 * (torch.arange(len(some), device=some.x_t.device) % 2)
    generator = keyed_generator("preflight slope", subject.config.seed)
    shape, device = some["prediction"].shape, some.x_t.device
    direction = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
    # Some losses are flat where the policy predicts what the rollout did, so the rollout gets another prediction.
    prepared = some.knowing(
        **dict.fromkeys(subject.said, some["prediction"]),
        worth=signs,
        advantage=signs,
        cost_weight=torch.zeros_like(signs),
        slope=direction,
        prediction=some["prediction"] + direction,
    )
    saved = SavedBytes(model.denoiser.parameters())
    with saved.counting():
        loss = subject.loss(prepared).loss
    reaches = gradient_check(loss, parameters, is_lora=subject.config.adapter.train == "lora")
    return [reaches, _memory(subject, rollout, steps, graph=saved.total / len(some))]


def _memory(subject: Subject, rollout: Rollout, steps: Steps, *, graph: float) -> Check:
    settings, num_steps = subject.config, subject.images * subject.trained_steps
    learning = settings.learning
    estimate = MemoryEstimate(
        image=tensor_bytes(rollout.trajectory) / rollout.num_images,
        images=subject.images,
        step=tensor_bytes(steps) / len(steps),
        steps=num_steps,
        graph=graph,
        rows=num_steps if settings.steps.keep_graph else subject.micro_batch,
        parameter=GRADIENT + MOMENTS[learning.optimizer] + (0 if learning.ema_decay is None else AVERAGE),
        parameters=sum(own_part(parameter).numel() for parameter in subject.run.policy.parameters),
    )
    free = free_bytes(subject.run.model.device)
    return Check(
        "memory",
        free is None or estimate.total < free,
        f"{estimate}" + ("" if free is None else f"; {readable_bytes(free)} are free"),
        "lower learning.micro_batch or rollout.prompts, set steps.keep_graph: false, or "
        "adapter.gradient_checkpointing: true",
    )
