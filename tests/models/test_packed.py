"""Families whose pipelines pack latents: how, what they refuse, and that no prediction waits for the device."""

import math

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.models.families import family_of_file
from rpo.models.families.flux2_klein import log_shift
from rpo.models.families.packed import pack, positions, unpack
from rpo.types import Canvas, Conditioning
from tests.tiny_chroma import tiny_chroma
from tests.tiny_flux1 import tiny_flux1
from tests.tiny_flux2_klein import tiny_flux2_klein
from tests.tiny_krea2 import tiny_krea2
from tests.tiny_qwen_image import tiny_qwen_image

PACKED = {
    "flux1": tiny_flux1,
    "chroma": tiny_chroma,
    "qwen_image": tiny_qwen_image,
    "flux2_klein": tiny_flux2_klein,
    "krea2": tiny_krea2,
}

families = pytest.mark.parametrize("family", PACKED)


def test_packing_is_that_of_the_pipeline_and_comes_back():
    latents = torch.randn(2, 3, 4, 6)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack(pack(latents), latents), latents)
    assert torch.equal(positions(latents), FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32))


def test_a_network_that_is_told_no_guidance_is_refused():
    with pytest.raises(InputError, match=r"guidance_embeds=False: .*schnell.* use FLUX.1 \[dev\]"):
        Checkpoint(tiny_flux1(guidance_embeds=False))


class Waits(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Refuses what a GPU's host has to wait for: a number, or a shape that depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            raise Waits(str(func))
        return func(*args, **(kwargs or {}))


@families
def test_a_prediction_that_is_computed_again_for_its_gradient_is_the_same(family):
    model = Checkpoint(PACKED[family]())
    cond = model.encode_prompts(["a red circle", "a house"])
    x_t, timestep = torch.randn(2, *model.latent_shape(), requires_grad=True), torch.tensor([100, 700])

    def predicted():
        noise_pred = model.predict(x_t, timestep, cond, 3.0)
        return noise_pred.detach(), *torch.autograd.grad(noise_pred.square().sum(), x_t)

    plain = predicted()
    model.denoiser.enable_gradient_checkpointing()
    model.denoiser.train()
    for one, other in zip(predicted(), plain, strict=True):
        assert torch.equal(one, other)


@families
def test_an_embedding_that_was_kept_as_numbers_of_one_type_predicts_the_same(family):
    model = Checkpoint(PACKED[family]())
    cond = model.encode_prompts(["a red circle", "a house"])
    kept = Conditioning(*({name: one.float() for name, one in side.items()} for side in (cond.prompt, cond.negative)))
    x_t, timestep = torch.randn(2, *model.latent_shape()), torch.tensor([100, 700])
    assert torch.equal(model.predict(x_t, timestep, kept, 3.0), model.predict(x_t, timestep, cond, 3.0))


def test_a_distilled_krea_has_one_shift_for_every_size():
    model = Checkpoint(tiny_krea2(is_distilled=True), allow_distilled=True)
    given = model.pipe("a house", num_inference_steps=3, guidance_scale=0.0, output_type="latent").images
    assert torch.equal(model.grid(3).sigma.float(), model.pipe.scheduler.sigmas)
    assert given.isfinite().all() and model.flow_shift(3) == pytest.approx(math.exp(1.15))
    assert model.canvas == Canvas(64, 64)


@families
def test_a_prediction_waits_for_nothing(family):
    model = Checkpoint(PACKED[family]())
    cond = model.encode_prompts(["a red circle", "a house"])
    x_t, timestep = torch.randn(2, *model.latent_shape()), torch.tensor([100, 700])
    with NoWaiting():
        model.predict(x_t, timestep, cond, 3.0)
        with pytest.raises(Waits):
            x_t.sum().item()


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ("guidance_in.in_layer.weight", "FLUX.1 [dev]"),
        ("distilled_guidance_layer.in_proj.bias", "Chroma"),
        ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
        ("txtfusion.projector.weight", "Krea 2"),
        ("double_stream_modulation_img.lin.weight", "FLUX.2 [klein] base"),
        ("double_blocks.0.img_attn.qkv.weight", "Stable Diffusion 1.x/2.x"),
    ],
)
def test_a_single_file_is_known_by_its_tensors(tensor, name):
    assert family_of_file([f"model.diffusion_model.{tensor}"]).name == name


def test_a_single_file_that_diffusers_does_not_read_is_refused(tmp_path):
    save_file({"transformer_blocks.0.img_mod.1.weight": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(InputError, match="single file of Qwen-Image, which diffusers does not read"):
        Checkpoint.load(tmp_path / "one.safetensors")


def test_the_shift_of_flux2_is_that_of_its_pipeline():
    for num_steps, tokens in [(1, 16), (4, 4096), (50, 4096), (50, 4300), (50, 4301), (28, 9000)]:
        assert log_shift(num_steps, tokens) == pytest.approx(compute_empirical_mu(tokens, num_steps), rel=1e-12)


def test_a_schedule_that_ends_above_0_has_no_single_step():
    model = Checkpoint(tiny_qwen_image())
    with pytest.raises(InputError, match="from nan to 0 at step 0 .* one alone is no grid with shift_terminal"):
        model.grid(1)
    assert model.grid(2).num_steps == 2
