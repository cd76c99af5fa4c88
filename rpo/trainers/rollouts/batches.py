"""From rollouts to the micro-batches of updates: which steps of a rollout an update learns from, and in what order.

What is in an update depends on images and steps alone, not on the process that holds them: N processes together learn
what one would.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from rpo.devices import uploaded
from rpo.randomness import keyed_generator
from rpo.trainers.rollouts.settings import RolloutConfig, StepsConfig
from rpo.trainers.rollouts.shared_out import shared_out
from rpo.trainers.rollouts.steps import Steps
from rpo.training.state import SharedOut, WrittenOnce


@final
class StepBatches(WrittenOnce, SharedOut):
    """The endless micro-batches of an online trainer, for `fit`; draws a rollout when the last is used up.

    A rollout that serves several updates is part of the state, since after a kill it could not be drawn again: the
    policy has moved. Nothing writes to it, so that no copies are taken.
    """

    def __init__(
        self,
        prepare: Callable[[int], Steps],
        again: Callable[[Steps], Steps],
        live: Callable[[Steps], Iterator[Steps]],
        config: StepsConfig,
        *,
        rollout: RolloutConfig,
        accumulate: int,
        seed: int,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
    ):
        """Prepare.

        Args:
            prepare: Draws a rollout, by its number, and says what its steps are worth.
            again: Says so anew before each further update that it serves.
            live: Splits the steps into micro-batches that carry the graph of the rollout; used with `keep_graph`.
        """
        self._prepare, self._again, self._live, self._config = prepare, again, live, config
        self._rollout, self._share = rollout, share
        self._accumulate, self._seed, self._device = accumulate, seed, device
        self._kept: Steps | None = None

    def __call__(self, first_update: int) -> Iterator[Steps]:
        """Micro-batches from the update after `first_update` updates on."""
        config = self._config
        update = first_update
        while True:
            index, turn = divmod(update, config.updates_per_rollout)
            drawn = self._prepare(index) if turn == 0 else self._kept
            assert drawn is not None, "a rollout that serves several updates is part of the state"
            self._kept = drawn if turn + 1 < config.updates_per_rollout else None
            steps = self._again(drawn) if turn else drawn
            yield from self._live(steps) if config.keep_graph else self._update(steps, index, turn)
            update += 1

    def _update(self, steps: Steps, index: int, turn: int) -> Iterator[Steps]:
        pass_, minibatch = divmod(turn, self._config.minibatches)
        part = self._order(steps, index, pass_)[minibatch :: self._config.minibatches]
        there = uploaded(part, steps.x_t.device)
        for rows, on_device in zip(part.chunk(self._accumulate), there.chunk(self._accumulate), strict=True):
            yield steps.select(rows, on_device=on_device)

    def _order(self, steps: Steps, index: int, pass_: int) -> Tensor:
        """The steps prompt by prompt, those of each prompt shuffled; every n-th of them is a part of the rollout.

        Which part a step is in depends on its image and step alone: the share of every process has a multiple of n.
        """
        process, processes = self._share
        images = self._rollout.images // processes
        rows = torch.arange(len(steps)).view(-1, images).T
        generator = keyed_generator("points", self._seed, index, pass_)
        shape = (self._rollout.images, rows.shape[1])
        everyone = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
        draws = everyone[process * images : (process + 1) * images]
        of_a_prompt = self._rollout.images_per_prompt * rows.shape[1]
        order = draws.reshape(-1, of_a_prompt).argsort(dim=1)
        return rows.reshape(-1, of_a_prompt).gather(1, order).flatten()

    def state_dict(self) -> dict[str, Any]:
        """The rollout in use, if it serves further updates."""
        return {} if self._kept is None else self._kept.state_dict()

    def shared_out(self, states: Sequence[dict[str, Any]], process: int, processes: int) -> dict[str, Any]:
        """The images of the rollout in use, in other shares."""
        every = [Steps.of_state_dict(state, torch.device("cpu")) for state in states if state]
        return shared_out(every, process, processes).state_dict() if every else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue within a rollout."""
        self._kept = Steps.of_state_dict(state_dict, self._device) if state_dict else None
