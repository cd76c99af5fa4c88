"""What rewards say of images that show nothing, and of captions that belong to others.

A reward that reads prompts is a judge: told another prompt, it says something else. One that prefers noise to what the
model draws would teach the model to draw noise, so it is refused. What looks at images alone, such as their size as
JPEG, may like what it likes: it is told, and taken.
"""

from collections.abc import Iterator, Sequence

import torch

from rpo.evaluation.drift import moved
from rpo.randomness import keyed_generator
from rpo.rewards.base import WeightedRewards
from rpo.trainers.checks.preflight import Check
from rpo.types import Images, PerSample

CLEARLY = 2.4
"""From which z on noise is preferred: of eight images, all or nearly all."""

GREY = 0.5


def canary_checks(
    rewards: WeightedRewards, images: Images, prompts: Sequence[str], *, per_group: int, seed: int
) -> Iterator[Check]:
    """One for each reward that is to be raised.

    Args:
        images: Drawn by the model, those of a prompt beside each other.
        per_group: Images of a prompt.
        seed: Of the noise.
    """
    generator = keyed_generator("canary", seed)
    noise = torch.rand(images.shape, generator=generator, dtype=torch.float32, device="cpu").to(images)
    swapped = [*prompts[per_group:], *prompts[:per_group]]
    shown = {
        "drawn": (images, list(prompts)),
        "noise": (noise, list(prompts)),
        "blank": (torch.full_like(images, GREY), list(prompts)),
        "others' prompts": (images, swapped),
    }
    answers = {name: rewards.ask(*both, may_fail=True) for name, both in shown.items()}
    for name, weight in rewards.weights.items():
        said = {kind: found[name].values for kind, found in answers.items()}
        if weight > 0 and not any(values.isnan().all() for values in said.values()):
            yield _check(name, said)


def _check(name: str, said: dict[str, PerSample]) -> Check:
    drawn, preferred = said["drawn"], moved(said["drawn"], said["noise"])
    others = said["others' prompts"]
    is_judge = bool(((others != drawn) & ~others.isnan() & ~drawn.isnan()).any())
    told = ", ".join(f"{kind} {values.nanmean().item():.4g}" for kind, values in said.items())
    return Check(
        f"canaries of {name}",
        not (is_judge and preferred is not None and preferred.z > CLEARLY),
        told + ("" if is_judge else "; it does not read prompts"),
        "it prefers noise to what the model draws, and would teach it to: look at what it says of some images, at "
        "their range and their prompts; where noise is what is wanted, give monitor.canaries: false",
    )
