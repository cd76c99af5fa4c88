"""Every format of every family: loaded by whoever reads it, it predicts what the live model does."""

import json

import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from packaging import version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from rpo.adapters.formats import FORMATS, formats_for, kohya, names_of
from rpo.adapters.formats.live import layers_of
from rpo.adapters.formats.read import read_lora
from rpo.adapters.formats.verify import formats_in
from rpo.adapters.formats.write import PEFT_FOLDER, PLACES
from rpo.adapters.lora import load_lora, save_lora
from rpo.adapters.lora_file import WEIGHT_FILE, inspect_lora, tensors_of
from rpo.adapters.stack import stack_loras
from rpo.models.checkpoint import Checkpoint
from rpo.models.families import FAMILIES as ALL
from rpo.models.families import family_named
from tests.adapters.formats.loras import SHAPES, with_lora
from tests.contracts.families import FAMILIES

ALWAYS = ("stable_diffusion", "sdxl", "sd3", "flux1", "z_image")
PLAIN = [shape for shape in SHAPES if shape != "dora"]
NAMED = [name for name in FAMILIES if name != "sana"]


DEFAULT = {
    *(("stable_diffusion", "mixed ranks"), ("sdxl", "text encoders"), ("sd3", "rslora"), ("flux1", "alpha")),
    ("z_image", "mixed ranks"),
}
"""What stands for all in the default tests; `-m slow` asks every family for every shape."""


def mostly(names):
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in names]


