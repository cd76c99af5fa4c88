"""What rewards say of images that show nothing, and of captions that belong to others.

A reward that reads prompts is a judge: told another prompt, it says something else. One that finds noise better than
each of eight images that the model drew would teach the model to draw noise, so it is refused. What looks at images
alone, such as their size as JPEG, may like what it likes: it is told, and taken.
"""

from collections.abc import Iterator

import torch

from rpo.randomness import keyed_generator
from rpo.trainers.checks.preflight import Check
from rpo.trainers.rollouts.draw import Rollout, Rollouts
from rpo.types import Images, PerSample

GREY = 0.5

ENOUGH = 8
"""Drawn images from which on it is no chance that noise is better than each of them."""


def canary_checks(rollouts: Rollouts, drawn: Rollout, images: Images, *, seed: int) -> Iterator[Check]:
    """One for each reward that is to be raised.

    Args:
        drawn: A rollout, which has been judged.
        images: Its images.
        seed: Of the noise.
    """
    config, prompts = rollouts.config, list(drawn.prompts)
    per_prompt = int((drawn.group == 0).sum())
    noise = torch.rand(images.shape, generator=keyed_generator("canary", seed), dtype=torch.float32, device="cpu")
    shown = {
        "noise": (noise.to(images), prompts),
        "blank": (torch.full_like(images, GREY), prompts),
        "others' prompts": (images, [*prompts[per_prompt:], *prompts[:per_prompt]]),
    }
    answers = {
        kind: rollouts.rewards.ask(*both, may_fail=True, batch_size=config.reward_batch_size)
        for kind, both in shown.items()
    }
    for name, weight in rollouts.rewards.weights.items():
        if weight > 0:
            said = {kind: found[name].values for kind, found in answers.items()}
            yield _check(name, {"drawn": drawn.parts[name], **said})


def _check(name: str, said: dict[str, PerSample]) -> Check:
    drawn, noise, others = said["drawn"], said["noise"], said["others' prompts"]
    is_judge = bool(((others != drawn) & ~others.isnan() & ~drawn.isnan()).any())
    known = ~(drawn.isnan() | noise.isnan())
    prefers_noise = bool(known.sum() >= ENOUGH and (noise > drawn)[known].all())
    told = ", ".join(f"{kind} {values.nanmean().item():.4g}" for kind, values in said.items())
    return Check(
        f"canaries of {name}",
        not (is_judge and prefers_noise),
        told + ("" if is_judge else "; it does not read prompts"),
        "it finds noise better than all that the model draws, and would teach it to: look at what it says of some "
        "images, at their range and their prompts; where noise is what is wanted, give monitor.canaries: false",
    )
