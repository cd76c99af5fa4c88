"""By ComfyUI's own key mapping and patching: every tensor is mapped, and changes the weights by what it should.

Needs ComfyUI's source on the path (`import comfy`) and what it imports; run with `-m slow`.
"""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rpo.adapters.formats.live import layers_of
from rpo.adapters.formats.write import COMFYUI_FILE, KOHYA_FILE
from rpo.adapters.lora import save_lora
from tests.adapters.formats.loras import SHAPES, with_lora
from tests.contracts.families import FAMILIES

pytestmark = pytest.mark.slow
words, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
try:
    options = pytest.importorskip("comfy.options", reason="ComfyUI's source is not on the path")
    options.enable_args_parsing()
    lora = pytest.importorskip("comfy.lora", reason="what ComfyUI imports is not installed")
    import comfy.ldm.chroma.model as chroma  # pyright: ignore
    import comfy.ldm.flux.model as flux  # pyright: ignore
    import comfy.ops  # pyright: ignore
    import comfy.utils  # pyright: ignore
    from comfy.ldm.lumina.model import NextDiT  # pyright: ignore
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT  # pyright: ignore
    from comfy.ldm.pixart.pixartms import PixArtMS  # pyright: ignore
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel  # pyright: ignore
    from comfy.lora_convert import convert_lora  # pyright: ignore
finally:
    sys.argv = words

