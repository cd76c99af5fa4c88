"""F of the value: a small convolutional network on latents that reads the prompt by cross-attention.

Latents are brought to at most 4 x 4 cells, whose places are given as two more channels; every cell then asks the tokens
of the prompt. Pooling the prompt first would not do: "a circle left of a square" and its reverse have the same words,
and which part of the image they speak of depends on their order. Forward and backward together cost a fraction of one
forward of the denoiser, since the network runs on every node of a rollout many times.
"""

from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpo.errors import InputError
from rpo.trainers.value.inputs import ValuePoints
from rpo.types import PerSample

ValueInputs = Literal["x_t", "x0_hat", "both", "reward"]
"""Which latents the network sees; "reward" is none of them, only what the reward says of x0_hat."""

CELLS = 4
"""Side of the square of cells at which the prompt is read."""

HEADS = 4
FREQUENCIES = 6


@final
class ValueNetwork(nn.Module):
    """One number per `ValuePoints`, 0 before training."""

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        prompt_dim: int,
        *,
        inputs: ValueInputs = "both",
        channels: int = 64,
        seed: int = 0,
    ):
        """Make the network; the same seed gives the same weights."""
        super().__init__()
        if channels % (2 * HEADS):
            raise InputError(f"channels is {channels}, but groups and heads need a multiple of 8; 64 is usual")
        self.inputs = inputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(channels, 1)
            self.numbers = nn.Sequential(nn.Linear(2 * FREQUENCIES + 3, channels), nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.latents = None if inputs == "reward" else _Latents(latent_shape, prompt_dim, inputs, channels, seed)

    def forward(self, points: ValuePoints) -> PerSample:
        """F of each point."""
        none = torch.zeros_like(points.time)
        reward = none if points.x0_reward is None else points.x0_reward
        baseline = none if points.baseline is None else points.baseline
        numbers = torch.cat([_waves(points.time), torch.stack([reward, baseline], dim=1)], dim=1)
        value = self.numbers(numbers).squeeze(1)
        return value if self.latents is None else value + self.latents(points)


@final
class _Latents(nn.Module):
    """What the latents and the prompt say."""

    def __init__(
        self, latent_shape: tuple[int, int, int], prompt_dim: int, inputs: ValueInputs, channels: int, seed: int
    ):
        super().__init__()
        self.inputs = inputs
        latent_channels, height, width = latent_shape
        seen = latent_channels * (2 if inputs == "both" else 1) + 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(seen, channels, 3, padding=1)
            shrinks = max(0, (max(height, width) - 1).bit_length() - (CELLS - 1).bit_length())
            self.shrink = nn.ModuleList(_Shrink(channels) for _ in range(shrinks))
            self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES + 1, channels), nn.SiLU())
            self.norm_tokens = nn.LayerNorm(prompt_dim)
            self.mix = nn.ModuleList(_Block(channels) for _ in range(2))
            self.read = nn.ModuleList(_Read(channels, prompt_dim) for _ in range(2))
            cells = -(-height // 2**shrinks) * -(-width // 2**shrinks)
            self.hidden = nn.Linear(cells * channels, 2 * channels)
            self.head = nn.Linear(2 * channels, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, points: ValuePoints) -> PerSample:
        """F of each point."""
        seen = {"x_t": (points.x_t,), "x0_hat": (points.x0_hat,), "both": (points.x_t, points.x0_hat)}[self.inputs]
        dtype = self.head.weight.dtype  # a pipeline in half precision gives embeddings of its own
        x = self.stem(torch.cat([*seen, _places(points.x_t)], dim=1).to(dtype))
        time = self.time(_waves(points.time).to(dtype))
        tokens = self.norm_tokens(points.tokens.to(dtype))
        for shrink in self.shrink:
            x = shrink(x)
        for mix, read in zip(self.mix, self.read, strict=True):
            x = read(mix(x, time), tokens)
        return self.head(F.silu(self.hidden(x.flatten(1)))).squeeze(1)


@final
class _Shrink(nn.Module):
    """Half the side, rounded up."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(x))


@final
class _Block(nn.Module):
    """A residual block whose features the time scales and shifts."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(channels, 2 * channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.film(time)[..., None, None].chunk(2, dim=1)
        inner = self.first(F.silu(self.norm(x)))
        return x + self.second(F.silu(inner * (1 + scale) + shift))


@final
class _Read(nn.Module):
    """Cross-attention: every cell asks the tokens of the prompt."""

    def __init__(self, channels: int, prompt_dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(prompt_dim, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        cells = self.norm(x).flatten(2).transpose(1, 2)
        query = _heads(self.query(cells))
        key, value = (_heads(part) for part in self.key_value(tokens).chunk(2, dim=2))
        answer = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.out(answer).transpose(1, 2).reshape(x.shape)


def _heads(x: Tensor) -> Tensor:
    """[points, items, channels] → [points, heads, items, channels of a head]."""
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def _waves(time: Tensor) -> Tensor:
    """Features of a time in [0, 1] from the whole interval down to 1/32 of it."""
    angles = torch.pi * time[:, None] * 2.0 ** torch.arange(FREQUENCIES, device=time.device)
    return torch.cat([time[:, None], angles.sin(), angles.cos()], dim=1)


def _places(x: Tensor) -> Tensor:
    """Row and column of every cell, -1 … 1, as two channels."""
    points, _, height, width = x.shape
    rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)[:, None].expand(height, width)
    columns = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype).expand(height, width)
    return torch.stack([rows, columns]).expand(points, 2, height, width)
