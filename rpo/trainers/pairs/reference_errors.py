"""The reference's two errors of a visit, computed once and kept: no policy, beta or learning rate changes them.

Worth its file when draws repeat (`draws_per_pair`): from the second epoch on, and in every later run over the same
set, an update costs one forward and one backward instead of two forwards and one backward.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from rpo.data.store import TensorStore
from rpo.devices import uploaded
from rpo.trainers.pairs.batches import PairBatch


@final
class ReferenceErrors:
    """Errors `[chosen, rejected]` of the reference, by visit."""

    def __init__(self, folder: Path, model_key: str):
        """Open or create the file."""
        self._store = TensorStore(folder / "reference_errors.sqlite")
        self._model_key = model_key
        self.computed = 0

    def of(self, batch: PairBatch, compute: Callable[[PairBatch], Tensor]) -> Tensor:
        """The errors of a micro-batch, `[2 · batch]`: chosen sides, then rejected ones.

        A micro-batch with a visit that is not known is computed as a whole, and read back once to be kept.
        """
        keys = [self._key(draw) for draw in batch.draws]
        known = self._store.load(keys)
        if any(key not in known for key in keys):
            errors = compute(batch).float().cpu().view(2, -1)
            self.computed += len(batch.draws)
            fresh = {key: errors[:, row] for row, key in enumerate(keys)}
            self._store.save(fresh)
            # The store keeps what it had, and last bits change with a visit's company: what a resumed run will read
            # has to be used now.
            known = fresh | self._store.load(keys)
        return uploaded(torch.stack([known[key] for key in keys], dim=1).flatten(), batch.x_0.device)

    def _key(self, draw: str) -> bytes:
        return hashlib.sha256(f"{self._model_key}/{draw}".encode()).digest()
