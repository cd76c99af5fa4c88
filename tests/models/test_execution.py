"""What is compiled, and that every family's own switch recomputes instead of keeping."""

import pytest
import torch

from rpo.adapters.lora import add_lora
from rpo.models.execution import call, prepare_denoiser
from rpo.models.loading import family_of
from rpo.trainers.checks.footprint import PeakBytes
from tests.contracts.families import FAMILIES


def denoiser_of(name):
    pipe = FAMILIES[name]()
    family = family_of(pipe)
    family.enable_lora(pipe)
    return pipe, family, pipe.components[family.denoiser]


@pytest.mark.parametrize("name", ["stable_diffusion", "flux1", "sd3"])
def test_repeated_blocks_are_compiled_where_the_class_names_them(name):
    _, _, network = denoiser_of(name)
    prepare_denoiser(network, compute_dtype=torch.float32, compile_denoiser=True)
    compiled = [type(one).__name__ for one in network.modules() if one._compiled_call_impl is not None]
    repeated = [type(one).__name__ for one in network.modules() if type(one).__name__ in network._repeated_blocks]
    assert compiled == (repeated or [type(network).__name__])
    assert bool(repeated) == (name != "sd3")


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_is_a_switch_of_every_family_and_changes_no_gradient(name):
    pipe, family, network = denoiser_of(name)
    trained = add_lora(network, target_modules=family.lora_targets)
    with torch.no_grad():
        embedding = family.embed(pipe, ["a"], torch.device("cpu"))
        for one in trained:
            one.add_(0.01)
    x_t = torch.randn(1, family.latent_channels(pipe), 16, 16)

    def gradient():
        network.zero_grad()
        time = torch.tensor([500.0])
        with PeakBytes() as counted:
            output = call(family, pipe, network, x_t, time, embedding, compute_dtype=torch.float32)
            output.square().mean().backward()
        return torch.cat([one.grad.flatten() for one in trained]), counted

    kept, whole = gradient()
    network.enable_gradient_checkpointing()
    network.train()
    again, recomputed = gradient()
    assert recomputed.flops > 1.1 * whole.flops
    assert recomputed.peak < whole.peak
    assert torch.allclose(kept, again, atol=1e-6)
    assert kept.norm() > 0
