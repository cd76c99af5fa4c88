"""Editors: what carries out instructions, and how a configuration becomes one."""

from rpo.curation.component_config import EditorConfig
from rpo.curation.components import make_component
from rpo.curation.records import Editor

__all__ = ["EDITORS", "EditorConfig", "load_editor"]

EDITORS = {
    "shapes": "rpo.shapes.editor:shapes_editor",
    "instruct_pix2pix": "rpo.curation.editors.instruct_pix2pix:instruct_pix2pix_editor",
    "controlnet": "rpo.curation.editors.controlnet:controlnet_editor",
    "kontext": "rpo.curation.editors.kontext:kontext_editor",
    "flux2_klein": "rpo.curation.editors.flux2_klein:flux2_klein_editor",
    "qwen_edit": "rpo.curation.editors.qwen_edit:qwen_edit_editor",
}
"""The editors that come with the package: each is called with the configuration."""


def load_editor(config: EditorConfig) -> Editor:
    """Make the editor that a configuration describes.

    Args:
        config: Kind, model and settings; an editor of your own is called with it, too.
    """
    return make_component(config, EDITORS, "editor")
