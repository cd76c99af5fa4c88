"""A sound checkpoint has the numbers that it needs: weights, a latent scale, a noise schedule, a prediction type.

Each of these can be lost in a conversion, and training goes on all the same, towards something that is no image.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from rpo.errors import InputError
from rpo.models.plain import PARTS, probe_side
from rpo.process.grid import vp_node
from rpo.process.prediction import add_noise, from_x0_eps
from rpo.types import PredictionType

WEIGHT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")

SAME_SCHEDULE = 1e-3
"""How far two noise schedules may be apart, in alpha-bar: schedulers differ in how they end one at zero."""

MID_TIMES = (0.4, 0.6, 0.8)
"""Where predictions of different types are far apart, in parts of the schedule."""

CLEARLY = 0.5
"""A prediction type whose error is below this, and below this much of the given one's, is the right one."""

SCHEDULER_ADVICE = (
    'set pipe.scheduler = DDIMScheduler.from_pretrained(CHECKPOINT, subfolder="scheduler"); that of Stable Diffusion '
    '1.x and 2.x is DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", '
    "clip_sample=False, set_alpha_to_one=False, steps_offset=1)"
)


def check_weights(pipe: StableDiffusionPipeline) -> None:
    """Refuse networks whose weights are no numbers to compute with, and a VAE without a scale."""
    for part in PARTS:
        _check_network(part, pipe.components[part])
    scale = pipe.vae.config.get("scaling_factor")
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not (is_number and 0 < scale < math.inf):
        raise InputError(
            f"the VAE's configuration has scaling_factor {scale}, but a number above 0 is needed (0.18215 for Stable "
            "Diffusion 1.x and 2.x); correct vae/config.json, or pipe.vae.register_to_config(scaling_factor=…)"
        )


def _check_network(part: str, network: nn.Module) -> None:
    tensors = {name: tensor.detach() for name, tensor in network.named_parameters() if tensor.numel()}
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_TYPES:
            raise InputError(
                f"{part}.{name} is {tensor.dtype}, but float32, bfloat16 or float16 weights are needed; load the "
                "checkpoint without quantisation, with dtype=torch.bfloat16 to save memory"
            )
    largest = torch.stack([tensor.abs().max().float() for tensor in tensors.values()]).cpu()
    broken = [name for name, value in zip(tensors, largest.tolist(), strict=True) if not math.isfinite(value)]
    if broken:
        raise InputError(
            f"{part}.{broken[0]} has numbers that are not finite, in {len(broken)} tensor"
            f"{'s' * (len(broken) > 1)} of {part}; expected finite weights: get the checkpoint again, or one saved "
            "before it broke (float16 overflows above 65504)"
        )
    if not largest.any():
        raise InputError(f"all weights of {part} are zero; expected a trained network: get the checkpoint again")


def noise_schedule(scheduler: Any) -> DDIMScheduler:
    """The noise schedule that a pipeline's scheduler states, as DDIM's."""
    config: Mapping[str, Any] = scheduler.config
    own, name = vars(scheduler).get("alphas_cumprod"), type(scheduler).__name__
    if own is None or config.get("use_flow_sigmas"):
        raise InputError(
            f"the pipeline's scheduler is {name}, which does not state the noise schedule (betas) that the UNet was "
            f"trained with: it is for flow, EDM or consistency models; {SCHEDULER_ADVICE}"
        )
    prediction_type = config.get("prediction_type")
    if prediction_type not in PREDICTION_TYPES:
        raise InputError(
            f"the scheduler says prediction_type={prediction_type!r}; {', '.join(PREDICTION_TYPES[:2])} or sample is "
            f"needed; {SCHEDULER_ADVICE}"
        )
    try:
        # The pipeline itself switches clip_sample off; a scheduler configured for another class may leave it unset.
        made = DDIMScheduler.from_config(config, clip_sample=False)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"the scheduler {name} has no usable noise schedule ({error}); {SCHEDULER_ADVICE}") from error
    curve = made.alphas_cumprod.double()
    falls = bool(torch.cat([curve, curve.new_zeros(1)]).diff().le(0).all()) and 0 < float(curve[0]) <= 1
    if not (falls and len(curve) == made.config["num_train_timesteps"]):
        raise InputError(
            f"the scheduler {name} has betas that make no noise schedule of {made.config['num_train_timesteps']} "
            f"steps that falls from 1 to 0; {SCHEDULER_ADVICE}"
        )
    # A sampler that does not know of zero terminal SNR keeps the word in its configuration, for others to read.
    curves = [made.alphas_cumprod, DDIMScheduler.from_config(config, rescale_betas_zero_snr=False).alphas_cumprod]
    if not any(len(own) == len(one) and bool((own.cpu() - one).abs().max() <= SAME_SCHEDULE) for one in curves):
        raise InputError(
            f"the scheduler {name} has another noise schedule than its configuration's betas make; {SCHEDULER_ADVICE}"
        )
    return made