MADE = {"operations": comfy.ops.disable_weight_init, "device": "cpu", "dtype": torch.float32}
FLUX = {
    **{"in_channels": 4, "out_channels": 4, "vec_in_dim": 32, "context_in_dim": 32, "hidden_size": 32},
    **{"mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000},
    **{"patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []},
}
CHROMA = {"depth_single_blocks": 2, "in_dim": 16, "out_dim": 32, "hidden_dim": 32, "n_layers": 1}
FLUX2 = {
    **{"mlp_ratio": 3.0, "vec_in_dim": None, "guidance_embed": False, "context_in_dim": 48, "qkv_bias": False},
    **{"global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "axes_dim": [4, 4, 4, 4]},
}
NEXT_DIT = {
    **{"patch_size": 2, "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4},
    **{"cap_feat_dim": 32, "axes_dims": [4, 2, 2], "axes_lens": [300, 64, 64], "qk_norm": True},
}


def network(name):
    """ComfyUI's own small network of the family."""
    if name == "krea2":
        model = pytest.importorskip("comfy.ldm.krea2.model", reason="this ComfyUI does not know Krea 2")
        sizes = {"features": 32, "tdim": 32, "txtdim": 16, "heads": 2, "kvheads": 1, "layers": 2, "txtlayers": 3}
        return model.SingleStreamDiT(**sizes, txtheads=2, txtkvheads=2, channels=4, **MADE)
    makers = {
        "sd3": lambda: MMDiT(depth=2, num_blocks=2, in_channels=4, adm_in_channels=64, pos_embed_max_size=16, **MADE),
        "flux1": lambda: flux.Flux(**FLUX, **MADE),
        "chroma": lambda: chroma.Chroma(
            **{one: value for one, value in FLUX.items() if one != "guidance_embed"} | CHROMA, **MADE
        ),
        "flux2_klein": lambda: flux.Flux(**FLUX | FLUX2, **MADE),
        "qwen_image": lambda: QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            **MADE,
        ),
        "z_image": lambda: NextDiT(**NEXT_DIT, n_kv_heads=4, z_image_modulation=True, **MADE),
        "lumina2": lambda: NextDiT(**NEXT_DIT, n_kv_heads=2, **MADE),
        "pixart_sigma": lambda: PixArtMS(
            hidden_size=32, depth=2, num_heads=4, caption_channels=32, micro_condition=False, **MADE
        ),
    }
    return makers[name]()


def in_diffusers(name, pipe):
    """ComfyUI's configuration, and its own table from diffusers' names to its own, with the rows that they take."""
    width = 32
    if name in ("stable_diffusion", "sdxl"):
        config = {"num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [0, 1]}
        config |= {"transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1}
        return config, comfy.utils.unet_to_diffusers(config)
    config = {"depth": 2, "num_blocks": 2, "depth_single_blocks": 2, "hidden_size": width, "n_layers": 2, "dim": width}
    config |= {"n_refiner_layers": 1, "layers": 2}
    tables = {
        "flux1": comfy.utils.flux_to_diffusers,
        "chroma": comfy.utils.flux_to_diffusers,
        "flux2_klein": comfy.utils.flux_to_diffusers,
        "z_image": comfy.utils.z_image_to_diffusers,
        "pixart_sigma": comfy.utils.pixart_to_diffusers,
        "sd3": comfy.utils.mmdit_to_diffusers,
    }
    if name in tables:
        return config, tables[name](config)
    if name == "krea2":
        return config, comfy.utils.krea2_to_diffusers(config)
    if name == "lumina2":
        table = comfy.utils.z_image_to_diffusers(config)
        rows = {"q": (0, 0, 32), "k": (0, 32, 16), "v": (0, 48, 16)}
        renamed = {one.replace("attention.to_", "attn.to_"): to for one, to in table.items()}
        for one, to in renamed.items():
            if (which := one.partition("attn.to_")[2][:1]) in rows:
                renamed[one] = (to[0], rows[which])
        return config, renamed
    return config, {f"{one}.weight": f"{one}.weight" for one, _ in pipe.transformer.named_modules()}


class Model:
    """What ComfyUI's functions ask of a model."""

    def __init__(self, weights, config):
        self.weights, self.model_config = weights, SimpleNamespace(unet_config=config)

    def state_dict(self):
        return self.weights


def weights_of(name, pipe, table):
    if name in ("stable_diffusion", "sdxl"):
        found = pipe.unet.state_dict()
        found = {one.replace(".base_layer", ""): weight for one, weight in found.items()}
        return {to: found[one] for one, to in table.items() if one in found}
    return network(name).state_dict()


def deltas(tensors, key_map, weights, caplog):
    """What ComfyUI adds to each weight; every tensor must be mapped."""
    with caplog.at_level(logging.WARNING):
        patches = lora.load_lora(convert_lora(dict(tensors)), key_map)
    assert [record.message for record in caplog.records if "not loaded" in record.message] == []
    assert sum(name.endswith((".lora_down.weight", ".lora_A.weight")) for name in tensors) == len(patches)
    found = {}
    for key, patch in patches.items():
        zero = torch.zeros_like(weights[key], dtype=torch.float32)
        found[key] = lora.calculate_weight([(1.0, patch, 1.0, None, None)], zero, key)
    return found


def wide_sd3():
    """One whose width is what ComfyUI takes it to be: 64 numbers for each of the blocks."""
    pipe = FAMILIES["sd3"]()
    sizes = {"attention_head_dim": 64, "num_attention_heads": 2, "caption_projection_dim": 128}
    with torch.random.fork_rng(devices=[]):
        pipe.transformer = type(pipe.transformer).from_config({**pipe.transformer.config, **sizes}).eval()
    return pipe


KNOWN = [name for name in FAMILIES if name != "sana"]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "dora"])
@pytest.mark.parametrize("file", [KOHYA_FILE, COMFYUI_FILE])
@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_comfyui_patches_every_layer_by_what_the_adapter_adds(name, file, shape, tmp_path, caplog):
    model = with_lora(wide_sd3 if name == "sd3" else FAMILIES[name], shape)
    save_lora(model, tmp_path, formats=["kohya", "comfyui"])
    config, table = in_diffusers(name, model.pipe)
    own = {f"diffusion_model.{one}": weight for one, weight in weights_of(name, model.pipe, table).items()}
    clips = dict(zip(model.text_encoders, ("clip_l", "clip_g"), strict=False))
    encoders = {
        f"{clips[part]}.transformer.{'' if one.startswith('text_model') else 'text_model.'}{one}": weight
        for part in clips
        for one, weight in model.text_encoders[part].state_dict().items()
    }
    encoders = {one.replace(".base_layer", ""): weight for one, weight in encoders.items()}
    key_map = lora.model_lora_keys_unet(Model(own, config), {})
    key_map = lora.model_lora_keys_clip(Model(encoders, config), key_map)
    found = deltas(load_file(tmp_path / file), key_map, own | encoders, caplog)

    wanted = {}
    for layer, (down, up) in layers_of(model).items():
        part, _, place = layer.partition(".")
        added = up.flatten(1) @ down.flatten(1)
        if part in clips:
            wanted[f"{clips[part]}.transformer.{place}.weight"] = added
            continue
        to = table[f"{place}.weight"]
        key, rows = (to, None) if isinstance(to, str) else to[:2]
        whole = wanted.setdefault(f"diffusion_model.{key}", torch.zeros_like(own[f"diffusion_model.{key}"]))
        (whole if rows is None else whole.narrow(*rows)).copy_(added)
    assert found.keys() == wanted.keys()
    for key, added in wanted.items():
        assert (found[key] - added).abs().max() <= 1e-4 * added.abs().max()
