"""The reference's two errors of a visit, computed once and kept: no policy, beta or learning rate changes them.

Worth its file when draws repeat (`draws_per_pair`): from the second epoch on, and in every later run over the same
set, an update costs one forward and one backward instead of two forwards and one backward.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from rpo.data.store import TensorStore
from rpo.trainers.pair_batches import PairBatch


@final
class ReferenceErrors:
    """Errors `[chosen, rejected]` of the reference, by visit."""

    def __init__(self, folder: Path, model_key: str):
        """Open or create the file.

        Args:
            folder: Where `reference_errors.sqlite` lies.
            model_key: Fingerprint of everything that determines the reference's prediction.
        """
        self._store = TensorStore(folder / "reference_errors.sqlite")
        self._model_key = model_key
        self._memory: dict[str, Tensor] = {}
        self.computed = 0

    def of(self, batch: PairBatch, compute: Callable[[PairBatch], Tensor]) -> Tensor:
        """The errors of a micro-batch, `[2 · batch]`: chosen sides, then rejected ones.

        A micro-batch with a visit that is not known is computed as a whole, and read back once to be kept.

        Args:
            batch: The visits.
            compute: From the batch to its errors under the reference.
        """
        self._read([draw for draw in batch.draws if draw not in self._memory])
        if any(draw not in self._memory for draw in batch.draws):
            errors = compute(batch).float().cpu().view(2, -1)
            self.computed += len(batch.draws)
            self._store.save({self._key(draw): errors[:, row] for row, draw in enumerate(batch.draws)})
            # The store keeps what it had, and last bits change with a visit's company: what a resumed run will read
            # has to be used now.
            self._read(batch.draws)
        known = torch.stack([self._memory[draw] for draw in batch.draws], dim=1)
        return known.flatten().to(batch.x_0.device)

    def _read(self, draws: Sequence[str]) -> None:
        keys = {draw: self._key(draw) for draw in draws}
        stored = self._store.load(list(keys.values()))
        self._memory |= {draw: stored[key] for draw, key in keys.items() if key in stored}

    def _key(self, draw: str) -> bytes:
        return hashlib.sha256(f"{self._model_key}/{draw}".encode()).digest()
