"""LoRAs beside each other: the file does what the two do one on top of the other, and stock diffusers loads it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rpo.adapters.lora import add_lora, lora_parameters, save_lora
from rpo.adapters.lora_file import WEIGHT_FILE, inspect_lora
from rpo.adapters.stack import stack_loras
from rpo.models.checkpoint import Checkpoint
from tests.tiny import tiny_sd


def trained(folder, *, rank, alpha=None, seed=0, targets=("to_q", "to_k", "to_v", "to_out.0")):
    """A LoRA of the tiny checkpoint whose every factor is filled."""
    model = Checkpoint(tiny_sd())
    add_lora(model.denoiser, rank=rank, alpha=alpha, target_modules=targets, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in lora_parameters(model.denoiser):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_lora(model, folder)
    return folder


@torch.no_grad()
def prediction(*loras):
    """What the checkpoint predicts with the LoRAs fused into it, one after the other."""
    model = Checkpoint(tiny_sd())
    for lora in loras:
        model.pipe.load_lora_weights(str(lora))
        model.pipe.fuse_lora()
        model.pipe.unload_lora_weights()
    x_t = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return model.predict(x_t, torch.tensor([500, 20]), model.encode_prompts(["a cat", "a dog"]))


@pytest.mark.parametrize("alphas", [pytest.param((None, None), marks=pytest.mark.slow), (8.0, 2.0)])
def test_a_stack_does_what_its_parts_do_together(tmp_path, alphas):
    parts = [
        trained(tmp_path / "a", rank=4, alpha=alphas[0], seed=1),
        trained(tmp_path / "b", rank=2, alpha=alphas[1], seed=2),
    ]
    stack_loras(parts, tmp_path / "both")
    together, alone = prediction(*parts), prediction(parts[1])
    effect = (together - prediction()).abs().max()
    assert (together - alone).abs().max() > 0.05 * effect
    assert (prediction(tmp_path / "both") - together).abs().max() < 1e-4 * effect
    found = inspect_lora(tmp_path / "both")
    assert (found.ranks, found.alpha, found.is_portable) == ((6,), 6.0, True)


def test_layers_that_only_one_has_keep_its_rank_and_the_file_still_loads(tmp_path):
    parts = [
        trained(tmp_path / "a", rank=4, targets=("to_q",)),
        trained(tmp_path / "b", rank=2, targets=("to_q", "to_v")),
    ]
    stack_loras(parts, tmp_path / "both")
    assert inspect_lora(tmp_path / "both").ranks == (2, 6)
    with safe_open(tmp_path / "both" / WEIGHT_FILE, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["unet.r"] == 6
    assert set(settings["unet.rank_pattern"].values()) == {2}
    effect = (prediction(*parts) - prediction()).abs().max()
    assert (prediction(tmp_path / "both") - prediction(*parts)).abs().max() < 1e-4 * effect


def test_what_cannot_be_stacked_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got no LoRA to stack"):
        stack_loras([], tmp_path / "none")
    one = trained(tmp_path / "a", rank=2)
    state = {name: torch.nn.functional.pad(tensor, (0, 1)) for name, tensor in load_file(one / WEIGHT_FILE).items()}
    (tmp_path / "other").mkdir()
    save_file(state, tmp_path / "other" / WEIGHT_FILE)
    with pytest.raises(ValueError, match=r"expected LoRAs of one network; give those of one base"):
        stack_loras([one, tmp_path / "other"], tmp_path / "both")
    assert not (tmp_path / "both").exists()
