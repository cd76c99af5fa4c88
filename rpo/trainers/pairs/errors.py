"""What the denoiser says about a micro-batch of pairs, and how wrong it is: one forward for both sides."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.models.base import DiffusionModel
from rpo.objectives.preference import squared_error
from rpo.process.prediction import add_noise, from_x0_eps
from rpo.trainers.pairs.batches import PairBatch
from rpo.types import Node


@dataclass(frozen=True)
class Denoised:
    """Prediction and target of each of the 2N latents, all chosen sides first."""

    noise_pred: Float[Tensor, "twice_batch c h w"]
    target: Float[Tensor, "twice_batch c h w"]


def denoise(model: DiffusionModel, batch: PairBatch) -> Denoised:
    """One denoiser forward on both sides of every pair."""
    timestep, eps = torch.cat([batch.timestep, batch.timestep]), torch.cat([batch.eps, batch.eps])
    node: Node = model.node(timestep)
    cond = batch.conditioning.select(torch.arange(len(timestep), device=timestep.device) % len(batch.timestep))
    x_t = add_noise(batch.x_0, eps, node)
    target = from_x0_eps(batch.x_0, eps, node, model.prediction_type)
    return Denoised(model.predict(x_t, timestep, cond), target)


def errors(model: DiffusionModel, batch: PairBatch) -> Float[Tensor, " twice_batch"]:
    """Squared error of each of the 2N latents, all chosen sides first: one denoiser forward."""
    denoised = denoise(model, batch)
    return squared_error(denoised.noise_pred, denoised.target)
