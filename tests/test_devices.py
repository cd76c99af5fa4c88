"""A device that is not there is said in one line before anything is loaded; a slow type is told."""

import pytest
import torch

from rpo.adapters.loading import load_model
from rpo.cli.main import main
from rpo.devices import device_named, slow_type_note, uploaded
from rpo.models.checkpoint import Checkpoint
from rpo.models.config import ModelConfig


@pytest.mark.parametrize("name", ["cuda:99", "cud", "gpu", "cpu:x", "", "xpu"])
def test_a_device_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^device is {name!r}, which cannot be used here .*; expected auto, cpu or"):
        device_named(name)


def test_a_device_that_is_there_is_taken() -> None:
    assert device_named("cpu") == torch.device("cpu")
    assert device_named("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("train grpo configs/grpo_shapes.yaml", "model.device=cuda:99"),
        ("quickstart", "curate.source.model.device=cuda:99"),
    ],
)
def test_a_command_says_so_in_one_line(command, word, tmp_path, capsys) -> None:
    assert main([*command.split(), word, f"output={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("rpo: error: device is 'cuda:99', which cannot be used")


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize(("weights", "compute"), [("bfloat16", None), ("float32", "float16"), ("float32", None)])
def test_half_precision_without_units_for_it_is_told(amx, weights, compute, monkeypatch, capfd) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: None)
    load_model(ModelConfig(device="cpu", dtype=weights), mixed_precision="fp16" if compute else "no")
    half = compute or weights
    told = f"{half} on this CPU is several times slower than float32" in "".join(capfd.readouterr())
    assert told == (not amx and half != "float32")


def test_a_gpu_needs_no_such_note() -> None:
    assert slow_type_note(torch.device("cuda"), torch.bfloat16) is None
    assert slow_type_note(torch.device("cpu"), torch.float32) is None


def test_what_is_uploaded_is_the_same_there() -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    assert torch.equal(uploaded(tensor, device_named("auto")).cpu(), tensor)
