"""What noise does to a state, and what a network's output says of it: the one place that knows what a state is.

Everything above asks these questions of a diffusion and never looks inside a state, an output or a step, so that
latents with Gaussian noise and grids of tokens with masks go through the same samplers, objectives and trainers.
"""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from rpo.errors import InputError
from rpo.process.categorical import MaskedDiffusion, Order
from rpo.process.gaussian import GaussianDiffusion
from rpo.process.prediction import Reduction, Weight
from rpo.process.transition import Kernel, Step, Transition
from rpo.types import Latents, Node, Output, PerSample, PredictionType


@runtime_checkable  # for the tests, which check the types of arguments when functions run
class Diffusion(Protocol):
    """A forward process and how outputs are read on it; v is an output, v* that of a network that knows x_0."""

    @property
    def is_gaussian(self) -> bool:
        """Whether x_t = alpha x_0 + sigma eps, which integrators of an ODE or SDE need."""
        ...

    @property
    def reversal(self) -> Kernel:
        """The steps of the exact reversal, in which bounds on the likelihood are written."""
        ...

    def kernel(self, solver: str, eta: float, order: Order = "policy") -> Kernel:
        """The step of a solver at a noise level; of tokens, in whose order they are kept."""
        ...

    def num_dims(self, shape: tuple[int, ...]) -> int:
        """Of what errors are means, for states of this shape (c, h, w)."""
        ...

    def start(self, noise: Latents) -> Latents:
        """The state that is nothing but noise."""
        ...

    def noised(self, x_0: Latents, noise: Latents, node: Node) -> Latents:
        """x_t; unit Gaussian noise decides which."""
        ...

    def target(self, x_0: Latents, noise: Latents, node: Node) -> Output:
        """v*."""
        ...

    def x0_hat(self, output: Output, x_t: Latents, node: Node) -> Latents:
        """The clean state that an output believes in."""
        ...

    def error(
        self, output: Output, target: Output, x_t: Latents, weight: Weight = None, *, reduction: Reduction = "mean"
    ) -> PerSample:
        """How wrong an output is, by a target or another output; a weight is of each place."""
        ...

    def x0_error(self, output: Output, target: Output, x_t: Latents, node: Node) -> tuple[PerSample, PerSample]:
        """‖x̂_0 - x_0‖² / D, and the mean distance |x̂_0 - x_0|."""
        ...

    def x0_slope(self, node: Node) -> Tensor:
        """|∂x̂_0 / ∂v|, in the shape of the node."""
        ...

    def gap(self, output: Output, other: Output, x_t: Latents) -> Output:
        """What the gradient of half of the error multiplies the Jacobian of the output with: v - v*, for Gaussians."""
        ...

    def mean(self, values: Output, x_t: Latents) -> PerSample:
        """Over the dimensions of an output, as in `error`."""
        ...

    def transition(self, output: Output, x_t: Latents, t: Node, s: Node, kernel: Step) -> Transition:
        """p(x_s | x_t)."""
        ...

    def running_cost(self, output: Output, other: Output, x_t: Latents, t: Node, s: Node) -> PerSample:
        """What a change of output costs over a step that has no density."""
        ...


def diffusion_of(prediction_type: PredictionType) -> Diffusion:
    """The diffusion of a model, by what its network puts out."""
    return MaskedDiffusion() if prediction_type == "logits" else GaussianDiffusion(prediction_type)


def require_gaussian(model: Any, what: str, instead: str = "take `rpo train grpo`, `dpo` or `endpoint`") -> None:
    """Refuse a model of tokens for what needs latents with Gaussian noise."""
    if not diffusion_of(model.prediction_type).is_gaussian:
        raise InputError(
            f"{what} needs latents with Gaussian noise, but this model draws tokens; expected a diffusion or flow "
            f"model; {instead}"
        )
