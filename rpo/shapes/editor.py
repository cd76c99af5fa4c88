"""The editor of the shapes world: a small InstructPix2Pix that comes with the package."""

from dataclasses import replace

from diffusers import DPMSolverMultistepScheduler

from rpo import shapes
from rpo.curation.curate_config import EditorConfig
from rpo.curation.editors.families import FAMILIES, load_pretrained
from rpo.curation.editors.pipeline_editor import EditSettings, PipelineEditor

SHAPES = replace(
    FAMILIES["instruct_pix2pix"],
    kind="shapes",
    licences={"shapes": "Apache-2.0"},
    defaults=lambda pipe: EditSettings(
        shapes.EDIT_SOLVER_STEPS, shapes.EDIT_GUIDANCE_SCALE, shapes.EDIT_IMAGE_GUIDANCE_SCALE
    ),
)


def shapes_editor(config: EditorConfig) -> PipelineEditor:
    """The editor of the embedded world.

    Args:
        config: Its `model` is a folder that `scripts/shapes/pretrain_editor.py` wrote; nothing is the embedded one.
    """
    folder = config.model or str(shapes.editor_path())
    pipe = load_pretrained(SHAPES, folder, config)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)  # half the steps of its own
    return PipelineEditor(pipe, SHAPES, config, folder=folder)
