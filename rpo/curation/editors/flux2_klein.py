"""FLUX.2 klein: the small FLUX.2, with the source among its tokens. The 4B weights are free for any use.

A list of images means several references of one edit to this pipeline, not several edits; so images go one by one.
"""

from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline, Flux2KleinPipeline
from PIL.Image import Image

from rpo.curation.component_config import EditorConfig
from rpo.curation.editors.pipeline_editor import EditBatch, EditSettings, Family, PipelineEditor, load_pretrained

MODEL = "black-forest-labs/FLUX.2-klein-4B"
LICENCES = {
    MODEL: "Apache-2.0",
    "black-forest-labs/FLUX.2-klein-base-4B": "Apache-2.0",
    "black-forest-labs/FLUX.2-klein-9B": "FLUX Non-Commercial License",
    "black-forest-labs/FLUX.2-klein-base-9B": "FLUX Non-Commercial License",
}


def flux2_klein_editor(config: EditorConfig) -> PipelineEditor:
    """A FLUX.2 klein checkpoint, distilled or not.

    Args:
        config: Its `model` is a folder or hub id; nothing is the distilled 4B model.
    """
    pipe = load_pretrained(Flux2KleinPipeline, config.model or MODEL, config, {})
    return PipelineEditor(pipe, FAMILY, config)


def _edit(pipe: Any, batch: EditBatch, settings: EditSettings) -> Sequence[Image]:
    (image,), (instruction,), (generator,) = batch.images, batch.instructions, batch.generators
    return pipe(
        image,
        instruction,
        num_inference_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        generator=generator,
    ).images


def _recommended(pipe: DiffusionPipeline) -> EditSettings:
    is_distilled = pipe.config["is_distilled"]
    return EditSettings(num_steps=4, guidance_scale=1.0) if is_distilled else EditSettings(50, guidance_scale=4.0)


FAMILY = Family("flux2_klein", MODEL, LICENCES, _recommended, _edit, largest_batch=1)
