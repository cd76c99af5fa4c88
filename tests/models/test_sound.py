"""A checkpoint that lost a number on the way: a weight, the latents' scale, the schedule, the prediction type."""

import json

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)

import rpo.shapes
from rpo.models.checkpoint import Checkpoint
from rpo.models.families import FAMILIES
from rpo.models.schedules import DiscreteSchedule, noise_schedule
from rpo.models.sound import prediction_errors
from rpo.process.grid import vp_node
from tests.tiny import save_tiny_sd, tiny_scheduler, tiny_sd


def set_weight(part, value):
    def alter(pipe):
        next(pipe.components[part].parameters()).data.flatten()[0] = value

    return alter


def zero(part):
    def alter(pipe):
        for parameter in pipe.components[part].parameters():
            parameter.data.zero_()

    return alter


def quantise(pipe):
    layer = pipe.unet.mid_block.attentions[0].proj_in
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (set_weight("unet", float("nan")), r"unet\.conv_in\.weight has numbers that are not finite, in 1 tensor of"),
        (set_weight("vae", float("inf")), r"vae\..* has numbers that are not finite"),
        (set_weight("text_encoder", -float("inf")), r"text_encoder\..* has numbers that are not finite"),
        (zero("unet"), "all weights of unet are zero"),
        (zero("text_encoder"), "all weights of text_encoder are zero"),
        (quantise, r"unet\.mid_block.*is torch\.int8, but float32"),
        (lambda pipe: pipe.vae.to(torch.float8_e4m3fn), r"vae\..*is torch\.float8_e4m3fn, but float32"),
    ],
)
def test_weights_that_cannot_be_computed_with_are_named(alter, message):
    pipe = tiny_sd()
    alter(pipe)
    with pytest.raises(ValueError, match=message):
        Checkpoint(pipe)


@pytest.mark.parametrize("scale", [0, 0.0, -0.18, float("nan"), float("inf"), None, "0.18215", True])
def test_a_vae_without_a_scale_is_refused(scale):
    pipe = tiny_sd()
    pipe.vae.register_to_config(scaling_factor=scale)
    with pytest.raises(ValueError, match="the VAE's configuration has scaling_factor .*0.18215"):
        Checkpoint(pipe)


@pytest.mark.parametrize("scale", [0, None])
def test_a_folder_whose_vae_has_no_scale_is_refused(tmp_path, scale):
    file = save_tiny_sd(tmp_path) / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": scale}))
    with pytest.raises(ValueError, match="scaling_factor"):
        Checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EDMDPMSolverMultistepScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        CMStochasticIterativeScheduler(),
        IPNDMScheduler(),
        UnCLIPScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True),
        DDPMScheduler(beta_schedule="sigmoid"),
        DDIMScheduler(beta_start=float("nan")),
        DDIMScheduler(beta_start=-0.1),
        DDIMScheduler(trained_betas=[0.01] * 10),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_that_does_not_state_the_noise_schedule_is_refused(scheduler):
    with pytest.raises(ValueError, match=r"scheduler.*DDIMScheduler\.from_pretrained"):
        noise_schedule(scheduler)


@pytest.mark.parametrize(
    "kind",
    [DDPMScheduler, DEISMultistepScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler],
)
@pytest.mark.parametrize("changes", [{}, {"rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_other_samplers_keep_the_checkpoint_s_schedule(kind, changes):
    own = tiny_scheduler("v_prediction", **changes)
    found = noise_schedule(kind.from_config(own.config))
    assert torch.equal(found.alphas_cumprod, own.alphas_cumprod)
    assert found.config["prediction_type"] == "v_prediction"


def test_a_network_of_another_prediction_type_is_refused_with_the_right_one():
    pipe = StableDiffusionPipeline.from_pretrained(rpo.shapes.path(), safety_checker=None)
    for wrong in ("v_prediction", "sample"):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=wrong)
        with pytest.raises(ValueError, match=f'as {wrong} and 0.* as epsilon.*prediction_type="epsilon"'):
            Checkpoint(pipe)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_every_type_is_recognised_by_its_error(kind, monkeypatch):
    pipe = StableDiffusionPipeline.from_pretrained(rpo.shapes.path(), safety_checker=None)
    schedule, plain = noise_schedule(pipe.scheduler), pipe.unet.forward

    def as_kind(x_t, timestep, **others):
        node, found = vp_node(schedule.alphas_cumprod, timestep), plain(x_t, timestep, **others)
        x_0 = (x_t - node.sigma * found.sample) / node.alpha
        found.sample = node.alpha * found.sample - node.sigma * x_0 if kind == "v_prediction" else x_0
        return found

    monkeypatch.setattr(pipe.unet, "forward", as_kind)
    errors = prediction_errors(pipe, FAMILIES[0], DiscreteSchedule(pipe.scheduler), torch.float32)
    assert min(errors, key=errors.__getitem__) == kind
    assert errors[kind] < 0.7 * min(error for other, error in errors.items() if other != kind)


def test_a_network_that_never_learnt_is_told():
    with pytest.warns(UserWarning, match="denoises no better than predicting nothing"):
        Checkpoint(tiny_sd())
