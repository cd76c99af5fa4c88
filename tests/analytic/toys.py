"""A checkpoint whose every quantity is known: one-dimensional data, the exact score, and a correction to be learnt.

A policy's score is the data's own plus a correction, an `nn.Module` of (x_t, alpha, sigma, time). Each pixel of a
latent is a sample of its own: one image of 1 x 20000 pixels is twenty thousand samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rpo.process.continuous import grid_at, uniform_times
from rpo.process.prediction import from_x0_eps
from rpo.process.schedule import Process, RectifiedFlow, VariancePreserving
from rpo.types import Canvas, Conditioning, Grid, Images, Latents, Node, PredictionType
from tests.analytic.closed_forms import Mixture, Reward, memory, optimal_value

CONTRAST = 0.01
"""Brightness of a unit of x: images are 0.5 + CONTRAST x."""


def linear_vp(first_beta: float = 0.1, last_beta: float = 20.0, *, num_train_timesteps: int = 1000) -> Process:
    """The linear-beta schedule on [0, 1]; more training timesteps let the network be asked nearer to the data."""
    knots = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    return VariancePreserving((-first_beta * knots - 0.5 * (last_beta - first_beta) * knots**2).exp(), 1.0)


class OptimalControl(nn.Module):
    """The correction that attains V*: the control eta g ∇V*/beta is this change of score."""

    def __init__(self, prior: Mixture, reward: Reward, beta: float, eta: float):
        super().__init__()
        self.problem = {"prior": prior, "reward": reward, "beta": beta, "eta": eta}
        self.factor = 2 * eta**2 / ((1 + eta**2) * beta)

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, time: Tensor) -> Tensor:
        if len(self.problem["prior"].means) == 1:
            return self.factor * self._slope(x_t, alpha, sigma)
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            (slope,) = torch.autograd.grad(optimal_value(x_t, alpha, sigma, **self.problem).sum(), x_t)
        return self.factor * slope

    def _slope(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        prior, eta = self.problem["prior"], self.problem["eta"]
        phi, variance, _ = memory(prior.variances[0], alpha, sigma, eta)
        mu = prior.means[0] + phi * (x_t - alpha * prior.means[0])
        return phi * self.problem["reward"].slope(mu, variance, self.problem["beta"])


class LinearCorrection(nn.Module):
    """Two parameters: the change of score theta[0] + theta[1] (x_t - alpha mean)."""

    def __init__(self, mean: float, theta: tuple[float, float] = (0.0, 0.0)):
        super().__init__()
        self.mean, self.theta = mean, nn.Parameter(torch.tensor(theta))

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, time: Tensor) -> Tensor:
        return self.theta[0] + self.theta[1] * (x_t - alpha * self.mean)


class ToyDenoiser(nn.Module):
    """A network that puts out the exact score of the prior, plus its correction, as any prediction type."""

    def __init__(self, prior: Mixture, process: Process, correction: nn.Module | None, prediction_type: PredictionType):
        super().__init__()
        self.prior, self.process, self.correction = prior, process, correction
        self.prediction_type: PredictionType = prediction_type

    def forward(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        time = time_of(self.process, timestep)
        at = [values.to(x_t.dtype) for values in (self.process.alpha(time), self.process.sigma(time), time)]
        alpha, sigma, time = (values.view(-1, 1, 1, 1) if values.ndim else values for values in at)
        score, x_0 = self.prior.score(x_t, alpha, sigma), self.prior.posterior_mean(x_t, alpha, sigma)
        if self.correction is not None:
            change = self.correction(x_t, alpha, sigma, time)
            score, x_0 = score + change, x_0 + sigma**2 / alpha * change
        return from_x0_eps(x_0, -sigma * score, Node(alpha, sigma, time), self.prediction_type)


def time_of(process: Process, timestep: Tensor) -> Tensor:
    """The continuous time of what the network is told; of the time just before clean data where several share it."""
    assert isinstance(process, RectifiedFlow | VariancePreserving)
    offset = 0 if isinstance(process, RectifiedFlow) else 1
    return ((timestep.double() + offset) / process.num_train_timesteps).clamp(process.end, process.start)


class ToyModel:
    """The toy as a `DiffusionModel`; give the correction to be trained, and latents as wide as samples are wanted."""

    canvas = Canvas(1, 1)
    device = torch.device("cpu")
    guidance = "cfg"

    def __init__(
        self,
        prior: Mixture,
        process: Process,
        correction: nn.Module | None = None,
        prediction_type: PredictionType = "epsilon",
        *,
        latent_shape: tuple[int, int, int] = (1, 1, 1),
    ):
        assert isinstance(process, RectifiedFlow | VariancePreserving)
        self.prior, self.process, self.prediction_type = prior, process, prediction_type
        self.denoiser = ToyDenoiser(prior, process, correction, prediction_type)
        self.num_train_timesteps = process.num_train_timesteps
        self.shape = latent_shape

    def latent_shape(self, canvas: Canvas | None = None) -> tuple[int, int, int]:
        return self.shape

    def flow_shift(self, num_steps: int, canvas: Canvas | None = None) -> float:
        return 1.0

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Of a variance-preserving process, for solvers of diffusers."""
        knots = torch.arange(self.num_train_timesteps + 1, dtype=torch.float64) / self.num_train_timesteps
        abar = self.process.alpha(knots) ** 2
        return {
            "num_train_timesteps": self.num_train_timesteps,
            "trained_betas": (1 - abar[1:] / abar[:-1]).tolist(),
            "prediction_type": self.prediction_type,
            "timestep_spacing": "trailing",
        }

    def grid(self, num_steps: int, canvas: Canvas | None = None) -> Grid:
        return grid_at(self.process, uniform_times(self.process, num_steps))

    def node(self, timestep: Tensor) -> Node:
        time = time_of(self.process, timestep)[:, None, None, None]
        return Node(self.process.alpha(time).float(), self.process.sigma(time).float(), timestep[:, None, None, None])

    def encode_prompts(self, prompts: Sequence[str], *, negative_prompt: str = "") -> Conditioning:
        embeds = torch.zeros(len(prompts), 1, 1)
        return Conditioning({"tokens": embeds}, {"tokens": embeds})

    def predict(self, x_t: Latents, timestep: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Latents:
        """The prompt changes nothing, so guidance does not either."""
        return self.denoiser(x_t, timestep)

    def guided(self, negative_pred: Latents, prompt_pred: Latents, guidance_scale: float) -> Latents:
        return prompt_pred

    def encode_moments(self, images: Images) -> tuple[Latents, Latents]:
        x_0 = x_of(images)
        return x_0, torch.zeros_like(x_0)

    def decode(self, latents: Latents) -> Images:
        """Grey images, differentiable and not clamped; as many pixels as the latents have."""
        return (0.5 + CONTRAST * latents).expand(-1, 3, -1, -1)


def x_of(images: Images) -> Latents:
    """The latents that `decode` made grey."""
    return (images.mean(dim=1, keepdim=True) - 0.5) / CONTRAST


@dataclass(frozen=True)
class ImageReward:
    """A reward of x as one of images, for trainers: the mean over an image's samples."""

    reward: Reward

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self.reward(x_of(images)).mean(dim=(1, 2, 3))
