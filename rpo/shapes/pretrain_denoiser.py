"""The UNet and the text encoder of the embedded checkpoint, trained together (arXiv:2006.11239, eq. 14).

The loss is the plain ||eps - eps_hat||^2 at uniform timesteps; one caption in ten is emptied, for classifier-free
guidance (arXiv:2207.12598). After a short warm-up the learning rate stays constant and a moving average of the weights
does what a decay would do. So every step's average is a finished model: training can stop, go on or be extended
anywhere, without a schedule that has to know its end.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel

from rpo.shapes.networks import build_scheduler
from rpo.shapes.pretrain_loop import Phase, Stateful, TrainingLog, linear_warmup, set_learning_rate, train
from rpo.shapes.pretrain_vae import Moments

EMPTY_CAPTION_RATE = 0.1
WARMUP_STEPS = 100
LONGEST_AVERAGE = 0.9995
"""Decay of the moving average once it has warmed up; before, it spans the last ninth of the run."""


@dataclass(frozen=True)
class Captioned:
    """The training set on its device: latents' moments, a row of token ids per image, those of the empty prompt."""

    moments: Moments
    token_ids: Tensor
    empty_ids: Tensor


@dataclass(frozen=True)
class TextToLatent:
    """The two networks that learn together, and the moving average of their weights."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    average_unet: UNet2DConditionModel = field(init=False)
    average_text_encoder: CLIPTextModel = field(init=False)

    def __post_init__(self) -> None:
        """Start the average at the networks themselves."""
        for name, network in (("average_unet", self.unet), ("average_text_encoder", self.text_encoder)):
            object.__setattr__(self, name, copy.deepcopy(network).requires_grad_(False).eval())

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [*self.unet.parameters(), *self.text_encoder.parameters()]

    def average_parameters(self) -> list[Tensor]:
        """Their averages, in the same order."""
        return [*self.average_unet.parameters(), *self.average_text_encoder.parameters()]

    def parts(self) -> dict[str, Stateful]:
        """Everything that changes in training, by name."""
        return {
            "unet": self.unet,
            "text_encoder": self.text_encoder,
            "average_unet": self.average_unet,
            "average_text_encoder": self.average_text_encoder,
        }


def average_decay(step: int) -> float:
    """How much of the moving average stays at `step`: it warms up, so that the random start is forgotten at once."""
    return min(LONGEST_AVERAGE, (1 + step) / (10 + step))


def denoising_loss(networks: TextToLatent, x_t: Tensor, timestep: Tensor, token_ids: Tensor, eps: Tensor) -> Tensor:
    """The mean squared error of the predicted noise."""
    states = networks.text_encoder(token_ids)[0]
    eps_hat = networks.unet(x_t, timestep, states, return_dict=False)[0]
    return functional.mse_loss(eps_hat.float(), eps)


@dataclass(frozen=True)
class NoisyBatch:
    """What one step trains on."""

    x_t: Tensor
    timestep: Tensor
    token_ids: Tensor
    eps: Tensor


def draw_batch(data: Captioned, alphas_cumprod: Tensor, batch_size: int, generator: torch.Generator) -> NoisyBatch:
    """Draw latents, captions, timesteps and noise, all on the device of `data`."""
    mean, std, device = data.moments.mean, data.moments.std, data.token_ids.device
    picked = torch.randint(mean.shape[0], (batch_size,), generator=generator, device=device)
    timestep = torch.randint(alphas_cumprod.shape[0], (batch_size,), generator=generator, device=device)
    is_empty = torch.rand(batch_size, 1, generator=generator, device=device) < EMPTY_CAPTION_RATE
    posterior_noise, eps = torch.randn(2, batch_size, *mean.shape[1:], generator=generator, device=device)
    x_0 = mean[picked] + std[picked] * posterior_noise
    alpha_squared = alphas_cumprod[timestep].view(-1, 1, 1, 1)
    x_t = alpha_squared.sqrt() * x_0 + (1 - alpha_squared).sqrt() * eps
    return NoisyBatch(x_t, timestep, torch.where(is_empty, data.empty_ids, data.token_ids[picked]), eps)


def train_denoiser(
    networks: TextToLatent,
    data: Captioned,
    phase: Phase,
    *,
    batch_size: int,
    learning_rate: float,
    log: TrainingLog,
    is_compiled: bool = False,
    is_bfloat16: bool = False,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train UNet and text encoder; their averages are the result.

    Args:
        networks: The two networks on the device of `data`; changed in place.
        is_compiled: Compile the forward pass, which spares a GPU most kernel launches.
        is_bfloat16: Run the forward pass under bfloat16 autocast; slower than float32 on a CPU.
    """
    device = data.token_ids.device
    alphas_cumprod = build_scheduler().alphas_cumprod.to(device)
    parameters, averages = networks.parameters(), networks.average_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), fused=True)
    compute_loss = torch.compile(denoising_loss) if is_compiled else denoising_loss

    def step(index: int, generator: torch.Generator) -> Tensor:
        batch = draw_batch(data, alphas_cumprod, batch_size, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
            loss = compute_loss(networks, batch.x_t, batch.timestep, batch.token_ids, batch.eps)
        set_learning_rate(optimizer, linear_warmup(index, warmup_steps=WARMUP_STEPS, peak=learning_rate))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - average_decay(index))
        return loss

    state = {**networks.parts(), "optimizer": optimizer}
    train(phase, step, state, device=device, log=log, after_step=after_step)
