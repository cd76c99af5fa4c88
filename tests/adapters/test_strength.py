"""A strength multiplies B·A of every network: 0 is the base, 1 the whole adapter, bit for bit; and is for a while."""

import pytest
import torch

from rpo.adapters.lora import adapter_layers, add_lora, load_lora, save_lora
from rpo.adapters.strength import at_strength
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.sampling.sample import generate
from tests.adapters.test_lora import disturb, predict
from tests.tiny import tiny_sd


def drawn(model):
    return generate(model, ["a", "b"], seed=3, num_steps=3, guidance_scale=2.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two LoRAs of the UNet and the text encoder, of which alpha is not the rank."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("first", "second")):
        model = Checkpoint(tiny_sd())
        disturb(add_lora(model.denoiser, rank=2, alpha=3, seed=seed))
        projections = ("q_proj", "v_proj")
        disturb(add_lora(model.text_encoders["text_encoder"], rank=2, target_modules=projections, seed=seed))
        save_lora(model, folder / name)
    return folder


def loaded(*files, dtype=torch.float32):
    model = Checkpoint(tiny_sd(dtype=dtype))
    for number, file in enumerate(files):
        load_lora(model, file, name=f"lora-{number}")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_the_ends_are_the_base_and_the_adapter_bit_for_bit(dtype, files):
    base, whole, model = loaded(dtype=dtype), loaded(files / "first", dtype=dtype), loaded(files / "first", dtype=dtype)
    with at_strength(model, {"lora-0": 0.0}):
        assert torch.equal(drawn(model), drawn(base))
    with at_strength(model, {"lora-0": 1.0}):
        assert torch.equal(drawn(model), drawn(whole))
    assert not torch.equal(drawn(whole), drawn(base))


def test_one_of_two_is_left_out_bit_for_bit(files):
    both, first = loaded(files / "first", files / "second"), loaded(files / "first")
    with at_strength(both, {"lora-1": 0.0}):
        assert torch.equal(drawn(both), drawn(first))


def test_it_multiplies_the_update_of_a_layer(files):
    """W + s·(alpha / rank)·B·A, against diffusers' own scale, and linear in s."""
    model = loaded(files / "first")
    layer = adapter_layers(model.denoiser)[0]
    factors = layer.scaling["lora-0"] * layer.lora_B["lora-0"].weight @ layer.lora_A["lora-0"].weight
    x = torch.randn(5, factors.shape[1], generator=torch.Generator().manual_seed(0))
    for strength in (0.3, -1.5):
        with at_strength(model, {"lora-0": strength}):
            update = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(update, strength * x @ factors.T, rtol=1e-4, atol=1e-5)
    stock = loaded(files / "first")
    stock.pipe.set_adapters(["lora-0"], [0.3])
    with at_strength(model, {"lora-0": 0.3}):
        torch.testing.assert_close(drawn(model), drawn(stock), rtol=0, atol=1e-5)


def test_afterwards_all_is_as_it_was_even_after_an_error(files):
    model = loaded(files / "first", files / "second")
    before = predict(model)
    with pytest.raises(RuntimeError, match="inside"), at_strength(model, {"lora-0": 0.0, "lora-1": 0.5}):
        assert not torch.equal(predict(model), before)
        raise RuntimeError("inside")
    assert torch.equal(predict(model), before)


@pytest.mark.parametrize("strengths", [{"other": 1.0}, {"lora-0": float("nan")}, {"lora-0": float("inf")}])
def test_a_strength_that_cannot_be_is_refused(strengths, files):
    with pytest.raises(InputError, match="lora-0"), at_strength(loaded(files / "first"), strengths):
        pass
