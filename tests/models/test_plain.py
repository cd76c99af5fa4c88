"""What was done to a pipeline before it was handed over: refused with the remedy, or computed the same."""

import functools

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig

from rpo.models.checkpoint import Checkpoint
from rpo.models.families import FAMILIES
from rpo.models.plain import fresh_pipeline, probe
from tests.tiny import tiny_sd


def compile_a_block(pipe):
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")


def compile_the_text_encoder(pipe):
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")


def wrap(pipe):
    pipe.unet = torch.nn.DataParallel(pipe.unet)


def cast(pipe):
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def load_ip_adapter(pipe):
    keys, number = {}, 1
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            width = pipe.unet.config["cross_attention_dim"]
            keys |= {f"{number}.to_{side}_ip.weight": torch.zeros(module.to_q.out_features, width) for side in "kv"}
            number += 2
    projection = {"proj.weight": torch.zeros(4 * 32, 16), "proj.bias": torch.zeros(4 * 32)}
    projection |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])


def replace_a_forward(pipe):
    block = pipe.unet.mid_block.attentions[0]
    block.forward = functools.partial(type(block).forward, block)


def merge_tokens(pipe):
    """As token merging does it: another class for a block that is already there."""
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]

    class Merging(type(block)):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states.roll(1, dims=1), *args, **kwargs)

    block.__class__ = Merging


def hook_outputs(part):
    def add(pipe):
        pipe.components[part].register_forward_hook(
            lambda module, inputs, output: type(output)({key: 1.1 * value for key, value in output.items()})
        )

    return add


def hook_the_decoder(pipe):
    pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: output.clamp(-0.01, 0.01))


class Halving(AttnProcessor):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) / 2


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6), r"FreeU.*pipe\.disable_freeu\(\)"),
        (lambda pipe: pipe.fuse_qkv_projections(), r"pipe\.unet are fused.*pipe\.unfuse_qkv_projections\(\)"),
        (lambda pipe: pipe.vae.fuse_qkv_projections(), r"pipe\.vae\.unfuse_qkv_projections\(\)"),
        (load_ip_adapter, r"IP-Adapter.*pipe\.unload_ip_adapter\(\)"),
        (compile_a_block, r"pipe\.unet\.mid_block = pipe\.unet\.mid_block\._orig_mod"),
        (compile_the_text_encoder, r"pipe\.text_encoder = pipe\.text_encoder\._orig_mod.*compile_denoiser=True"),
        (wrap, r"unet is a DataParallel, but UNet2DConditionModel.*pipe\.unet\.module"),
        (cast, r"pipe\.vae has diffusers' hooks layerwise_casting.*load the checkpoint again"),
        (replace_a_forward, r"the forward of pipe\.unet\.mid_block\.attentions\.0 was replaced by hand"),
        (merge_tokens, "unet does not compute what its weights and configuration say"),
        (hook_outputs("unet"), "unet does not compute what its weights and configuration say"),
        (hook_outputs("text_encoder"), "text_encoder does not compute what its weights and configuration say"),
        (hook_the_decoder, "vae does not compute what its weights and configuration say"),
        (lambda pipe: pipe.unet.set_attn_processor(Halving()), "unet does not compute what its weights"),
    ],
)
def test_an_altered_pipeline_is_refused_with_the_remedy(alter, message):
    pipe = tiny_sd()
    alter(pipe)
    with pytest.raises(ValueError, match=message):
        Checkpoint(pipe)


def remember(pipe):
    pipe.unet.register_forward_hook(lambda module, inputs, output: None)


def undo(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    pipe.fuse_qkv_projections()
    load_ip_adapter(pipe)
    pipe.disable_freeu()
    pipe.unload_ip_adapter()
    pipe.unet.unfuse_qkv_projections()
    pipe.vae.unfuse_qkv_projections()


@pytest.mark.parametrize(
    "alter",
    [
        lambda pipe: pipe.enable_attention_slicing(1),
        lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda pipe: pipe.vae.enable_slicing(),
        lambda pipe: pipe.unet.enable_gradient_checkpointing(),
        lambda pipe: pipe.unet.compile(backend="eager"),
        lambda pipe: pipe.to(torch.bfloat16),
        remember,
        undo,
    ],
)
def test_what_changes_no_result_stays_welcome(alter):
    pipe = tiny_sd()
    alter(pipe)
    before = pipe.unet.conv_in.weight.stride()
    Checkpoint(pipe)
    assert pipe.unet.conv_in.weight.stride() == before


def test_a_plain_pipeline_is_its_fresh_one_bit_for_bit():
    pipe, family = tiny_sd(), FAMILIES[0]
    fresh, live = probe(fresh_pipeline(pipe, family), family, torch.float32), probe(pipe, family, torch.float32)
    assert all(torch.equal(live[part], fresh[part]) for part in ("unet", "vae", "text_encoder"))


def test_a_pipeline_with_an_adapter_may_be_drawn_with_but_not_under_a_switch():
    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    Checkpoint(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    with pytest.raises(ValueError, match="FreeU"):
        Checkpoint(pipe)


def test_what_is_altered_after_the_view_was_made_is_found_by_the_next_check():
    model = Checkpoint(tiny_sd())
    model.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    with pytest.raises(ValueError, match="FreeU"):
        model.check()


def test_checking_leaves_scheduler_randomness_and_gradients_alone():
    pipe = tiny_sd()
    scheduler, state = pipe.scheduler, torch.get_rng_state()
    Checkpoint(pipe)
    assert pipe.scheduler is scheduler
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
