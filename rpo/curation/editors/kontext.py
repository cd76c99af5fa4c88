"""FLUX.1 Kontext (arXiv:2506.15742): a flow transformer that reads the source's latents beside its own.

It works at about one megapixel, whatever the size of the source; a smaller area is given as it is, without snapping to
the resolutions that it was trained at.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from diffusers import DiffusionPipeline, FluxKontextPipeline
from PIL.Image import Image

from rpo.curation.component_config import EditorConfig
from rpo.curation.editors.pipeline_editor import EditBatch, EditSettings, Family, PipelineEditor, load_pretrained

MODEL = "black-forest-labs/FLUX.1-Kontext-dev"
LICENCES = {MODEL: "FLUX.1 [dev] Non-Commercial License"}
TRAINED_AREA = 1024 * 1024
MULTIPLE = 16
"""Of a side, in pixels: eight per latent, two latents per token."""


def kontext_editor(config: EditorConfig) -> PipelineEditor:
    """A Kontext checkpoint.

    Args:
        config: Its `model` is a folder or hub id; nothing is FLUX.1-Kontext-dev.
    """
    pipe = load_pretrained(FluxKontextPipeline, config.model or MODEL, config, {})
    return PipelineEditor(pipe, kontext_family(), config)


def kontext_family(max_area: int = TRAINED_AREA) -> Family:
    """Kontext at another working size.

    Args:
        max_area: Pixels that it works at; the published model was trained at about one million.
    """
    return Family("kontext", MODEL, LICENCES, partial(_recommended, max_area=max_area), _edit)


def _edit(pipe: Any, batch: EditBatch, settings: EditSettings) -> Sequence[Image]:
    width, height = batch.images[0].size
    scale = math.sqrt(settings.max_area / (width * height))
    is_as_trained = settings.max_area == TRAINED_AREA
    return pipe(
        batch.images,
        batch.instructions,
        height=max(round(height * scale / MULTIPLE), 1) * MULTIPLE,
        width=max(round(width * scale / MULTIPLE), 1) * MULTIPLE,
        num_inference_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        generator=batch.generators,
        max_area=settings.max_area,
        _auto_resize=is_as_trained,
    ).images


def _recommended(pipe: DiffusionPipeline, max_area: int) -> EditSettings:
    return EditSettings(num_steps=28, guidance_scale=2.5, max_area=max_area)
