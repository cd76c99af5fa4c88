"""InstructPix2Pix (Brooks et al., arXiv:2211.09800): a UNet that sees the source.

The safety checker is left out: an edit that it blackens would be scored as an image. It belongs where images are shown.
"""

from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline
from PIL.Image import Image

from rpo.curation.component_config import EditorConfig
from rpo.curation.editors.pipeline_editor import EditBatch, EditSettings, Family, PipelineEditor, load_pretrained

MODEL = "timbrooks/instruct-pix2pix"
LICENCES = {MODEL: "MIT"}


def instruct_pix2pix_editor(config: EditorConfig) -> PipelineEditor:
    """An InstructPix2Pix checkpoint.

    Args:
        config: Its `model` is a folder or hub id; nothing is timbrooks/instruct-pix2pix.
    """
    return PipelineEditor(load(config.model or MODEL, config), FAMILY, config)


def load(model: str, config: EditorConfig) -> StableDiffusionInstructPix2PixPipeline:
    """The pipeline of a folder or hub id, where the configuration wants it."""
    without = {"safety_checker": None, "requires_safety_checker": False}
    return load_pretrained(StableDiffusionInstructPix2PixPipeline, model, config, without)


def edit(pipe: Any, batch: EditBatch, settings: EditSettings) -> Sequence[Image]:
    """The edits of a batch."""
    return pipe(
        batch.instructions,
        image=batch.images,
        num_inference_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        image_guidance_scale=settings.image_guidance_scale,
        generator=batch.generators,
    ).images


def _recommended(pipe: DiffusionPipeline) -> EditSettings:
    return EditSettings(num_steps=100, guidance_scale=7.5, image_guidance_scale=1.5)


FAMILY = Family("instruct_pix2pix", MODEL, LICENCES, _recommended, edit)
