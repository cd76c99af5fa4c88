"""The editor of the shapes world: a small InstructPix2Pix that comes with the package."""

from diffusers import DiffusionPipeline

from rpo import shapes
from rpo.curation.component_config import EditorConfig
from rpo.curation.editors.instruct_pix2pix import edit, load
from rpo.curation.editors.pipeline_editor import EditSettings, Family, PipelineEditor


def shapes_editor(config: EditorConfig) -> PipelineEditor:
    """The editor of the embedded world.

    Args:
        config: Its `model` is a folder that `scripts/shapes/pretrain_editor.py` wrote; nothing is the embedded one.
    """
    folder = config.model or str(shapes.editor_path())
    return PipelineEditor(load(folder, config), SHAPES, config, folder=folder)


def _recommended(pipe: DiffusionPipeline) -> EditSettings:
    return EditSettings(shapes.EDIT_NUM_STEPS, shapes.EDIT_GUIDANCE_SCALE, shapes.EDIT_IMAGE_GUIDANCE_SCALE)


SHAPES = Family("shapes", "shapes", {"shapes": "Apache-2.0"}, _recommended, edit)
