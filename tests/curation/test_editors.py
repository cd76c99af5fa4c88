"""Every editor with a tiny pipeline of its real class: sizes, seeds, batches, what is refused, what it says it is."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image

from rpo.curation.components import EDITORS, load_editor
from rpo.curation.curate_config import EditorConfig
from rpo.curation.editors import families
from rpo.curation.editors.families import FAMILIES as KNOWN
from rpo.curation.editors.pipeline_editor import EditSettings, PipelineEditor, licence_of, place
from tests import tiny_editors
from tests.curation.tiny_editors import ready, tiny_controlnet, tiny_controlnet_pipeline
from tests.tiny import save_tiny_sd
from tests.tiny_flux2_klein import tiny_flux2_klein

SMALL = EditSettings(28, 2.5, max_area=64 * 64)
FAMILIES = {
    "instruct_pix2pix": (tiny_editors.tiny_pix2pix, KNOWN["instruct_pix2pix"]),
    "controlnet": (tiny_controlnet_pipeline, KNOWN["controlnet"]),
    "kontext": (
        tiny_editors.tiny_kontext,
        replace(KNOWN["kontext"], defaults=lambda pipe: EditSettings(28, 2.5, max_area=64 * 64)),
    ),
    "flux2_klein": (tiny_flux2_klein, KNOWN["flux2_klein"]),
    "qwen_edit_plus": (tiny_editors.tiny_qwen_edit_plus, KNOWN["qwen_edit"]),
    "qwen_edit": (tiny_editors.tiny_qwen_edit, KNOWN["qwen_edit"]),
}
INSTRUCTIONS = ["make it red", "make it blue", "add a hat"]


@cache
def tiny_editor(name, **settings):
    build, family = FAMILIES[name]
    return PipelineEditor(ready(build()), family, EditorConfig(model="tiny", num_steps=2, **settings))


def noise(seed, width=64, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def difference(one, other):
    assert one.size == other.size
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


@pytest.fixture(autouse=True)
def qwen_works_at_64_pixels(monkeypatch):
    """It has no setting for its megapixel; with tiny networks that alone would take a minute."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        real = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, real=real: real(64 * 64, ratio))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_edit_depends_on_its_own_image_instruction_and_seed_alone(name):
    editor = tiny_editor(name)
    images = [noise(0), noise(1), noise(2, width=80)]
    together = editor(images, INSTRUCTIONS, [1, 2, 3])
    assert [image.size for image in together] == [(64, 64), (64, 64), (80, 64)]
    assert {image.mode for image in together} == {"RGB"}
    (alone,) = editor(images[1:2], INSTRUCTIONS[1:2], [2])
    assert difference(alone, together[1]) <= 1
    (other_seed,) = editor(images[1:2], INSTRUCTIONS[1:2], [4])
    (other_text,) = editor(images[1:2], INSTRUCTIONS[:1], [2])
    (other_image,) = editor(images[:1], INSTRUCTIONS[1:2], [2])
    assert min(difference(alone, other) for other in (other_seed, other_text, other_image)) > 5


def test_every_setting_reaches_the_pipeline():
    editor, image = tiny_editor("instruct_pix2pix"), noise(0)
    (plain,) = editor([image], ["make it red"], [1])
    for setting in ({"guidance_scale": 2.0}, {"image_guidance_scale": 3.0}):
        (other,) = tiny_editor("instruct_pix2pix", **setting)([image], ["make it red"], [1])
        assert difference(plain, other) > 5
    (felt,) = tiny_editor("controlnet")([image], ["make it red"], [1])
    (unfelt,) = tiny_editor("controlnet", conditioning_scale=0.0)([image], ["make it red"], [1])
    assert difference(felt, unfelt) > 5


def test_identity_tells_what_decides_the_edits():
    one = dict(tiny_editor("instruct_pix2pix").identity)
    assert one["kind"] == "instruct_pix2pix" and one["model"] == "tiny" and one["num_steps"] == "2"
    assert (one["guidance_scale"], one["image_guidance_scale"]) == ("7.5", "1.5")
    assert one["pipeline"] == "StableDiffusionInstructPix2PixPipeline" and one["scheduler"] == "DDIMScheduler"
    other = dict(tiny_editor("instruct_pix2pix", guidance_scale=2.0).identity)
    assert {key for key in one if one[key] != other[key]} == {"guidance_scale"}
    distilled, full = (
        PipelineEditor(
            tiny_flux2_klein(is_distilled=yes), KNOWN["flux2_klein"], EditorConfig(kind="flux2_klein")
        ).identity
        for yes in (True, False)
    )
    assert (distilled["num_steps"], distilled["guidance_scale"]) == ("4", "1.0")
    assert (full["num_steps"], full["guidance_scale"]) == ("50", "4.0")