def check_prediction_type(pipe: StableDiffusionPipeline, schedule: DDIMScheduler, compute_dtype: torch.dtype) -> None:
    """Refuse a checkpoint whose network predicts something else than its scheduler's configuration says."""
    given: PredictionType = schedule.config["prediction_type"]
    errors = prediction_errors(pipe, schedule, compute_dtype)
    best = min(errors, key=errors.__getitem__)
    if errors[best] < CLEARLY and errors[best] < CLEARLY * errors[given]:
        raise InputError(
            f"the scheduler says prediction_type={given}, but the UNet's error is {errors[given]:.2f} as {given} and "
            f"{errors[best]:.2f} as {best} (1 is what predicting nothing has); set it right with pipe.scheduler = "
            f'DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="{best}"), or in '
            "scheduler/scheduler_config.json"
        )
    if errors[given] > 1:
        warnings.warn(
            f"the UNet denoises no better than predicting nothing (error {errors[given]:.2f}, where that has 1); is "
            "this a trained checkpoint, and are UNet and VAE of one family?",
            stacklevel=2,
        )


@torch.no_grad()
def prediction_errors(
    pipe: StableDiffusionPipeline, schedule: DDIMScheduler, compute_dtype: torch.dtype
) -> dict[PredictionType, float]:
    """Error of the UNet at middle times, read as each type, relative to that of predicting nothing.

    Measured on an image of a few smooth colours, which every checkpoint knows how to denoise.
    """
    generator, count = torch.Generator().manual_seed(0), len(MID_TIMES)
    device, dtype = pipe.unet.conv_in.weight.device, pipe.unet.conv_in.weight.dtype
    colours = 2 * torch.rand(1, 3, 3, 3, generator=generator, dtype=torch.float32, device="cpu") - 1
    size = probe_side(pipe) * pipe.vae_scale_factor
    image = nn.functional.interpolate(colours, size, mode="bilinear", align_corners=True)
    timestep = torch.tensor([int(part * schedule.config["num_train_timesteps"]) for part in MID_TIMES])
    with torch.compiler.set_stance("force_eager"):
        x_0 = pipe.vae.encode(image.to(device, pipe.vae.dtype)).latent_dist.mean.float().cpu()
        x_0 = (x_0 * pipe.vae.config["scaling_factor"]).expand(count, -1, -1, -1)
        eps = torch.randn(x_0.shape, generator=generator, dtype=torch.float32, device="cpu")
        node = vp_node(schedule.alphas_cumprod.cpu(), timestep)
        x_t = add_noise(x_0, eps, node).to(device, dtype)
        embeds = pipe.encode_prompt("", device, count, False)[0].to(dtype)
        is_mixed = compute_dtype != torch.float32
        with torch.autocast(device.type, dtype=compute_dtype if is_mixed else None, enabled=is_mixed):
            noise_pred = pipe.unet(x_t, timestep.to(device), encoder_hidden_states=embeds).sample.float().cpu()
    return {kind: _relative(noise_pred, from_x0_eps(x_0, eps, node, kind)) for kind in PREDICTION_TYPES}


def _relative(noise_pred: Tensor, target: Tensor) -> float:
    return float((noise_pred - target).square().mean() / target.square().mean())
