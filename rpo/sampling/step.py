"""One reverse step, written once: what `sample` draws by, and what trainers replay with a gradient.

Because both are these two functions, a policy that has not changed gives the very mean that a step was drawn with, and
a likelihood ratio of exactly 1, as long as the network is asked about batches of one size: other sizes are other
kernels, whose last bits differ.
"""

import torch

from rpo.models.base import DiffusionModel
from rpo.process.diffusion import diffusion_of
from rpo.process.transition import Kernel, Transition
from rpo.types import Conditioning, Latents, Node, Output


def predict(
    model: DiffusionModel,
    x_t: Latents,
    node: Node,
    cond: Conditioning,
    *,
    guidance_scale: float,
    negative_pred: Output | None = None,
) -> Output:
    """The guided network output, with its gradient, at any mixture of moments.

    Args:
        negative_pred: The output under the negative conditioning, where it is known; then only the prompt's branch is
            computed and differentiated.
    """
    timestep = _told(node)
    if negative_pred is None or not has_negative(model, guidance_scale):
        return model.predict(x_t, timestep, cond, guidance_scale)
    return model.guided(negative_pred, model.predict(x_t, timestep, cond, 1.0), guidance_scale)


def has_negative(model: DiffusionModel, guidance_scale: float) -> bool:
    """Whether a guided output is made of two, one of them under the negative conditioning."""
    return model.guidance == "cfg" and guidance_scale != 1


@torch.no_grad()
def predict_negative(model: DiffusionModel, x_t: Latents, node: Node, cond: Conditioning) -> Output:
    """The output under the negative conditioning, without gradient."""
    return model.predict(x_t, _told(node), cond.only_negative(), 1.0)


def transition(model: DiffusionModel, noise_pred: Output, x_t: Latents, t: Node, s: Node, kernel: Kernel) -> Transition:
    """p(x_s | x_t) by a network output at x_t."""
    return diffusion_of(model.prediction_type).transition(noise_pred, x_t, t, s, kernel)


def _told(node: Node) -> torch.Tensor:
    """What the network is told of the time: one number, or one per sample."""
    return node.timestep.flatten() if node.timestep.ndim else node.timestep
