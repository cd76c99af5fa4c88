"""Tiny pipelines of every family, of the real classes; a new family is a line here, and passes the whole suite.

A family whose pipeline hands out its latents in another form than rpo does, or whose autoencoder is of another class,
has a line more.
"""

import itertools
from inspect import signature

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from rpo.models.families import family_named
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl
from tests.tiny_chroma import tiny_chroma
from tests.tiny_flux1 import tiny_flux1
from tests.tiny_flux2_klein import tiny_flux2_klein
from tests.tiny_krea2 import tiny_krea2
from tests.tiny_lumina2 import tiny_lumina2
from tests.tiny_pixart_sigma import tiny_pixart_sigma
from tests.tiny_qwen_image import tiny_qwen_image
from tests.tiny_sana import tiny_sana
from tests.tiny_z_image import tiny_z_image

FAMILIES = {
    "stable_diffusion": tiny_sd,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux1": tiny_flux1,
    "chroma": tiny_chroma,
    "flux2_klein": tiny_flux2_klein,
    "qwen_image": tiny_qwen_image,
    "z_image": tiny_z_image,
    "lumina2": tiny_lumina2,
    "sana": tiny_sana,
    "pixart_sigma": tiny_pixart_sigma,
    "krea2": tiny_krea2,
}
"""One of each, for what trains."""

VARIANTS = {
    **FAMILIES,
    "stable_diffusion, v": lambda: tiny_sd("v_prediction"),
    "stable_diffusion, v, zero terminal SNR": lambda: tiny_sd(
        "v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True
    ),
    "sdxl, v": lambda: tiny_sdxl("v_prediction"),
    "sd3 without T5": lambda: tiny_sd3(with_t5=False),
    "sd3, shift by size": lambda: tiny_sd3(use_dynamic_shifting=True, shift=1.0),
    "flux2_klein, fixed shift": lambda: tiny_flux2_klein(use_dynamic_shifting=False),
    "krea2, fixed shift": lambda: tiny_krea2(use_dynamic_shifting=False, shift=3.0),
    "flux1, fixed shift": lambda: tiny_flux1(use_dynamic_shifting=False, shift=3.0),
    "z_image, shift by size": lambda: tiny_z_image(use_dynamic_shifting=True, shift=1.0),
    "lumina2, shift by channels": lambda: tiny_lumina2(use_dynamic_shifting=True, shift=1.0),
    "sana, Euler": lambda: tiny_sana(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)),
}
"""Everything that draws in another way."""

ALWAYS = ("stable_diffusion", "sdxl", "sd3", "flux1")
"""What stands for all families in the default tests; `-m contracts` asks every one."""


def mostly(names, *, always=ALWAYS):
    """The names, those of other families than `always` for `-m contracts` alone."""
    return [name if name.startswith(always) else pytest.param(name, marks=pytest.mark.slow) for name in names]


def mostly_pairs(names, others, *, always=ALWAYS):
    """All pairs; by default as few as show each of `others`, and each of `always`, once."""
    others, shown = list(others), max(len(always), len(others))
    kept = {(always[n % len(always)], others[n % len(others)]) for n in range(shown)}
    pairs = itertools.product(names, others)
    return [pair if pair in kept else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


def unpacked(pipe, latents, canvas):
    return pipe._unpack_latents(latents, canvas.height, canvas.width, pipe.vae_scale_factor)


def normalised(pipe, latents):
    mean, variance = (one[None, :, None, None] for one in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
    std = (variance + pipe.vae.config.batch_norm_eps).sqrt()
    return (pipe._patchify_latents(latents) - mean) / std, std


UNPACKED = {
    "FluxPipeline": unpacked,
    "FluxKontextPipeline": unpacked,
    "ChromaPipeline": unpacked,
    "Flux2KleinPipeline": lambda pipe, latents, canvas: normalised(pipe, latents)[0],
    "Krea2Pipeline": lambda pipe, latents, canvas: pipe._unpack_latents(latents, *canvas)[:, :, 0],
    **dict.fromkeys(
        ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
        lambda *given: unpacked(*given)[:, :, 0],
    ),
}
"""From a pipeline, its own latents and their canvas to `[batch, c, h, w]`, by class."""


def encoded_frame(pipe, images):
    shift, scale = (
        torch.tensor(pipe.vae.config[name])[None, :, None, None] for name in ("latents_mean", "latents_std")
    )
    posterior = pipe.vae.encode(2 * images[:, :, None] - 1).latent_dist
    return (posterior.mean[:, :, 0] - shift) / scale, posterior.std[:, :, 0] / scale


def latent_alone(pipe, images):
    latents = pipe.vae.encode(2 * images - 1).latent * pipe.vae.config["scaling_factor"]
    return latents, torch.zeros_like(latents)


def encoded_fours(pipe, images):
    posterior = pipe.vae.encode(2 * images - 1).latent_dist
    mean, std = normalised(pipe, posterior.mean)
    return mean, pipe._patchify_latents(posterior.std) / std


ENCODED = {
    "AutoencoderKLFlux2": encoded_fours,
    "AutoencoderKLQwenImage": encoded_frame,
    "AutoencoderDC": latent_alone,
}
"""Mean and standard deviation of an image's latents as the pipeline has them, by class of the autoencoder."""


def drawn_by(pipe, prompts, *, canvas, guidance, num_steps, generators, output_type="latent", **words):
    """What the pipeline's own call gives, by its own scheduler, to first order, or DDIM where it has betas."""
    config = pipe.scheduler.config
    if config.get("use_flow_sigmas"):
        pipe.scheduler = type(pipe.scheduler).from_config(config, solver_order=1)
    elif "beta_schedule" in config:
        pipe.scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    family = family_named(type(pipe).__name__)
    options = {family.guidance_argument: guidance - family.guidance_offset, **words}
    known = signature(pipe.__call__).parameters
    if family.guidance_argument == "true_cfg_scale":
        options["negative_prompt"] = [""] * len(prompts)
    if "use_resolution_binning" in known:
        options["use_resolution_binning"] = False
    if "height" in known:  # an editor may take it from its image
        options |= {"height": canvas.height, "width": canvas.width}
    given = pipe(
        prompt=list(prompts),  # some pipelines write into it
        num_inference_steps=num_steps,
        generator=generators,
        output_type=output_type,
        **options,
    ).images
    unpack = UNPACKED.get(type(pipe).__name__) if output_type == "latent" else None
    return unpack(pipe, given, canvas) if unpack else given


def encoded_by(pipe, images):
    """The moments of an image's scaled latents by the autoencoder's own formula; images in [0, 1]."""
    if own := ENCODED.get(type(pipe.vae).__name__):
        return own(pipe, images)
    config, posterior = pipe.vae.config, pipe.vae.encode(2 * images - 1).latent_dist
    shift, scale = config.get("shift_factor") or 0.0, config["scaling_factor"]
    return (posterior.mean - shift) * scale, posterior.std * scale
