"""What the denoiser says about a micro-batch of pairs, and how wrong it is: one forward for both sides.

No policy, beta or learning rate changes the reference's errors. Where draws repeat (`draws_per_pair`) they are worth a
file: from the second epoch on, and in every later run over the same set, an update costs one forward and one backward
instead of two forwards and one backward.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.data.store import TensorStore
from rpo.devices import uploaded
from rpo.models.base import DiffusionModel
from rpo.objectives.preference.base import squared_error
from rpo.process.prediction import add_noise, from_x0_eps
from rpo.trainers.pairs.batches import PairBatch
from rpo.types import Node


@dataclass(frozen=True)
class Denoised:
    """Prediction and target of each of the 2N latents, all chosen sides first."""

    noise_pred: Float[Tensor, "twice_batch c h w"]
    target: Float[Tensor, "twice_batch c h w"]
    mask: Float[Tensor, "twice_batch 1 h w"] | None
    """How much each place counts."""

    def errors(self, reduction: Literal["mean", "sum"] = "mean") -> Float[Tensor, " twice_batch"]:
        """Squared error of each."""
        return squared_error(self.noise_pred, self.target, self.mask, reduction=reduction)

    def residuals(self) -> tuple[Tensor, Tensor]:
        """Prediction minus target, weighted, chosen and rejected, without gradient."""
        residual = self.noise_pred.detach() - self.target
        chosen, rejected = (residual if self.mask is None else self.mask * residual).chunk(2)
        return chosen, rejected


def denoise(model: DiffusionModel, batch: PairBatch, mask: Tensor | None = None) -> Denoised:
    """One denoiser forward on both sides of every pair: x_t = alpha x_0 + sigma eps, and what it is taken for."""
    timestep, eps = torch.cat([batch.timestep, batch.timestep]), torch.cat([batch.eps, batch.eps])
    node: Node = model.node(timestep)
    cond = batch.conditioning.select(torch.arange(len(timestep), device=timestep.device) % len(batch.timestep))
    x_t = add_noise(batch.x_0, eps, node)
    target = from_x0_eps(batch.x_0, eps, node, model.prediction_type)
    return Denoised(model.predict(x_t, timestep, cond), target, mask)


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
