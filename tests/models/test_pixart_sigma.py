"""PixArt-Sigma, whose classes in diffusers load no LoRA."""

import json

from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

from rpo.models.checkpoint import Checkpoint
from tests.tiny_pixart_sigma import tiny_pixart_sigma


def test_what_can_carry_a_lora_is_given_it_once_and_is_saved_under_diffusers_names(tmp_path):
    pipe = tiny_pixart_sigma()
    for _ in range(2):
        Checkpoint(pipe)
    assert type(pipe).__bases__[0] is PixArtSigmaPipeline
    assert type(pipe.transformer).__bases__[0] is PixArtTransformer2DModel
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtSigmaPipeline"
    assert index["transformer"] == ["diffusers", "PixArtTransformer2DModel"]
    assert type(PixArtSigmaPipeline.from_pretrained(tmp_path)) is PixArtSigmaPipeline


def test_diffusers_own_classes_stay_as_they_are():
    Checkpoint(tiny_pixart_sigma())
    assert not hasattr(PixArtSigmaPipeline, "load_lora_weights")  # if it has one day, the preparation can go
    assert not hasattr(PixArtTransformer2DModel, "add_adapter")
