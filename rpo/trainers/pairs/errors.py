"""What policy and reference say about a micro-batch of pairs, and how wrong they are: one forward for both sides.

No policy, beta or learning rate changes the reference's errors. Where draws repeat (`draws_per_pair`) they are worth a
file: from the second epoch on, and in every later run over the same set, an update costs one forward and one backward
instead of two forwards and one backward.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.data.store import TensorStore
from rpo.devices import uploaded
from rpo.models.base import DiffusionModel
from rpo.process.diffusion import Diffusion, diffusion_of
from rpo.process.prediction import Reduction
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.pairs.batches import PairBatch, PairBatches
from rpo.trainers.trainer import Run
from rpo.types import Node


@dataclass(frozen=True)
class Denoised:
    """Prediction and target of each of the 2N latents, all chosen sides first."""

    noise_pred: Float[Tensor, "twice_batch _ h w"]
    target: Float[Tensor, "twice_batch _ h w"]
    mask: Float[Tensor, "twice_batch 1 h w"] | None
    """How much each place counts."""
    x_t: Float[Tensor, "twice_batch c h w"]
    diffusion: Diffusion

    def errors(self, reduction: Reduction = "mean") -> Float[Tensor, " twice_batch"]:
        """How wrong each is."""
        return self.diffusion.error(self.noise_pred, self.target, self.x_t, self.mask, reduction=reduction)

    def apart(self, other: "Denoised", weight: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
        """How far each is from what another network says."""
        return self.diffusion.error(self.noise_pred, other.noise_pred, self.x_t, weight, reduction=reduction)

    def residuals(self) -> tuple[Tensor, Tensor]:
        """Prediction minus target, weighted, chosen and rejected, without gradient."""
        residual = self.diffusion.gap(self.noise_pred.detach(), self.target, self.x_t)
        chosen, rejected = (residual if self.mask is None else self.mask * residual).chunk(2)
        return chosen, rejected


def denoise(model: DiffusionModel, batch: PairBatch, mask: Tensor | None = None) -> Denoised:
    """One denoiser forward on both sides of every pair: x_t = alpha x_0 + sigma eps, and what it is taken for."""
    timestep, eps = torch.cat([batch.timestep, batch.timestep]), torch.cat([batch.eps, batch.eps])
    node: Node = model.node(timestep)
    rows = torch.arange(len(timestep), device=timestep.device) % len(batch.timestep)
    cond = batch.conditioning.select(rows).told(batch.sizes)
    diffusion = diffusion_of(model.prediction_type)
    x_t, target = diffusion.noised(batch.x_0, eps, node), diffusion.target(batch.x_0, eps, node)
    return Denoised(model.predict(x_t, timestep, cond), target, mask, x_t, diffusion)


@final
class ReferenceErrors:
    """Errors `[chosen, rejected]` of the reference, by visit."""

    def __init__(self, folder: Path, model_key: str, any_lacks: Callable[[bool], bool] = bool):
        """Open or create the file.

        Args:
            any_lacks: From whether this process has to compute to whether it does, where several do so together.
        """
        self._any_lacks = any_lacks
        self._store = TensorStore(folder / "reference_errors.sqlite")
        self._model_key = model_key
        self.computed = 0

    def of(self, batch: PairBatch, compute: Callable[[PairBatch], Tensor]) -> Tensor:
        """The errors of a micro-batch, `[2 · batch]`: chosen sides, then rejected ones.

        A micro-batch with a visit that is not known is computed as a whole, and read back once to be kept.
        """
        keys = [self._key(draw) for draw in batch.draws]
        known = self._store.load(keys)
        if self._any_lacks(any(key not in known for key in keys)):
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


@final
class Reference:
    """What the policy is compared with: the model without what was learnt.

    Attributes:
        kept: Its errors that are on disk, or None where no draw repeats.
    """

    def __init__(self, model: DiffusionModel, config: DPOConfig, folder: Path, run: Run):
        """Name the model behind the errors that are kept in `folder`, by what identifies it."""
        self._model, self._policy, self._processes = model, run.policy, run.processes
        self._is_divided = config.learning.sharding != "none"
        self._needed = config.objective.needs_reference
        self._reduction: Reduction = config.objective.reduction
        self._folder, self._name = folder, f"{sorted(run.base.items())}"
        repeats = config.draws_per_pair is not None
        self.kept = self._errors_by(f"{self._reduction} {config.region}") if repeats else None

    def denoise(self, batch: PairBatch, mask: Tensor | None = None) -> Denoised:
        """Its prediction, without gradient."""
        with self._policy.reference():
            return denoise(self._model, batch, mask)

    def of(self, batch: PairBatch, mask: Tensor | None) -> tuple[tuple[Tensor, Tensor] | None, Denoised | None]:
        """Its errors, chosen and rejected, if the objective asks for them; its prediction where that was computed."""
        if not self._needed:
            return None, None
        answer = None
        if self.kept is not None:
            errors = self.kept.of(batch, lambda batch: self.denoise(batch, mask).errors(self._reduction))
        else:
            answer = self.denoise(batch, mask)
            errors = answer.errors(self._reduction)
        chosen, rejected = errors.chunk(2)
        return (chosen, rejected), answer

    def mid_time(self, batches: PairBatches) -> Float[Tensor, " pairs"]:
        """Its error at mid-time, mean over the two sides of each pair; the same on every process and when resumed."""
        processes, pairs = self._processes, range(len(batches.pairs))
        sized = batches.by_size(pairs if self._is_divided else pairs[processes.index :: processes.count])
        size, kept = batches.share.micro_batch, self._errors_by("mid-time")
        known: dict[int, float] = {}
        for some in (own[start : start + size] for own in sized for start in range(0, len(own), size)):
            both = kept.of(batches.midway(some), lambda batch: self.denoise(batch).errors()).view(2, -1).mean(dim=0)
            known |= dict(zip(some, both.tolist(), strict=True))
        everyone = {index: value for part in processes.gather(known) for index, value in part.items()}
        return torch.tensor([everyone[index] for index in range(len(batches.pairs))])

    def _errors_by(self, weighting: str) -> ReferenceErrors:
        together = self._processes.any if self._is_divided else bool
        return ReferenceErrors(self._folder, f"{self._name}/{weighting}", together)
