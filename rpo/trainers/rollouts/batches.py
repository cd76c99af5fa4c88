"""From rollouts to the micro-batches of updates: which points of a rollout an update learns from, and in what order.

What is in an update depends on images and steps alone, not on the process that holds them: N processes together learn
what one would.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, final

import torch
from torch import Tensor

from rpo.devices import uploaded
from rpo.randomness import keyed_generator
from rpo.trainers.online_config import LearningConfig, RolloutConfig
from rpo.trainers.rollouts.points import Points
from rpo.training.state import WrittenOnce
from rpo.types import Conditioning, Node

_NO_TENSORS = ("t", "s", "of_images", "names", "prompts")


@final
class PointBatches(WrittenOnce):
    """The endless micro-batches of an online trainer, for `fit`; draws a rollout when the last is used up.

    A rollout that serves several updates is part of the state, since after a kill it could not be drawn again: the
    policy has moved. Nothing writes to it, so that no copies are taken.
    """

    def __init__(
        self,
        prepare: Callable[[int], Points],
        live: Callable[[Points], Iterator[Points]],
        config: LearningConfig,
        *,
        rollout: RolloutConfig,
        accumulate: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ):
        """Prepare.

        Args:
            live: Splits the points into micro-batches that carry the graph of the rollout; used with `keep_graph`.
        """
        self._prepare, self._live, self._config = prepare, live, config
        self._rollout, self._share = rollout, share
        self._accumulate, self._seed = accumulate, seed
        self._kept: Points | None = None

    def __call__(self, first_update: int) -> Iterator[Points]:
        """Micro-batches from the update after `first_update` updates on."""
        config = self._config
        update = first_update
        while True:
            index, turn = divmod(update, config.updates_per_rollout)
            points = self._prepare(index) if turn == 0 else self._kept
            assert points is not None, "a rollout that serves several updates is part of the state"
            self._kept = points if turn + 1 < config.updates_per_rollout else None
            yield from self._live(points) if config.keep_graph else self._update(points, index, turn)
            update += 1

    def _update(self, points: Points, index: int, turn: int) -> Iterator[Points]:
        pass_, minibatch = divmod(turn, self._config.minibatches)
        part = self._order(points, index, pass_)[minibatch :: self._config.minibatches]
        there = uploaded(part, points.x_t.device)
        for rows, on_device in zip(part.chunk(self._accumulate), there.chunk(self._accumulate), strict=True):
            yield points.select(rows, on_device=on_device)

    def _order(self, points: Points, index: int, pass_: int) -> Tensor:
        """The points prompt by prompt, those of each prompt shuffled; every n-th of them is a part of the rollout.

        Which part a point is in depends on its image and step alone: the share of every process has a multiple of n.
        """
        process, processes = self._share
        images = self._rollout.images // processes
        rows = torch.arange(len(points)).view(-1, images).T
        generator = keyed_generator("points", self._seed, index, pass_)
        shape = (self._rollout.images, rows.shape[1])
        everyone = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
        draws = everyone[process * images : (process + 1) * images]
        of_a_prompt = self._rollout.images_per_prompt * rows.shape[1]
        order = draws.reshape(-1, of_a_prompt).argsort(dim=1)
        return rows.reshape(-1, of_a_prompt).gather(1, order).flatten()

    def state_dict(self) -> dict[str, Any]:
        """The rollout in use, if it serves further updates."""
        if self._kept is None:
            return {}
        flat = {field.name: getattr(self._kept, field.name) for field in fields(Points) if field.name != "live"}
        nodes = {name: vars(flat.pop(name)) for name in ("t", "s")}
        return {
            **flat,
            **nodes,
            "of_images": vars(flat["of_images"]),
            "names": list(flat["names"]),
            "prompts": list(flat["prompts"]),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue within a rollout."""
        if not state_dict:
            self._kept = None
            return
        rest = {name: value for name, value in state_dict.items() if name not in _NO_TENSORS}
        self._kept = Points(
            **rest,
            t=Node(**state_dict["t"]),
            s=Node(**state_dict["s"]),
            of_images=Conditioning(**state_dict["of_images"]),
            names=tuple(state_dict["names"]),
            prompts=tuple(state_dict["prompts"]),
        )