def test_licences_are_known_read_from_the_card_or_empty(tmp_path: Path):
    assert (
        licence_of("black-forest-labs/FLUX.1-Kontext-dev", KNOWN["kontext"].licences)
        == "FLUX.1 [dev] Non-Commercial License"
    )
    assert licence_of("somebody/else", KNOWN["kontext"].licences) == ""
    (tmp_path / "README.md").write_text("---\nlicense: openrail\n---\n# Mine\n")
    assert licence_of(str(tmp_path), {}) == "openrail"
    assert tiny_editor("instruct_pix2pix").licence == ""


def test_an_editor_is_loaded_from_a_folder(tmp_path: Path):
    folder = tmp_path / "editor"
    tiny_editors.tiny_pix2pix().save_pretrained(folder)
    config = EditorConfig(kind="instruct_pix2pix", model=str(folder), num_steps=1, device="cpu", batch_size=3)
    editor = load_editor(config)
    assert editor.batch_size == 3 and editor.concurrency == 1 and len(editor.identity["revision"]) == 64
    assert editor([noise(0)], ["make it red"], [1])[0].size == (64, 64)
    (folder / "note.txt").write_text("changed")
    assert load_editor(config).identity["revision"] != editor.identity["revision"]


FOLDERS = {
    "shapes": tiny_editors.tiny_pix2pix,
    "instruct_pix2pix": tiny_editors.tiny_pix2pix,
    "kontext": tiny_editors.tiny_kontext,
    "flux2_klein": tiny_flux2_klein,
}
NO_FOLDERS = {"controlnet", "qwen_edit"}
"""One needs two folders, the other a processor that needs torchvision; both have a test of their own."""


def test_every_editor_is_tried_with_its_real_classes():
    assert {name.removesuffix("_plus") for name in FAMILIES} | {"shapes"} == set(EDITORS) == set(FOLDERS) | NO_FOLDERS


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_kind_is_loaded_from_a_folder_and_edits(kind, tmp_path: Path):
    pipe = FOLDERS[kind]()
    pipe.save_pretrained(tmp_path)
    editor = load_editor(EditorConfig(kind=kind, model=str(tmp_path), num_steps=1, device="cpu"))
    assert editor.identity["kind"] == kind and editor.identity["pipeline"] == type(pipe).__name__
    assert editor.identity["num_steps"] == "1" and len(editor.identity["revision"]) == 64
    if kind == "kontext":
        assert editor.identity["max_area"] == str(1024 * 1024), "too much for a test"
        return
    (edit,) = editor([noise(0, width=80)], ["make it red"], [1])
    assert edit.size == (80, 64) and difference(edit, noise(0, width=80)) > 0


@pytest.mark.parametrize("pipeline_class", [QwenImageEditPipeline, QwenImageEditPlusPipeline])
def test_both_versions_of_qwen_are_known_by_their_class(pipeline_class, tmp_path: Path, monkeypatch):
    pipe = ready(tiny_editors.tiny_qwen_edit(pipeline_class))
    monkeypatch.setattr(families, "load_pretrained", lambda *given: pipe)
    editor = load_editor(EditorConfig(kind="qwen_edit", model=str(tmp_path), num_steps=1, device="cpu"))
    assert editor.identity["pipeline"] == pipeline_class.__name__ and editor.identity["guidance_scale"] == "4.0"
    assert editor([noise(0)], ["make it red"], [1])[0].size == (64, 64)


def test_controlnet_takes_a_base_of_your_own(tmp_path: Path):
    base = save_tiny_sd(tmp_path / "base")
    tiny_controlnet().save_pretrained(tmp_path / "net")
    config = EditorConfig(kind="controlnet", model=str(tmp_path / "net"), base_model=str(base), num_steps=1)
    editor = load_editor(config)
    assert editor.identity["base_model"] == str(base) and len(editor.identity["base_revision"]) == 64
    assert editor([noise(0)], ["make it red"], [1])[0].size == (64, 64)


@pytest.mark.parametrize("kind", [kind for kind in EDITORS if kind != "shapes"])
def test_what_is_no_editor_is_refused(kind, tmp_path: Path):
    with pytest.raises(ValueError, match="expected a"):
        load_editor(EditorConfig(kind=kind, model=str(tmp_path), base_model=str(tmp_path)))


def test_wrong_settings_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no editor of kind 'ip2p'; expected one of shapes, instruct_pix2pix"):
        load_editor(EditorConfig(kind="ip2p"))
    with pytest.raises(ValueError, match="instruct_pix2pix: guidance_scale is 0.5, expected at least 1; leave it out"):
        tiny_editor("instruct_pix2pix", guidance_scale=0.5)
    with pytest.raises(ValueError, match="EditorConfig sets 'dtype' to 'half', but one of auto, float32"):
        place(EditorConfig(dtype="half"))
    base = save_tiny_sd(tmp_path / "base")
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline, expected a QwenImageEditPipeline or a"):
        load_editor(EditorConfig(kind="qwen_edit", model=str(base)))
