"""What every trainer asks of the pipeline that it is given, and the precision it computes in."""

import pytest
import torch
from diffusers import CogView4Pipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode

from rpo.models.checkpoint import Checkpoint
from rpo.trainers.checks.prepared import prepared_model
from rpo.trainers.settings import LearningConfig
from tests.analytic.closed_forms import PRINTED
from tests.analytic.linear_quadratic import Case
from tests.tiny import tiny_sd
from tests.trainers.online_runs import endpoint, grpo, score_as_action
from tests.trainers.pair_runs import trainer_of as dpo

PLAIN, BF16, FP16 = (LearningConfig(mixed_precision=name) for name in ("no", "bf16", "fp16"))


TRAINERS = (dpo, grpo, score_as_action, endpoint)


def freeu(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def text_lora(pipe):
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))


def idle_text_lora(pipe):
    text_lora(pipe)
    pipe.text_encoder.disable_adapters()


def unet_loha(pipe):
    inject_adapter_in_model(LoHaConfig(r=2, target_modules=["to_q"]), pipe.unet)


def vae_lora(pipe):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), pipe.vae)


@pytest.mark.parametrize("make", TRAINERS)
@pytest.mark.parametrize("is_viewed", [False, True])
@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (freeu, r"pipe\.disable_freeu\(\)"),
        (idle_text_lora, "an adapter of text_encoder is switched off.*unload_lora_weights"),
    ],
)
def test_every_trainer_refuses_an_altered_pipeline_before_training(tmp_path, make, is_viewed, alter, message):
    pipe = tiny_sd()
    given = Checkpoint(pipe) if is_viewed else pipe
    alter(pipe)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, pipe=given)


@pytest.mark.parametrize(("alter", "message"), [(unet_loha, "unet is no LoRA"), (vae_lora, "vae already carries an")])
def test_an_adapter_of_another_kind_or_on_another_part_is_refused(alter, message):
    pipe = tiny_sd()
    alter(pipe)
    with pytest.raises(ValueError, match=message):
        prepared_model(pipe, PLAIN)


def test_a_pipeline_of_no_family_is_named_by_an_online_trainer_s_model():
    stranger = object.__new__(CogView4Pipeline)
    with pytest.raises(
        ValueError,
        match="is a CogView4Pipeline, but a text-to-image pipeline is needed, one of .*StableDiffusionXLPipeline",
    ):
        prepared_model(stranger, PLAIN)


@pytest.mark.parametrize("wrong", ["a/checkpoint", None, torch.nn.Linear(1, 1)])
def test_what_is_no_pipeline_is_named_before_anything_is_asked_of_it(wrong):
    with pytest.raises(ValueError, match=rf"is a {type(wrong).__name__}, but a text-to-image pipeline is needed"):
        prepared_model(wrong, PLAIN)


def test_harmless_changes_are_kept(tmp_path):
    pipe = tiny_sd()
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet.set_attn_processor(AttnProcessor())
    trainer = dpo(tmp_path, pipe=pipe)
    assert trainer.run.model.pipe is pipe
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(type(one) is AttnProcessor for one in pipe.unet.attn_processors.values())


@pytest.mark.parametrize("is_viewed", [False, True])
def test_mixed_precision_is_what_the_unet_computes_in(is_viewed):
    pipe = tiny_sd()
    seen = []
    # Autocast casts the input of a convolution: its output tells in what was computed.
    pipe.unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model = prepared_model(Checkpoint(pipe) if is_viewed else pipe, BF16)
    seen.clear()
    model.predict(torch.randn(1, 4, 8, 8), torch.tensor([500]), model.encode_prompts(["a"]))
    assert seen == [torch.bfloat16]
    assert pipe.unet.conv_in.weight.dtype == torch.float32


class Products(TorchDispatchMode):
    """The types of what matrix products, convolutions and attention multiply, inside a network."""

    def __init__(self, network):
        super().__init__()
        self.types, self.is_inside = set(), False
        network.register_forward_pre_hook(lambda *_: setattr(self, "is_inside", True))
        network.register_forward_hook(lambda *_: setattr(self, "is_inside", False))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if self.is_inside and any(word in name for word in ("mm", "convolution", "attention")):
            self.types |= {one.dtype for one in args if isinstance(one, torch.Tensor) and one.is_floating_point()}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("asked", "computed"), [pytest.param("no", torch.float32, marks=pytest.mark.slow), ("bf16", torch.bfloat16)]
)
@pytest.mark.parametrize("make", [dpo, grpo])
def test_all_products_of_a_training_run_are_of_the_type_that_is_asked_for(tmp_path, make, asked, computed):
    trainer = make(tmp_path, learning={"mixed_precision": asked, "updates": 1, "progress": False})
    with Products(trainer.run.model.denoiser) as products:
        trainer.train()
    assert products.types == {computed}
    assert {one.dtype for one in trainer.run.model.denoiser.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "loop"), [(torch.float16, BF16), (torch.bfloat16, FP16)], ids=["bf16 on float16", "fp16 on bfloat16"]
)
def test_two_half_types_at_once_are_refused(dtype, loop):
    with pytest.raises(ValueError, match=r"learning\.mixed_precision is .*, but the denoiser computes in torch"):
        prepared_model(tiny_sd(dtype=dtype), loop)


def test_a_model_of_another_kind_decides_about_its_precision():
    mine = Case(PRINTED, (0.0, 0.0)).model()
    assert prepared_model(mine, PLAIN) is mine
    with pytest.raises(ValueError, match="a ToyModel decides itself in what it computes"):
        prepared_model(mine, FP16)


@pytest.mark.parametrize(
    ("compute_dtype", "asked", "counts"),
    [(torch.float32, "no", False), (torch.float32, "fp16", True), (torch.float16, "no", True)],
)
def test_the_loss_is_scaled_where_float16_is_computed(tmp_path, compute_dtype, asked, counts):
    model = Checkpoint(tiny_sd(), compute_dtype=compute_dtype)
    assert dpo(tmp_path, pipe=model, learning={"mixed_precision": asked}).loop.scale_loss == counts
