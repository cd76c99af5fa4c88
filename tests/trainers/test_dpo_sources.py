"""A single file in the layout of the original Stable Diffusion code trains like the diffusers folder it came from."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from rpo.adapters.lora_file import inspect_lora
from rpo.data.readers import read_pairs
from rpo.data.writers import write_pairs
from rpo.models.checkpoint import Checkpoint
from rpo.training.log import read_metrics
from tests.tiny import tiny_sd
from tests.trainers.pair_runs import steady, toy_pairs, trainer_of, weights

# The names of diffusers and those of the original code, for four levels of one layer each. A replacement is given the
# numbers in the name.

UNET_NAMES = [
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"(?<=resnets\.\d\.)norm1\.", "in_layers.0."),
    (r"(?<=resnets\.\d\.)conv1\.", "in_layers.2."),
    (r"(?<=resnets\.\d\.)time_emb_proj\.", "emb_layers.1."),
    (r"(?<=resnets\.\d\.)norm2\.", "out_layers.0."),
    (r"(?<=resnets\.\d\.)conv2\.", "out_layers.3."),
    (r"(?<=resnets\.\d\.)conv_shortcut\.", "skip_connection."),
    (r"^down_blocks\.(\d)\.resnets\.0\.", lambda level: f"input_blocks.{2 * level + 1}.0."),
    (r"^down_blocks\.(\d)\.attentions\.0\.", lambda level: f"input_blocks.{2 * level + 1}.1."),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv\.", lambda level: f"input_blocks.{2 * level + 2}.0.op."),
    (r"^mid_block\.resnets\.(\d)\.", lambda index: f"middle_block.{2 * index}."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^up_blocks\.(\d)\.resnets\.(\d)\.", lambda level, index: f"output_blocks.{2 * level + index}.0."),
    (r"^up_blocks\.(\d)\.attentions\.(\d)\.", lambda level, index: f"output_blocks.{2 * level + index}.1."),
    (r"^up_blocks\.(\d)\.upsamplers\.0\.", lambda level: f"output_blocks.{2 * level + 1}.2."),
]
VAE_NAMES = [
    (r"\bdown_blocks\.(\d)\.resnets\.(\d)\.", lambda level, index: f"down.{level}.block.{index}."),
    (r"\bdown_blocks\.(\d)\.downsamplers\.0\.", lambda level: f"down.{level}.downsample."),
    (r"\bup_blocks\.(\d)\.resnets\.(\d)\.", lambda level, index: f"up.{3 - level}.block.{index}."),
    (r"\bup_blocks\.(\d)\.upsamplers\.0\.", lambda level: f"up.{3 - level}.upsample."),
    (r"\bmid_block\.resnets\.(\d)\.", lambda index: f"mid.block_{index + 1}."),
    (r"\bmid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\bconv_shortcut\.", "nin_shortcut."),
    (r"\bconv_norm_out\.", "norm_out."),
    (r"\bgroup_norm\.", "norm."),
    (r"\bto_([qkv])\.", r"\1."),
    (r"\bto_out\.0\.", "proj_out."),
]


def original_name(name, renames):
    for pattern, new in renames:
        name = re.sub(pattern, new if isinstance(new, str) else lambda m, new=new: new(*map(int, m.groups())), name)
    return name


def original_state(pipe):
    """The tensors of a pipeline as the original code would have saved them, with what else such files hold."""
    state = {"alphas_cumprod": pipe.scheduler.alphas_cumprod}
    for name, tensor in pipe.unet.state_dict().items():
        state[f"model.diffusion_model.{original_name(name, UNET_NAMES)}"] = tensor
    for name, tensor in pipe.vae.state_dict().items():
        is_attention = ".attentions." in name and name.endswith(".weight") and "group_norm" not in name
        # The original attends by 1 × 1 convolutions.
        state[f"first_stage_model.{original_name(name, VAE_NAMES)}"] = (
            tensor[:, :, None, None] if is_attention else tensor
        )
    for name, tensor in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {name: tensor.contiguous() for name, tensor in state.items()}


def predictions(model):
    """Of all three networks."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *model.latent_shape(), generator=generator)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        cond = model.encode_prompts(["a red circle", ""])
        noise_pred = model.predict(latents, torch.tensor([10, 900]), cond, guidance_scale=2.0)
        return [cond.tokens, noise_pred, *model.encode_moments(images), model.decode(latents)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One tiny checkpoint with the four levels of SD 1.x, as a folder and as two kinds of file; and pairs.

    It predicts v, which no file says and no default is: the folder given as `config` tells it.
    """
    root = tmp_path_factory.mktemp("sources")
    pipe = tiny_sd("v_prediction", channels=(16, 32, 32, 32))
    pipe.save_pretrained(root / "folder")
    state = original_state(pipe)
    save_file(state, root / "file.safetensors")
    torch.save({"state_dict": state, "global_step": 840000}, root / "file.ckpt")
    write_pairs(root / "pairs", toy_pairs())
    return root


def load(sources, name):
    return Checkpoint.load(sources / name, config=None if name == "folder" else sources / "folder")


def test_the_file_has_the_keys_by_which_an_sd1_checkpoint_is_known(sources):
    names = load_file(sources / "file.safetensors").keys()
    assert {
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.output_blocks.7.0.skip_connection.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    } <= names
    assert not [name for name in names if re.search(r"resnets|attentions|(?:down|up|mid)_block", name)]


@pytest.mark.parametrize("name", ["file.safetensors", "file.ckpt"])
def test_a_single_file_is_its_folder(sources, name):
    ours, theirs = load(sources, name), load(sources, "folder")
    assert ours.prediction_type == theirs.prediction_type == "v_prediction"
    for part in ("denoiser", "vae", "text"):
        assert ours.fingerprint(part) == theirs.fingerprint(part)
    # Equal weights; the last bits of a product change with where in memory they lie.
    for our_pred, their_pred in zip(predictions(ours), predictions(theirs), strict=True):
        torch.testing.assert_close(our_pred, their_pred, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_single_file_trains_and_saves_as_its_folder(sources, tmp_path):
    trainers = {}
    for name in ("folder", "file.safetensors"):
        given = {"pipe": load(sources, name), "pairs": read_pairs(sources / "pairs")}
        trainers[name] = steady(trainer_of(tmp_path / name, cache_folder=str(tmp_path / "cache"), **given))
        trainers[name].train()
    ours, theirs = trainers["file.safetensors"], trainers["folder"]
    assert ours.algorithm.data.latents.encoded == 0  # equal weights are equal keys
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-5)
    assert read_metrics(ours.folder)[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    saved = ours.save()
    assert inspect_lora(saved).parts == ("unet",)
    fresh = load(sources, "file.safetensors")
    before = predictions(fresh)[1]
    fresh.pipe.load_lora_weights(str(saved))
    after = predictions(fresh)[1]
    torch.testing.assert_close(after, predictions(ours.run.model)[1], rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


# Files that are none: one clear error each, naming the file.


def refused(sources, file, match):
    with pytest.raises(ValueError, match=match) as caught:
        Checkpoint.load(file, config=sources / "folder")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["file.safetensors", "file.ckpt"])
def test_a_truncated_single_file_is_named(sources, tmp_path, name):
    content = (sources / name).read_bytes()
    file = tmp_path / name
    file.write_bytes(content[: len(content) // 2])
    announced = f"{len(content) // 2} bytes. is no whole safetensors file"
    refused(sources, file, announced if name.endswith("safetensors") else "does not load as a single-file")


@pytest.mark.parametrize("name", ["notes.safetensors", "notes.ckpt"])
def test_a_renamed_text_file_is_named(sources, tmp_path, name):
    file = tmp_path / name
    file.write_text("These are notes on how to train a model, and they are no model.\n" * 20)
    expected = "is no whole safetensors file" if name.endswith("safetensors") else "does not load as a single-file"
    refused(sources, file, expected)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("model.diffusion_model.middle_block.1.proj_in.", "lacks tensors of its denoiser or VAE"),
        ("first_stage_model.decoder.conv_out.", "lacks tensors of its denoiser or VAE"),
        ("text_model.final_layer_norm.", r"lacks 2 tensors, among them text_encoder.*final_layer_norm\.weight"),
        ("model.diffusion_model.", "Failed to load UNet2DConditionModel"),
        ("first_stage_model.", "Failed to load AutoencoderKL"),
        ("cond_stage_model.", "Failed to load CLIPTextModel"),
    ],
)
def test_a_single_file_that_lacks_tensors_is_named(sources, tmp_path, part, message):
    state = {name: tensor for name, tensor in load_file(sources / "file.safetensors").items() if part not in name}
    save_file(state, tmp_path / "part.safetensors")
    refused(sources, tmp_path / "part.safetensors", message)
