"""The adapter layer: starts at the base, steps aside cleanly, and its file is what it says."""

import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rpo.adapters.formats import write
from rpo.adapters.lora import (
    adapter_layers,
    add_lora,
    lora_parameters,
    reference,
    save_lora,
    verify_lora,
)
from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.models.checkpoint import Checkpoint
from tests.tiny import tiny_sd


def model_with_lora(*, dtype=torch.float32, trained=True, **lora):
    model = Checkpoint(tiny_sd(dtype=dtype))
    parameters = add_lora(model.denoiser, **lora)
    if trained:
        disturb(parameters)
    return model


def disturb(parameters, scale=0.1):
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def predict(model):
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.predict(x_t, torch.tensor([100, 700]), model.encode_prompts(["a", "b"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing_bit_for_bit(dtype):
    base = predict(Checkpoint(tiny_sd(dtype=dtype)))
    assert torch.equal(predict(model_with_lora(dtype=dtype, trained=False)), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_the_base_bit_for_bit_and_the_policy_comes_back(dtype):
    base, model = predict(Checkpoint(tiny_sd(dtype=dtype))), model_with_lora(dtype=dtype)
    policy = predict(model)
    with reference(model.denoiser):
        inside = predict(model)
    assert torch.equal(inside, base)
    assert not torch.equal(policy, base)
    assert not inside.requires_grad
    assert torch.equal(predict(model), policy)


def test_reference_is_restored_after_an_exception():
    model = model_with_lora()
    policy = predict(model)
    with pytest.raises(RuntimeError, match="inside"), reference(model.denoiser):
        raise RuntimeError("inside")
    assert torch.equal(predict(model), policy)


def test_reference_unfreezes_nothing():
    model = model_with_lora()
    parameters = lora_parameters(model.denoiser)
    parameters[0].requires_grad_(False)
    with reference(model.denoiser):
        assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)


def test_references_nest():
    model = model_with_lora()
    policy = predict(model)
    with reference(model.denoiser):
        with reference(model.denoiser):
            pass
        inside = predict(model)
    assert not torch.equal(inside, policy)
    assert torch.equal(predict(model), policy)


def test_only_the_adapter_learns_and_it_is_float32_on_a_half_base():
    model = model_with_lora(dtype=torch.bfloat16)
    parameters = lora_parameters(model.denoiser)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    predict(model).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    others = [p for name, p in model.denoiser.named_parameters() if ".lora_" not in name]
    assert not any(parameter.requires_grad for parameter in others)
    assert {parameter.dtype for parameter in others} == {torch.bfloat16}


def test_alpha_equals_rank_by_default_and_the_start_is_seeded_without_touching_the_global_state():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = model_with_lora(trained=False, rank=4, seed=5), model_with_lora(trained=False, rank=4, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    config = first.denoiser.peft_config["default"]
    assert config.lora_alpha == config.r == 4
    for ours, theirs in zip(lora_parameters(first.denoiser), lora_parameters(second.denoiser), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("alpha", "strength"), [(None, 1.0), (6.0, 3.0), (1.0, 0.5)])
def test_a_layer_adds_its_two_factors_by_alpha_over_rank(alpha, strength):
    layer = adapter_layers(model_with_lora(rank=2, alpha=alpha).denoiser)[0]
    x = torch.randn(3, layer.base_layer.in_features, generator=torch.Generator().manual_seed(2))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + strength * x @ down.T @ up.T)


@pytest.mark.parametrize("alpha", [None, 4.0])
def test_stock_diffusers_loads_the_file_to_the_same_images(tmp_path, alpha):
    model = model_with_lora(rank=2, alpha=alpha)
    save_lora(model, tmp_path)
    pipe = tiny_sd()
    arguments = {"num_inference_steps": 3, "output_type": "pt"}
    base = pipe("a", generator=torch.Generator().manual_seed(0), **arguments).images
    pipe.load_lora_weights(str(tmp_path))
    loaded = pipe("a", generator=torch.Generator().manual_seed(0), **arguments).images
    live = model.pipe("a", generator=torch.Generator().manual_seed(0), **arguments).images
    assert (loaded - live).abs().max() < 1e-5
    assert (loaded - base).abs().max() > 1e-3


def test_the_file_says_what_the_adapter_is(tmp_path):
    path = save_lora(model_with_lora(rank=2, alpha=4.0), tmp_path)
    assert path == tmp_path / WEIGHT_FILE
    with safe_open(path, "pt") as file:
        assert '"unet.lora_alpha": 2' in file.metadata()["lora_adapter_metadata"]  # alpha is taken into B
        assert all(name.startswith("unet.") for name in file.keys())  # noqa: SIM118


def test_text_encoder_adapters_are_saved_and_verified_too(tmp_path):
    model = model_with_lora(rank=2)
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    disturb(add_lora(model.text_encoders["text_encoder"], rank=2, target_modules=projections))
    save_lora(model, tmp_path)
    pipe = tiny_sd()
    pipe.load_lora_weights(str(tmp_path))
    assert (predict(Checkpoint(pipe)) - predict(model)).abs().max() < 1e-5
    assert adapter_layers(pipe.text_encoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_verifies_in_the_type_of_the_base(tmp_path, dtype):
    save_lora(model_with_lora(dtype=dtype), tmp_path)


def test_saving_leaves_the_live_model_and_its_base_alone(tmp_path):
    model = model_with_lora()
    policy, flags = predict(model), [p.requires_grad for p in model.denoiser.parameters()]
    save_lora(model, tmp_path)
    assert torch.equal(predict(model), policy)
    assert [p.requires_grad for p in model.denoiser.parameters()] == flags


def test_an_untrained_adapter_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="the adapter changes nothing"):
        save_lora(model_with_lora(trained=False), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("factor", [0.0, 2.0, 0.98])
def test_a_file_of_another_strength_is_found_out(tmp_path, factor):
    model = model_with_lora()
    path = save_lora(model, tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = {
        name: tensor * factor if "lora_B" in name or "lora.up" in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata=metadata)
    with pytest.raises(ValueError, match="the file does not reproduce the adapter"):
        verify_lora(model, tmp_path)


def test_a_full_disk_keeps_the_older_file(tmp_path, monkeypatch):
    model = model_with_lora()
    before = save_lora(model, tmp_path).read_bytes()
    disturb(lora_parameters(model.denoiser))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(OSError, match="the LoRA was not saved .No space left on device.*an earlier file untouched"):
        save_lora(model, tmp_path)
    assert (tmp_path / WEIGHT_FILE).read_bytes() == before
    names = [write.KOHYA_FILE, write.PEFT_FOLDER, WEIGHT_FILE]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_second_adapter_is_refused():
    model = model_with_lora()
    with pytest.raises(ValueError, match="already carries an adapter.*unload_lora_weights"):
        add_lora(model.denoiser)


def test_no_matching_layer_is_refused():
    with pytest.raises(ValueError, match=r"no layer of UNet2DConditionModel ends in \('nothing',\)"):
        add_lora(tiny_sd().unet, target_modules=["nothing"])


def test_a_target_that_matches_nothing_beside_one_that_does_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"ends in \('to_qq', 'o_k'\), but target_modules is \('to_q', 'to_qq', 'o_k'\)"
    ):
        add_lora(tiny_sd().unet, target_modules=("to_q", "to_qq", "o_k"))


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16])
def test_the_start_of_a_lora_does_not_depend_on_torch_s_default_type(other):
    usual = [one.clone() for one in add_lora(tiny_sd().unet, seed=3)]
    unet, before = tiny_sd().unet, torch.get_default_dtype()
    torch.set_default_dtype(other)
    try:
        again = add_lora(unet, seed=3)
        assert torch.get_default_dtype() == other
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(*pair) for pair in zip(usual, again, strict=True))


def test_the_start_of_a_lora_does_not_depend_on_torch_s_default_device():
    usual = [one.clone() for one in add_lora(tiny_sd().unet, seed=3)]
    unet = tiny_sd().unet
    with torch.device("meta"):
        again = add_lora(unet, seed=3)
    assert all(torch.equal(*pair) for pair in zip(usual, again, strict=True))


def test_rank_zero_is_refused():
    with pytest.raises(ValueError, match="rank is 0, but a LoRA needs rank >= 1"):
        add_lora(tiny_sd().unet, rank=0)


def test_reference_of_a_network_without_adapter_is_refused():
    with pytest.raises(ValueError, match="carries no adapter, so it has no reference"), reference(tiny_sd().unet):
        pass


def test_a_merged_adapter_is_refused():
    model = model_with_lora()
    adapter_layers(model.denoiser)[0].merge()
    with pytest.raises(ValueError, match="the adapter is merged into the weights"), reference(model.denoiser):
        pass


def test_peft_s_private_switch_still_is_what_its_own_property_reads():
    layer = adapter_layers(model_with_lora().denoiser)[0]
    assert layer.disable_adapters is layer._disable_adapters is False
    layer._disable_adapters = True
    assert layer.disable_adapters is True
