"""ControlNet instruct-pix2pix on Stable Diffusion 1.5 (Zhang et al., arXiv:2302.05543): control image is the source.

Differs from InstructPix2Pix in that the base stays as it is and may be any fine-tune of SD 1.5; the instruction is its
prompt. The safety checker is left out, as for InstructPix2Pix.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from PIL.Image import Image

from rpo.curation.component_config import EditorConfig
from rpo.curation.editors.pipeline_editor import (
    EditBatch,
    EditSettings,
    Family,
    PipelineEditor,
    load_pretrained,
    place,
)
from rpo.errors import InputError

MODEL = "lllyasviel/control_v11e_sd15_ip2p"
BASE_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
LICENCES = {MODEL: "CreativeML Open RAIL-M"}


def controlnet_editor(config: EditorConfig) -> PipelineEditor:
    """A ControlNet that was trained on instructions, with its base.

    Args:
        config: `model` is the ControlNet and `base_model` the Stable Diffusion 1.x; nothing is the published pair.
    """
    config = replace(config, base_model=config.base_model or BASE_MODEL)
    name = config.model or MODEL
    try:
        controlnet = ControlNetModel.from_pretrained(name, dtype=place(config)[1])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"'{name}' does not load as a ControlNetModel: {error}; expected a ControlNet's folder or hub id"
        ) from error
    given = {"controlnet": controlnet, "safety_checker": None, "requires_safety_checker": False}
    pipe = load_pretrained(StableDiffusionControlNetPipeline, config.base_model, config, given)
    return PipelineEditor(pipe, FAMILY, config)


def _edit(pipe: Any, batch: EditBatch, settings: EditSettings) -> Sequence[Image]:
    return pipe(
        batch.instructions,
        image=batch.images,
        num_inference_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        controlnet_conditioning_scale=settings.conditioning_scale,
        generator=batch.generators,
    ).images


def _recommended(pipe: DiffusionPipeline) -> EditSettings:
    return EditSettings(num_steps=30, guidance_scale=7.5)


FAMILY = Family("controlnet", MODEL, LICENCES, _recommended, _edit)
