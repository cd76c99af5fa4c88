"""A modular pipeline is taken by its components."""

import diffusers
import pytest
import torch

from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from tests.tiny import tiny_sd3, tiny_sdxl
from tests.tiny_flux1 import tiny_flux1
from tests.tiny_flux2_klein import tiny_flux2_klein
from tests.tiny_z_image import tiny_z_image
from tests.trainers import pair_runs

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")

MODULAR = {
    "StableDiffusionXLModularPipeline": tiny_sdxl,
    "StableDiffusion3ModularPipeline": tiny_sd3,
    "FluxModularPipeline": tiny_flux1,
    "Flux2KleinBaseModularPipeline": tiny_flux2_klein,
    "ZImageModularPipeline": tiny_z_image,
}


def modular(name, usual):
    pipe = getattr(diffusers, name)()
    pipe.update_components(**{part: one for part, one in usual.components.items() if part in pipe.component_names})
    return pipe


@pytest.mark.parametrize("name", MODULAR)
def test_it_predicts_as_the_usual_pipeline(name):
    usual = MODULAR[name]()
    found, known = Checkpoint(modular(name, usual)), Checkpoint(usual)
    assert found.denoiser is usual.components[known.family.denoiser]
    x_t = torch.randn(1, *known.latent_shape(), generator=torch.Generator().manual_seed(0))
    one, other = (
        model.predict(x_t, torch.tensor(500), model.encode_prompts(["a red circle"]), 3.0) for model in (found, known)
    )
    assert torch.equal(one, other)


@pytest.mark.slow
def test_what_is_trained_is_trained_on_its_components(tmp_path):
    pipe = modular("FluxModularPipeline", tiny_flux1())
    pair_runs.trained(tmp_path, pipe=pipe)
    assert any("lora_B" in name and bool(one.any()) for name, one in pipe.transformer.named_parameters())


def test_a_folder_with_one_is_loaded(tmp_path):
    usual = tiny_z_image()
    modular("ZImageModularPipeline", usual).save_pretrained(str(tmp_path))
    model = Checkpoint.load(tmp_path)
    assert model.family.name == "Z-Image"
    assert model.fingerprint("denoiser") == Checkpoint(usual).fingerprint("denoiser")


def test_a_broken_folder_is_named(tmp_path):
    modular("ZImageModularPipeline", tiny_z_image()).save_pretrained(str(tmp_path / "a"))
    folder, index = (tmp_path / "a").rename(tmp_path / "b"), tmp_path / "b/modular_model_index.json"
    (folder / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="b' does not load as a modular pipeline: .* has no transformer"):
        Checkpoint.load(folder)
    index.write_text(index.read_text().replace('"ZImageModularPipeline', '"NoModularPipeline'))
    with pytest.raises(InputError, match="b' does not load as a modular pipeline: .* no attribute NoModularPipeline"):
        Checkpoint.load(folder)


def test_one_whose_components_are_not_loaded_says_how():
    with pytest.raises(InputError, match=r"has no transformer, vae, .*load_components"):
        Checkpoint(diffusers.ZImageModularPipeline())


def test_one_of_an_unknown_family_is_refused():
    with pytest.raises(InputError, match=r"is a Flux3ModularPipeline, .*docs/add_a_family.md"):
        Checkpoint(diffusers.Flux3ModularPipeline())
