"""An autoencoder in float16 that has to compute in float32 does so on the way back, too."""

import pytest
import torch

from rpo.models.checkpoint import Checkpoint
from rpo.models.latents import followed
from tests.tiny import tiny_sdxl
from tests.trainers.online_runs import lightness, reward_gradient, score_as_action

pytestmark = [
    pytest.mark.filterwarnings("ignore:the network denoises no better"),
    pytest.mark.filterwarnings("ignore:.*float32"),
]


def half():
    pipe = tiny_sdxl()
    pipe.vae.half()
    assert pipe.vae.config.force_upcast
    return pipe


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_slope_of_a_decoded_image_is_that_of_the_same_weights_in_float32(recomputes):
    pipe, wide = half(), half()
    wide.vae.float()
    model, expected = Checkpoint(pipe), Checkpoint(wide)
    latents = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0)).requires_grad_()
    with followed(model, recomputes=recomputes):
        (found,) = torch.autograd.grad(model.decode(latents).sum(), latents)
    assert torch.equal(found, torch.autograd.grad(expected.decode(latents).sum(), latents)[0])
    assert pipe.vae.dtype == torch.float16 and not pipe.vae.is_gradient_checkpointing


def test_slopes_of_rewards_and_of_values_are_followed_through_it(tmp_path):
    reward_gradient(tmp_path / "slope", pipe=half()).train()
    score_as_action(tmp_path / "value", pipe=half(), reward=lightness, estimator="pathwise").train()