def every(names):
    pairs = [(name, shape) for name in names for shape in PLAIN]
    return [pair if pair in DEFAULT else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


@torch.no_grad()
def predicted(model, pipe=None):
    """What a checkpoint predicts, its text encoders asked anew."""
    model = model if pipe is None else Checkpoint(pipe)
    x_t = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return model.predict(x_t, torch.tensor([500, 20]), model.encode_prompts(["a cat", "a dog"]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with all formats of a LoRA, and what the live model predicts; each made once."""
    made = {}

    def save(name, shape):
        if (name, shape) not in made:
            model = with_lora(FAMILIES[name], shape)
            folder = tmp_path_factory.mktemp("lora")
            save_lora(model, folder, formats=FORMATS if name in NAMED else None)
            made[name, shape] = folder, predicted(model), layers_of(model)
        return made[name, shape]

    return save


def shape_of(name):
    return dict(DEFAULT).get(name, "plain")


def by_diffusers(pipe, folder):
    pipe.load_lora_weights(str(folder))


def by_peft(pipe, folder):
    family = family_named(type(pipe).__name__)
    place = folder / PEFT_FOLDER
    PeftModel.from_pretrained(pipe.components[family.denoiser], place)
    for part in family.text_encoders:
        if (place / part).is_dir():
            PeftModel.from_pretrained(pipe.components[part], place / part)


@pytest.mark.parametrize(("name", "shape"), every(FAMILIES))
def test_every_format_loads_to_the_live_model_s_prediction(name, shape, saved):
    folder, live, _ = saved(name, shape)
    base = predicted(Checkpoint(FAMILIES[name]()))
    assert (live - base).abs().max() > 1e-3
    kinds = formats_in(folder)
    assert kinds == list(FORMATS if name in NAMED else FORMATS[:2])
    for kind in kinds:
        pipe = FAMILIES[name]()
        family = family_named(type(pipe).__name__)
        family.enable_lora(pipe)
        if kind in ("diffusers", "peft"):
            (by_diffusers if kind == "diffusers" else by_peft)(pipe, folder)
            found = predicted(None, pipe)
        else:
            model = Checkpoint(pipe)
            load_lora(model, folder / PLACES[kind])
            found = predicted(model)
        assert (found - live).abs().max() < 1e-5, kind


STOCK = ["stable_diffusion", "sdxl", "flux2_klein", "qwen_image"]
IS_NEW = version.parse(diffusers.__version__) >= version.parse("0.42")
STOCK += ["z_image"] * IS_NEW


@pytest.mark.parametrize(("name", "shape"), every(STOCK))
def test_stock_diffusers_converts_kohya_s_file_back(name, shape, saved):
    if shape == "text encoders" and not IS_NEW:
        pytest.skip("older diffusers do not find kohya's text encoders in transformers 5")
    folder, live, _ = saved(name, shape)
    pipe = FAMILIES[name]()
    pipe.load_lora_weights(str(folder), weight_name=PLACES["kohya"])
    assert (predicted(None, pipe) - live).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux1", "chroma"])
def test_stock_diffusers_converts_kohya_s_file_of_the_width_that_it_knows(name):
    """The converter has the sizes of FLUX.1 written into it, so that no small pipeline passes it."""
    family, wide = family_named(type(FAMILIES[name]()).__name__), 3072
    shapes = {"attn.to_q": (wide, wide), "attn.to_k": (wide, wide), "attn.to_v": (wide, wide)}
    double = shapes | {
        "attn.add_q_proj": (wide, wide),
        "attn.to_out.0": (wide, wide),
        "ff.net.0.proj": (4 * wide, wide),
    }
    blocks = {"transformer_blocks.3": double, "single_transformer_blocks.5": shapes | {"proj_out": (wide, 5 * wide)}}
    layers = {
        f"transformer.{block}.{name}": (torch.randn(2 + number % 2, columns), torch.randn(rows, 2 + number % 2))
        for block, several in blocks.items()
        for number, (name, (rows, columns)) in enumerate(several.items())
    }
    sizes = {
        f"transformer.{block}.{one}": (wide, wide) for block in blocks for one in ("attn.add_k_proj", "attn.add_v_proj")
    }
    tensors, _ = kohya.write(layers, names_of(family, {}), "transformer", sizes)
    found = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    for layer, (down, up) in layers.items():
        stem = layer if f"{layer}.lora_A.weight" in found else None
        assert stem, layer
        theirs = found[f"{stem}.lora_B.weight"].double() @ found[f"{stem}.lora_A.weight"].double()
        ours = up.double() @ down.double()
        assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()


@pytest.mark.parametrize("name", mostly(FAMILIES))
def test_no_loader_takes_alpha_keys_beside_the_note(name, saved, tmp_path):
    """Why diffusers' file has none: its loaders refuse them, or lose the LoRA, and one day they may not."""
    folder, live, _ = saved(name, shape_of(name))
    tensors, header = tensors_of(folder / WEIGHT_FILE)
    endings = (".lora.down.weight", ".lora_A.weight")
    alphas = {
        key.removesuffix(one) + ".alpha": torch.tensor(float(len(tensor)))
        for key, tensor in tensors.items()
        for one in endings
        if key.endswith(one)
    }
    save_file(tensors | alphas, tmp_path / WEIGHT_FILE, header)
    pipe = FAMILIES[name]()
    family_named(type(pipe).__name__).enable_lora(pipe)
    try:
        pipe.load_lora_weights(str(tmp_path))
    except (ValueError, RuntimeError, KeyError):
        return
    assert (predicted(None, pipe) - live).abs().max() > 1e-3


@pytest.mark.parametrize("name", mostly(NAMED))
def test_every_layer_that_a_lora_can_change_has_a_name_elsewhere(name):
    pipe = FAMILIES[name]()
    family = family_named(type(pipe).__name__)
    names = names_of(family, pipe.components[family.denoiser].config)
    known = {one for several in names.originals.values() for one in several}
    layers = [
        one
        for one, layer in pipe.components[family.denoiser].named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    assert [one for one in layers if one not in known] == []


@pytest.mark.parametrize("name", mostly(NAMED))
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_read_is_what_was_written(name, kind, saved):
    folder, _, layers = saved(name, shape_of(name))
    family = family_named(type(FAMILIES[name]()).__name__)
    config = FAMILIES[name]().components[family.denoiser].config
    found, _ = read_lora(folder / PLACES[kind], family, config)
    assert found.keys() == layers.keys()
    for layer, (down, up) in layers.items():
        ours, theirs = up.flatten(1) @ down.flatten(1), found[layer][1].flatten(1) @ found[layer][0].flatten(1)
        assert (ours - theirs).abs().max() < 1e-6 * ours.abs().max() + 1e-7
        assert found[layer][0].shape == down.shape


def test_every_family_has_names_elsewhere_or_is_known_to_have_none():
    assert [family.name for family in ALL if names_of(family, {}) is None] == ["Sana", "aMUSEd (masked tokens)"]
    assert {formats_for(family) for family in ALL} == {FORMATS[:3], FORMATS[:2]}


@pytest.mark.parametrize("kind", ["peft", "kohya", "comfyui"])
def test_loras_of_any_dialect_are_stacked(kind, saved, tmp_path):
    folder, _, layers = saved("z_image", "mixed ranks")
    stack_loras([folder / PLACES[kind], folder], tmp_path)
    found, _ = read_lora(tmp_path)
    for layer, (down, up) in layers.items():
        assert torch.allclose(found[layer][1] @ found[layer][0], 2 * (up @ down), atol=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_any_dialect_tells_what_it_is(kind, saved):
    found = inspect_lora(saved("flux1", "alpha")[0] / PLACES[kind])
    assert found.is_portable and found.num_layers > 5
    assert found.parts in (("transformer",), ("denoiser",))


def faulty(folder, place, change):
    tensors = load_file(folder / PLACES["kohya"])
    place.mkdir()
    save_file(change(tensors), place / "kohya.safetensors")
    return place / "kohya.safetensors"


@pytest.mark.parametrize(
    ("rename", "word"),
    [
        (lambda name: name.replace("lora_unet_down", "lora_unet_nowhere"), "lora_unet_nowhere"),
        (lambda name: name.replace(".lora_down.weight", ".lokr_w1").replace(".lora_up.weight", ".lokr_w2"), "LoKr"),
        (lambda name: name.replace(".lora_down.weight", ".hada_w1_a").replace(".lora_up.weight", ".hada_w1_b"), "LoHa"),
        (lambda name: name.replace(".lora_down.weight", ".oft_blocks"), "OFT"),
        (lambda name: name.replace(".alpha", ".dora_scale") if "to_q" in name else name, "DoRA"),
    ],
)
def test_what_is_no_lora_of_this_family_is_named_and_refused(rename, word, saved, tmp_path):
    file = faulty(
        saved("stable_diffusion", "mixed ranks")[0],
        tmp_path / "bad",
        lambda tensors: {rename(name): one for name, one in tensors.items()},
    )
    model = Checkpoint(FAMILIES["stable_diffusion"]())
    with pytest.raises(ValueError, match=word):
        load_lora(model, file)
    assert not getattr(model.denoiser, "peft_config", {})


@pytest.mark.parametrize("kind", FORMATS)
def test_the_lora_of_another_family_is_refused(kind, saved):
    model = Checkpoint(FAMILIES["z_image"]())
    with pytest.raises(ValueError, match="belong|trained on Z-Image"):
        load_lora(model, saved("flux1", "alpha")[0] / PLACES[kind])


def test_a_peft_file_without_its_settings_is_refused(saved, tmp_path):
    tensors = load_file(saved("z_image", "mixed ranks")[0] / PEFT_FOLDER / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_lora(Checkpoint(FAMILIES["z_image"]()), tmp_path)


def test_the_files_are_the_same_each_time(saved, tmp_path):
    folder = saved("sdxl", "text encoders")[0]
    save_lora(with_lora(FAMILIES["sdxl"], "text encoders"), tmp_path)
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert file.read_bytes() == (folder / file.relative_to(tmp_path)).read_bytes()
    assert sorted(path.name for path in (tmp_path / PEFT_FOLDER).iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "text_encoder", "text_encoder_2")
    ]
    assert json.loads((tmp_path / PEFT_FOLDER / "adapter_config.json").read_text())["lora_alpha"] == 4
