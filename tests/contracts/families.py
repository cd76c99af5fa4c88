"""Tiny pipelines of every family, of the real classes; a new family is a line here, and passes the whole suite."""

from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl

FAMILIES = {"stable_diffusion": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3}
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
}
"""Everything that draws in another way."""
