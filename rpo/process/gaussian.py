"""Latents with Gaussian noise: x_t = alpha x_0 + sigma eps, of which an output is one linear view."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rpo.errors import InputError
from rpo.process.categorical import Order
from rpo.process.continuous import running_cost
from rpo.process.prediction import Reduction, Weight, add_noise, from_x0_eps, squared_error, to_x0_eps, x0_slope
from rpo.process.transition import Ddim, EulerMaruyama, Kernel, Step, Transition
from rpo.types import Latents, Node, Output, PerSample, PredictionType


@dataclass(frozen=True)
class GaussianDiffusion:
    """See `rpo.process.diffusion.Diffusion`."""

    prediction_type: PredictionType

    is_gaussian = True

    @property
    def reversal(self) -> Kernel:
        """Ancestral sampling."""
        return Ddim(1.0)

    def kernel(self, solver: str, eta: float, order: Order = "policy") -> Kernel:
        """A multistep solver's is the DDIM step, its first order."""
        if order != "policy":
            raise InputError(f"the order is the {order}'s, but latents have none; expected a model of tokens")
        return EulerMaruyama(eta) if solver == "euler_maruyama" else Ddim(eta)

    def num_dims(self, shape: tuple[int, ...]) -> int:
        """All of them."""
        return torch.Size(shape).numel()

    def start(self, noise: Latents) -> Latents:
        """Itself."""
        return noise

    def noised(self, x_0: Latents, noise: Latents, node: Node) -> Latents:
        """Their sum."""
        return add_noise(x_0, noise, node)

    def target(self, x_0: Latents, noise: Latents, node: Node) -> Latents:
        """The view of the true pair."""
        return from_x0_eps(x_0, noise, node, self.prediction_type)

    def x0_hat(self, output: Output, x_t: Latents, node: Node) -> Latents:
        """The clean half of the view."""
        return to_x0_eps(output, x_t, node, self.prediction_type)[0]

    def error(
        self, output: Output, target: Output, x_t: Latents, weight: Weight = None, *, reduction: Reduction = "mean"
    ) -> PerSample:
        """Squared."""
        return squared_error(output, target, weight, reduction=reduction)

    def x0_error(self, output: Output, target: Output, x_t: Latents, node: Node) -> tuple[PerSample, PerSample]:
        """Of both clean halves."""
        gap = self.x0_hat(output, x_t, node) - self.x0_hat(target, x_t, node)
        return gap.square().mean(dim=(1, 2, 3)), gap.abs().mean(dim=(1, 2, 3))

    def x0_slope(self, node: Node) -> Tensor:
        """A function of the node alone."""
        return x0_slope(node, self.prediction_type)

    def gap(self, output: Output, other: Output, x_t: Latents) -> Latents:
        """Their difference."""
        return output - other

    def mean(self, values: Output, x_t: Latents) -> PerSample:
        """Over all of them."""
        return values.mean(dim=(1, 2, 3))

    def transition(self, output: Output, x_t: Latents, t: Node, s: Node, kernel: Step) -> Transition:
        """By what the output says of data and noise."""
        x0_hat, eps_hat = to_x0_eps(output, x_t, t, self.prediction_type)
        return kernel(x0_hat, eps_hat, t, s)

    def running_cost(self, output: Output, other: Output, x_t: Latents, t: Node, s: Node) -> PerSample:
        """An ODE has no KL along its path; what is charged is the cost of the same change of score at noise level 1."""
        _, eps_hat = to_x0_eps(output, x_t, t, self.prediction_type)
        _, eps_other = to_x0_eps(other, x_t, t, self.prediction_type)
        return running_cost(eps_hat, eps_other, t, s, eta=0.0)
