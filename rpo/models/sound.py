"""A sound checkpoint has the numbers that it needs: weights, a latent scale, a noise schedule, a prediction type.

Each of these can be lost in a conversion, and training goes on all the same, towards something that is no image.
"""

import math
import warnings
from typing import Any

import torch
from torch import nn

from rpo.errors import InputError
from rpo.models import latents as autoencoder
from rpo.models.base import Family, Schedule
from rpo.models.execution import call, embedded
from rpo.models.frozen import is_quantized, stored
from rpo.models.plain import parts_of, probe_side
from rpo.models.schedules import PREDICTION_TYPES
from rpo.process.diffusion import diffusion_of
from rpo.process.prediction import from_x0_eps
from rpo.types import Images, PredictionType

WEIGHT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

MID_TIMES = (0.4, 0.6, 0.8)
"""Where predictions of different types are far apart, in parts of the schedule."""

CLEARLY = 0.5
"""A prediction type whose error is below this, and below this much of the given one's, is the right one."""


def check_weights(pipe: Any, family: Family) -> None:
    """Refuse networks whose weights are no numbers to compute with, and a VAE without a scale."""
    for part, network in parts_of(pipe, family).items():
        _check_network(part, network)
    network = pipe.components[family.denoiser]
    wide = tuple(vars(type(network)).get("_keep_in_fp32_modules") or ())
    types = {  # those of an adapter may be wider
        tensor.dtype: name
        for name, tensor in network.named_parameters()
        if ".lora_" not in name and tensor.is_floating_point() and not any(one in name for one in wide)
    }
    if len(types) > 1:
        told = ", ".join(f"{name} is {dtype}" for dtype, name in types.items())
        raise InputError(
            f"the weights of {family.denoiser} are of several types ({told}), but one is needed; load the checkpoint "
            "again with dtype=torch.float32 or torch.bfloat16, or call pipe.to(DTYPE)"
        )
    scale = pipe.components[family.autoencoder].config.get("scaling_factor", 1.0)  # some classes have none
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not (is_number and 0 < scale < math.inf):
        raise InputError(
            f"the VAE's configuration has scaling_factor {scale}, but a number above 0 is needed (0.18215 for Stable "
            "Diffusion 1.x and 2.x); correct vae/config.json, or pipe.vae.register_to_config(scaling_factor=…)"
        )


def _check_network(part: str, network: nn.Module) -> None:
    tensors = {name: tensor for name, tensor in network.named_parameters() if tensor.numel()}
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_TYPES and not is_quantized(tensor):
            raise InputError(
                f"{part}.{name} is {tensor.dtype}, but float32, bfloat16 or float16 weights are needed; load the "
                "checkpoint without quantisation, with dtype=torch.bfloat16 or model.frozen_base to save memory"
            )
    parts = [(name, part) for name, tensor in tensors.items() for part in stored(tensor) if part.is_floating_point()]
    largest = torch.stack([part.abs().max().float() for _, part in parts]).cpu()
    broken = [name for (name, _), value in zip(parts, largest.tolist(), strict=True) if not math.isfinite(value)]
    if broken:
        raise InputError(
            f"{part}.{broken[0]} has numbers that are not finite, in {len(broken)} tensor"
            f"{'s' * (len(broken) > 1)} of {part}; expected finite weights: get the checkpoint again, or one saved "
            "before it broke (float16 overflows above 65504)"
        )
    if not largest.any():
        raise InputError(f"all weights of {part} are zero; expected a trained network: get the checkpoint again")


def check_prediction_type(pipe: Any, family: Family, schedule: Schedule, compute_dtype: torch.dtype) -> None:
    """Refuse a checkpoint whose network predicts something else than its scheduler's configuration says."""
    given = schedule.prediction_type
    if not diffusion_of(given).is_gaussian:  # logits are nothing else
        return
    errors = prediction_errors(pipe, family, schedule, compute_dtype)
    best = min(errors, key=errors.__getitem__)
    if errors[best] < CLEARLY and errors[best] < CLEARLY * errors[given]:
        raise InputError(
            f"the scheduler says prediction_type={given}, but the network's error is {errors[given]:.2f} as {given} "
            f"and {errors[best]:.2f} as {best} (1 is what predicting nothing has); set it right with pipe.scheduler = "
            f'DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="{best}"), or in '
            "scheduler/scheduler_config.json"
        )
    if errors[given] > 1:
        warnings.warn(
            f"the network denoises no better than predicting nothing (error {errors[given]:.2f}, where that has 1); is "
            "this a trained checkpoint, and are denoiser and VAE of one family?",
            stacklevel=2,
        )


@torch.no_grad()
def prediction_errors(
    pipe: Any, family: Family, schedule: Schedule, compute_dtype: torch.dtype, *, shown: Images | None = None
) -> dict[PredictionType, float]:
    """Error of the network at middle times, read as each type it may have, relative to that of predicting nothing.

    Measured on an image of a few smooth colours, which every checkpoint knows how to denoise; tokens only of a world
    that it has seen, such as that of the one that is `shown`.
    """
    generator, count = torch.Generator().manual_seed(0), len(MID_TIMES)
    colours = torch.rand(1, 3, 3, 3, generator=generator, dtype=torch.float32, device="cpu")
    size = probe_side(pipe, family) * family.cell(pipe)
    smooth = nn.functional.interpolate(colours, size, mode="bilinear", align_corners=True)
    image = smooth if shown is None else shown
    timestep = torch.tensor([int(part * schedule.num_train_timesteps) for part in MID_TIMES])
    vae, diffusion = pipe.components[family.autoencoder], diffusion_of(schedule.prediction_type)
    with torch.compiler.set_stance("force_eager"), autoencoder.widened(vae, is_on=family.widens_autoencoder):
        image = image.to(vae.device)
        x_0 = family.encode(pipe, image)[0].cpu().expand(count, -1, -1, -1)
        eps = torch.randn(x_0.shape, generator=generator, dtype=torch.float32, device="cpu")
        node = schedule.node(timestep)
        embedding = embedded(family, pipe, [""], vae.device, image if family.edits == "always" else None)
        rows = {name: one.expand(count, *one.shape[1:]) for name, one in embedding.items()}
        network, x_t = pipe.components[family.denoiser], diffusion.noised(x_0, eps, node)
        noise_pred = call(family, pipe, network, x_t, timestep, rows, compute_dtype=compute_dtype).cpu()
    if not diffusion.is_gaussian:
        nothing, target = torch.zeros_like(noise_pred), diffusion.target(x_0, eps, node)
        errors = [diffusion.error(one, target, x_t).mean() for one in (noise_pred, nothing)]
        return {schedule.prediction_type: float(errors[0] / errors[1])}
    kinds: tuple[PredictionType, ...] = ("flow",) if schedule.prediction_type == "flow" else PREDICTION_TYPES
    targets = [from_x0_eps(x_0, eps, node, kind) for kind in kinds]
    errors = [float((noise_pred - target).square().mean() / target.square().mean()) for target in targets]
    return dict(zip(kinds, errors, strict=True))
