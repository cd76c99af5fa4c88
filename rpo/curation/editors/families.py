"""The editing pipelines that are known, and how each is loaded, called and licensed.

- InstructPix2Pix (Brooks et al., arXiv:2211.09800): a UNet that sees the source.
- ControlNet instruct-pix2pix on Stable Diffusion 1.5 (Zhang et al., arXiv:2302.05543): the control image is the source.
  The base stays as it is and may be any fine-tune of SD 1.5; the instruction is its prompt.
- FLUX.1 Kontext (arXiv:2506.15742): a flow transformer that reads the source's latents beside its own. It works at
  about one megapixel, whatever the size of the source; a smaller area is given as it is, without snapping to the
  resolutions that it was trained at.
- FLUX.2 klein: the small FLUX.2, with the source among its tokens. A list of images means several references of one
  edit to it, not several edits; so images go one by one.
- Qwen-Image-Edit and its Plus versions (arXiv:2508.02324): a vision-language model reads source and instruction. The
  checkpoint says which of the two pipelines it needs. Plus takes one edit at a time, and so does this editor for both.

Safety checkers are left out: an edit that one blackens would be scored as an image. They belong where images are shown.
"""

import math
from dataclasses import replace
from typing import Any

import diffusers
from diffusers import ControlNetModel, DiffusionPipeline

from rpo.curation.curate_config import EditorConfig
from rpo.curation.editors.pipeline_editor import EditorFamily, EditSettings, PipelineEditor, place
from rpo.errors import InputError

TRAINED_AREA = 1024 * 1024
MULTIPLE = 16
"""Of a side for Kontext, in pixels: eight per latent, two latents per token."""

CONTROLNET_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"

_FLUX_DEV, _FLUX_2 = "FLUX.1 [dev] Non-Commercial License", "FLUX Non-Commercial License"
_UNCHECKED = {"safety_checker": None, "requires_safety_checker": False}


def family_editor(config: EditorConfig) -> PipelineEditor:
    """The editor of the family that the configuration's kind names, with its weights or those that `model` names."""
    family = FAMILIES[config.kind]
    components: dict[str, Any] = {}
    folder = place_of_pipeline = config.model or family.model
    if config.kind == "controlnet":
        config = replace(config, base_model=config.base_model or CONTROLNET_BASE)
        components["controlnet"] = _controlnet(folder, config)
        place_of_pipeline = config.base_model
    pipe = load_pretrained(family, place_of_pipeline, config, **components)
    return PipelineEditor(pipe, family, config, folder=folder)


def load_pretrained(family: EditorFamily, model: str, config: EditorConfig, **given: Any) -> Any:
    """Load a pipeline of a family where the configuration wants it; `given` are components that are not loaded."""
    names = family.pipelines
    components = given | (_UNCHECKED if "StableDiffusion" in names[0] else {})
    pipeline_class: Any = getattr(diffusers, names[0]) if len(names) == 1 else DiffusionPipeline
    device, dtype = place(config)
    try:
        pipe = pipeline_class.from_pretrained(model, dtype=dtype, **components)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"'{model}' does not load as a {pipeline_class.__name__}: {error}; expected a diffusers folder or hub "
            "id of an editor of this kind"
        ) from error
    if type(pipe).__name__ not in names:
        raise InputError(f"'{model}' is a {type(pipe).__name__}, expected a {' or a '.join(names)}; give one")
    return pipe.to(device)


def _controlnet(model: str, config: EditorConfig) -> ControlNetModel:
    try:
        return ControlNetModel.from_pretrained(model, dtype=place(config)[1])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"'{model}' does not load as a ControlNetModel: {error}; expected a ControlNet's folder or hub id"
        ) from error


def _guidance(settings: EditSettings, size: tuple[int, int]) -> dict[str, Any]:
    return {"guidance_scale": settings.guidance_scale}


def _both_guidances(settings: EditSettings, size: tuple[int, int]) -> dict[str, Any]:
    return {"guidance_scale": settings.guidance_scale, "image_guidance_scale": settings.image_guidance_scale}


def _conditioning(settings: EditSettings, size: tuple[int, int]) -> dict[str, Any]:
    return {
        "guidance_scale": settings.guidance_scale,
        "controlnet_conditioning_scale": settings.conditioning_scale,
    }


def _working_size(settings: EditSettings, size: tuple[int, int]) -> dict[str, Any]:
    scale = math.sqrt(settings.max_area / math.prod(size))
    width, height = (max(round(side * scale / MULTIPLE), 1) * MULTIPLE for side in size)
    return {
        "guidance_scale": settings.guidance_scale,
        "height": height,
        "width": width,
        "max_area": settings.max_area,
        "_auto_resize": settings.max_area == TRAINED_AREA,
    }


def _true_guidance(settings: EditSettings, size: tuple[int, int]) -> dict[str, Any]:
    # The empty negative prompt is a space: without one there is no guidance.
    return {"true_cfg_scale": settings.guidance_scale, "negative_prompt": " "}


def _klein_defaults(pipe: DiffusionPipeline) -> EditSettings:
    return EditSettings(4, guidance_scale=1.0) if pipe.config["is_distilled"] else EditSettings(50, guidance_scale=4.0)


FAMILIES = {
    one.kind: one
    for one in (
        EditorFamily(
            kind="instruct_pix2pix",
            pipelines=("StableDiffusionInstructPix2PixPipeline",),
            licences={"timbrooks/instruct-pix2pix": "MIT"},
            defaults=lambda pipe: EditSettings(100, guidance_scale=7.5, image_guidance_scale=1.5),
            arguments=_both_guidances,
        ),
        EditorFamily(
            kind="controlnet",
            pipelines=("StableDiffusionControlNetPipeline",),
            licences={"lllyasviel/control_v11e_sd15_ip2p": "CreativeML Open RAIL-M"},
            defaults=lambda pipe: EditSettings(30, guidance_scale=7.5),
            arguments=_conditioning,
        ),
        EditorFamily(
            kind="kontext",
            pipelines=("FluxKontextPipeline",),
            licences={"black-forest-labs/FLUX.1-Kontext-dev": _FLUX_DEV},
            defaults=lambda pipe: EditSettings(28, guidance_scale=2.5, max_area=TRAINED_AREA),
            arguments=_working_size,
        ),
        EditorFamily(
            kind="flux2_klein",
            pipelines=("Flux2KleinPipeline",),
            licences={
                "black-forest-labs/FLUX.2-klein-4B": "Apache-2.0",
                "black-forest-labs/FLUX.2-klein-base-4B": "Apache-2.0",
                "black-forest-labs/FLUX.2-klein-9B": _FLUX_2,
                "black-forest-labs/FLUX.2-klein-base-9B": _FLUX_2,
            },
            defaults=_klein_defaults,
            arguments=_guidance,
            is_one_by_one=True,
        ),
        EditorFamily(
            kind="qwen_edit",
            pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
            licences=dict.fromkeys(
                ("Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit", "Qwen/Qwen-Image-Edit-2511"), "Apache-2.0"
            ),
            defaults=lambda pipe: EditSettings(40, guidance_scale=4.0),
            arguments=_true_guidance,
            is_one_by_one=True,
        ),
    )
}
"""The families by kind; the first of the models whose licence is known is the default."""
