import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from rpo.lora import add_lora, lora_parameters, save_lora
from rpo.lora_file import WEIGHT_FILE, inspect_lora
from rpo.models.stable_diffusion import StableDiffusion
from tests.tiny import tiny_sd


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A LoRA of rank 3 saved by rpo itself, and the model that carries it."""
    model = StableDiffusion(tiny_sd())
    add_lora(model.denoiser, rank=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(model.denoiser):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    folder = tmp_path_factory.mktemp("lora")
    save_lora(model, folder)
    return folder, model


def write(folder, tensors, alpha=None):
    metadata = {} if alpha is None else {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": alpha, "unet.r": 2})}
    save_file(tensors, folder / WEIGHT_FILE, metadata)
    return folder


def factors(rank=2, up=1.0, down_name="unet.a.lora.down.weight", up_name="unet.a.lora.up.weight"):
    return {down_name: torch.ones(rank, 8), up_name: torch.full((8, rank), up)}


def test_a_saved_lora_tells_what_it_is(saved):
    folder, model = saved
    found = inspect_lora(folder)
    parameters = lora_parameters(model.denoiser)
    assert found.path == folder / WEIGHT_FILE
    assert found.ranks == (3,) and found.alpha == 3 and found.is_portable
    assert found.num_parameters == sum(p.numel() for p in parameters)
    assert found.num_layers == len(parameters) // 2
    assert found.parts == ("unet",)
    assert found.size_bytes == found.path.stat().st_size
    assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
    assert inspect_lora(found.path) == found


@pytest.mark.parametrize(
    ("down", "up"), [("lora.down", "lora.up"), ("lora_A", "lora_B"), ("lora_down", "lora_up")], ids=str
)
def test_every_dialect_is_read(tmp_path, down, up):
    write(tmp_path, factors(down_name=f"unet.a.{down}.weight", up_name=f"unet.a.{up}.weight"))
    found = inspect_lora(tmp_path)
    assert found.ranks == (2,) and found.num_parameters == 32 and found.alpha is None and found.is_portable


def test_another_alpha_than_the_rank_is_not_portable(tmp_path):
    assert not inspect_lora(write(tmp_path, factors(), alpha=4)).is_portable
    assert inspect_lora(write(tmp_path, factors(), alpha=2)).is_portable


def test_no_file(tmp_path):
    message = f"there is no LoRA at {tmp_path}: expected a folder with {WEIGHT_FILE} or a .safetensors file"
    with pytest.raises(ValueError, match=re.escape(message)):
        inspect_lora(tmp_path)


def test_a_truncated_file(saved, tmp_path):
    data = (saved[0] / WEIGHT_FILE).read_bytes()
    (tmp_path / WEIGHT_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"is not a complete safetensors file .*; save or download it again"):
        inspect_lora(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"conv.weight": torch.ones(2)}, "has 0 down and 0 up factors among 1 tensors, but a LoRA has as many of both"),
        (factors() | {"unet.b.lora.down.weight": torch.ones(2, 8)}, "has 2 down and 1 up factors among 3 tensors"),
        (factors(up=0.0), "changes nothing: every up factor is zero, as before the first update; train before saving"),
        (factors(up=float("nan")), "holds numbers that are not finite, in unet.a.lora.up.weight; go back"),
    ],
)
def test_what_is_no_working_lora_is_refused(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        inspect_lora(write(tmp_path, tensors))
