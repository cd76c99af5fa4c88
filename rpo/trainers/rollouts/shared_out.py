"""A rollout that is in use, shared out anew: what N processes have drawn, for M that go on with it.

Of every step each process has its images, in the order of the processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rpo.trainers.rollouts.steps import Steps
from rpo.types import Conditioning, Node, join_conditioning


def shared_out(every: Sequence[Steps], process: int, processes: int) -> Steps:
    """The steps of one of so many processes, from those of all that there were."""
    images, total = len(every[0].of_images), sum(len(one.of_images) for one in every)
    trained, size = len(every[0]) // images, total // processes
    own = slice(process * size, (process + 1) * size)

    def dealt(*parts: Tensor) -> Tensor:
        """Rows of steps, [trained × images, …]."""
        return torch.cat([one.unflatten(0, (trained, images)) for one in parts], dim=1)[:, own].flatten(0, 1)

    def rows(name: str) -> Tensor:
        return dealt(*(vars(one)[name] for one in every))

    def words(name: str) -> tuple[str, ...]:
        starts = range(0, len(every[0]), images)
        steps = [[word for one in every for word in vars(one)[name][row : row + images]] for row in starts]
        return tuple(word for step in steps for word in step[own])

    def node(name: str) -> Node:
        fields = vars(vars(every[0])[name])
        return Node(**{field: dealt(*(vars(vars(one)[name])[field] for one in every)) for field in fields})

    conditioning: Conditioning = join_conditioning([one.of_images for one in every]).select(own)
    return Steps(
        x_t=rows("x_t"),
        x_s=rows("x_s"),
        step=rows("step"),
        weight=rows("weight"),
        counts=rows("counts"),
        names=words("names"),
        prompts=words("prompts"),
        t=node("t"),
        s=node("s"),
        of_images=conditioning,
        image=torch.arange(size, device=every[0].image.device).repeat(trained),
        known=tree_map(dealt, *(dict(one.known) for one in every)),
        # Some are those of all, others a process's own part of their mean.
        facts=tree_map(lambda *parts: torch.stack(parts).mean(dim=0), *(dict(one.facts) for one in every)),
    )
