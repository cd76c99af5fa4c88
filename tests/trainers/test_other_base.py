"""A LoRA on top of a fused one: the card says that the file alone is not the model, and the exact sum is."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rpo.adapters.lora import add_lora, lora_parameters, save_lora
from rpo.adapters.stack import stack_loras
from rpo.models.checkpoint import Checkpoint
from rpo.models.fingerprint import is_of_checkpoint
from rpo.models.plain import probe
from rpo.trainers.identity import OTHER_BASE, card_of
from rpo.training.loop_config import LoopConfig
from tests.tiny import save_tiny_sd


@pytest.fixture
def folder(tmp_path):
    return save_tiny_sd(tmp_path / "base")


def with_lora(model, place, *, seed):
    add_lora(model.denoiser, rank=2)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model.denoiser):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return save_lora(model, place)


def fuse(pipe):
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def card(model, *, is_lora=True):
    return card_of(model, "DPO", LoopConfig(), is_lora=is_lora)


def test_the_card_says_when_the_base_is_not_the_checkpoint_that_it_names(folder, tmp_path):
    model = Checkpoint.load(folder)
    first = with_lora(model, tmp_path / "first", seed=1)
    assert card(model).description == ""
    fuse(model.pipe)
    fused = Checkpoint(model.pipe)
    second = with_lora(fused, tmp_path / "second", seed=2)
    assert card(fused).base_model == str(folder)
    assert card(fused).description == OTHER_BASE
    assert card(fused, is_lora=False).description == ""

    stacked = Checkpoint.load(folder)
    stacked.pipe.load_lora_weights(str(stack_loras([first, second], tmp_path / "both").parent))
    alone = Checkpoint.load(folder)
    alone.pipe.load_lora_weights(str(second.parent))
    wanted, both, half = (probe(one.pipe, one.family, torch.float32)["unet"] for one in (fused, stacked, alone))
    assert (both - wanted).abs().max() < 1e-4
    assert (half - wanted).abs().max() > 1e-2


def test_a_checkpoint_that_is_not_at_hand_is_not_fetched(folder):
    unet = Checkpoint.load(folder).denoiser
    assert is_of_checkpoint(unet, "owner/no-such-checkpoint", "unet") is None
    assert is_of_checkpoint(unet, str(folder / "elsewhere"), "unet") is None


@pytest.mark.parametrize(("stored", "loaded"), [("float16", "float32"), ("float32", "bfloat16")])
def test_another_type_of_the_same_weights_is_the_same_checkpoint(folder, stored, loaded):
    file = next((folder / "unet").glob("*.safetensors"))
    tensors = {name: tensor.to(getattr(torch, stored)) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    unet = Checkpoint.load(folder, dtype=getattr(torch, loaded)).denoiser
    assert is_of_checkpoint(unet, str(folder), "unet")
    next(unet.parameters()).data.flatten()[0] += 1
    assert is_of_checkpoint(unet, str(folder), "unet") is False
