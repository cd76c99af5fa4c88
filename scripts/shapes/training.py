"""What the three scripts share: settings from the command line, batches that a kill does not change, and `fit`.

A batch is a function of (seed, folder, update) alone, so that a run that goes on draws what an undisturbed one draws.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rpo.config.load import load_config
from rpo.config.settings import describe_fields
from rpo.training.loop import LoopConfig, fit
from rpo.types import StepOutput
from scripts.shapes.networks import TextToLatent, build_scheduler

B = TypeVar("B")
C = TypeVar("C")


def from_command_line(settings: type[C], description: str | None) -> C:
    """The settings that the words of the command line make; --help lists them."""
    fields = describe_fields(settings)
    epilog = "\n".join(f"{one.key}={one.default}  ({one.type_name})\n    {one.doc}" for one in fields)
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=form)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a setting to change, such as seed=1")
    return load_config(settings, None, parser.parse_args().overrides)


def seed_of(*numbers: int) -> int:
    """A generator's seed from several numbers, without the overlaps that their sum would have."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def train(
    folder: Path,
    network: nn.Module,
    draw: Callable[[torch.Generator], B],
    loss_of: Callable[[B], Tensor],
    loop: LoopConfig,
    *,
    data: str,
    seed: int,
    on_update: Callable[[int, dict[str, float]], None] | None = None,
    guard: Callable[[dict[str, float]], str | None] | None = None,
) -> None:
    """Train a network where it is, and leave it frozen, rounded to what the half-precision file will hold.

    Args:
        folder: Of the run; if it holds one already, that goes on.
        draw: A batch, from a generator on the device of the network.
        data: What a run that goes on must have in common with its beginning, besides `loop`.
    """
    params = list(network.parameters())
    generator = torch.Generator(params[0].device)

    def batches(done: int) -> Iterator[tuple[int, B]]:
        for update in count(done):
            generator.manual_seed(seed_of(seed, *folder.name.encode(), update))
            yield update, draw(generator)

    def step(batch: tuple[int, B]) -> StepOutput:
        loss = loss_of(batch[1])
        return StepOutput(loss, loss.detach()[None], {})

    loop, same = replace(loop, seed=seed), {"data": data}
    hooks: Any = {"on_update": on_update, "guard": guard}
    name = lambda batch: [f"batch {batch[0]}"]  # noqa: E731
    fit(batches, step, params, loop, folder=folder, names=name, resume=True, identity=same, **hooks)
    with torch.no_grad():
        for param in params:
            param.copy_(param.to(torch.float16))
    network.eval().requires_grad_(False)


class Noisy(NamedTuple):
    """What a denoiser trains on: x_t, with what else it sees behind it, and the noise that it shall find."""

    inputs: Tensor
    timestep: Tensor
    token_ids: Tensor
    eps: Tensor


def noisy(x_0: Tensor, token_ids: Tensor, generator: torch.Generator, *, beside: Tensor | None = None) -> Noisy:
    """Latents at times drawn uniformly."""
    alphas_cumprod = build_scheduler().alphas_cumprod.to(x_0.device)
    timestep = torch.randint(len(alphas_cumprod), x_0.shape[:1], generator=generator, device=x_0.device)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    alpha_squared = alphas_cumprod[timestep].view(-1, 1, 1, 1)
    x_t = alpha_squared.sqrt() * x_0 + (1 - alpha_squared).sqrt() * eps
    return Noisy(x_t if beside is None else torch.cat([x_t, beside], dim=1), timestep, token_ids, eps)


def denoising_loss(networks: TextToLatent, batch: Noisy, *, snr_limit: float = math.inf) -> Tensor:
    """min(SNR, limit) / SNR ||eps - eps_hat||^2 per dimension (arXiv:2006.11239, eq. 14; arXiv:2303.09556)."""
    alphas_cumprod = build_scheduler().alphas_cumprod.to(batch.eps.device)[batch.timestep]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    eps_hat = networks(batch.inputs, batch.timestep, batch.token_ids)
    return (snr.clamp(max=snr_limit) / snr * (batch.eps - eps_hat).square().mean(dim=(1, 2, 3))).mean()
