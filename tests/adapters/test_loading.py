"""A checkpoint as a configuration names it: where it goes, in which types, and what it is by default."""

import pytest
import torch

from rpo import shapes
from rpo.adapters.loading import load_model
from rpo.config.load import load_config
from rpo.models.checkpoint import Checkpoint
from rpo.models.config import ModelConfig
from tests.tiny import save_tiny_sd


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_sd(tmp_path_factory.mktemp("models") / "tiny"))


def test_types_are_those_of_the_configuration(folder):
    model = load_model(load_config(ModelConfig, None, [f"source={folder}", "dtype=bfloat16", "device=cpu"]))
    assert {parameter.dtype for parameter in model.denoiser.parameters()} == {torch.bfloat16}


def test_every_setting_reaches_the_checkpoint(monkeypatch):
    asked = {}
    monkeypatch.setattr(Checkpoint, "load", lambda source, **settings: asked.update(settings))
    config = ModelConfig(
        source="file.ckpt",
        allow_distilled=True,
        dtype="float32",
        device="cpu",
        single_file_config="folder",
        revision="main",
        variant="fp16",
        attention="xformers",
        frozen_base="int8",
        compile=True,
    )
    load_model(config, mixed_precision="fp16")
    assert asked == {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "compute_dtype": torch.float16,
        "config": "folder",
        "revision": "main",
        "variant": "fp16",
        "attention": "xformers",
        "frozen_base": "int8",
        "compile_denoiser": True,
        "allow_distilled": True,
    }


@pytest.mark.parametrize(("has_gpu", "device"), [(True, "cuda:3"), (False, "cpu")])
def test_a_device_that_is_left_open_is_that_of_the_process(has_gpu, device, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)  # as on a machine that has all of them
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(Checkpoint, "load", lambda source, **settings: asked.append((source, settings)))
    load_model(ModelConfig())
    load_model(ModelConfig(device="cuda:7"))
    found = [(source, str(settings["device"])) for source, settings in asked]
    assert found == [("shapes", device), ("shapes", "cuda:7")]


def test_nothing_named_is_the_embedded_checkpoint():
    assert load_model(ModelConfig(device="cpu")).fingerprint("vae") == load_model(
        ModelConfig(str(shapes.path()), device="cpu")
    ).fingerprint("vae")
