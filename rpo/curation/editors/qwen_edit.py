"""Qwen-Image-Edit and its Plus versions (arXiv:2508.02324): a vision-language model reads source and instruction.

The checkpoint says which of the two pipelines it needs, and both are called alike. Plus takes one edit at a time, and
so does this editor for both. The empty negative prompt is a space: without one there is no guidance.
"""

from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline
from PIL.Image import Image

from rpo.curation.component_config import EditorConfig
from rpo.curation.editors.pipeline_editor import EditBatch, EditSettings, Family, PipelineEditor, load_pretrained
from rpo.errors import InputError

MODEL = "Qwen/Qwen-Image-Edit-2509"
LICENCES = {name: "Apache-2.0" for name in ("Qwen/Qwen-Image-Edit", MODEL, "Qwen/Qwen-Image-Edit-2511")}
PIPELINES = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")


def qwen_edit_editor(config: EditorConfig) -> PipelineEditor:
    """A Qwen-Image-Edit checkpoint of either version.

    Args:
        config: Its `model` is a folder or hub id; nothing is Qwen-Image-Edit-2509.
    """
    model = config.model or MODEL
    pipe = load_pretrained(DiffusionPipeline, model, config, {})
    if type(pipe).__name__ not in PIPELINES:
        raise InputError(f"'{model}' is a {type(pipe).__name__}, expected a {' or a '.join(PIPELINES)}; give one")
    return PipelineEditor(pipe, FAMILY, config)


def _edit(pipe: Any, batch: EditBatch, settings: EditSettings) -> Sequence[Image]:
    (image,), (instruction,), (generator,) = batch.images, batch.instructions, batch.generators
    return pipe(
        image,
        instruction,
        negative_prompt=" ",
        true_cfg_scale=settings.guidance_scale,
        num_inference_steps=settings.num_steps,
        generator=generator,
    ).images


def _recommended(pipe: DiffusionPipeline) -> EditSettings:
    return EditSettings(num_steps=40, guidance_scale=4.0)


FAMILY = Family("qwen_edit", MODEL, LICENCES, _recommended, _edit, largest_batch=1)
