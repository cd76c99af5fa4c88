import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rpo.errors import InputError
from rpo.rewards import RewardError, load_reward, load_rewards
from rpo.rewards.hpsv3 import HPS_V3, PIXELS, TURN, HpsV3Reward, canvas, head_of
from rpo.rewards.version import version_of

WIDTH, HEADS, GROUPS, LAYERS, VISION_WIDTH, VISION_HEADS = 32, 2, 1, 2, 32, 2
PATCH, MERGED, FRAMES, THETA = 14, 2, 2, 1e6
PROMPTS = ["a red fox", "two grey cats asleep on a very old red sofa", "a red fox"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
AFTERWARDS = "\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
"""What the authors write after the token that is looked at."""


def tiny_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TURN], trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])


def tiny_config(tokenizer):
    """In the form of the file beside Qwen2-VL-7B-Instruct, whose number of words is not that of its tokenizer."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": len(tokenizer) + 50,
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": THETA,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vision_config": {
            "depth": LAYERS,
            "embed_dim": VISION_WIDTH,
            "num_heads": VISION_HEADS,
            "mlp_ratio": 2,
            "hidden_size": WIDTH,
            "in_chans": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGED,
            "temporal_patch_size": FRAMES,
        },
    }


def tiny_state(words):
    """Random weights in the layout of the published file."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    merged, side = MERGED**2 * VISION_WIDTH, WIDTH // HEADS * GROUPS
    state = {
        "model.embed_tokens.weight": random(words, WIDTH),
        "lm_head.weight": random(words, WIDTH),
        "visual.patch_embed.proj.weight": random(VISION_WIDTH, 3, FRAMES, PATCH, PATCH) / 14,
    }
    norms, biased, plain = {"visual.merger.ln_q": VISION_WIDTH}, {}, {}
    biased |= {"visual.merger.mlp.0": (merged, merged), "visual.merger.mlp.2": (WIDTH, merged)}
    biased |= {"rm_head.0": (1024, WIDTH), "rm_head.3": (16, 1024), "rm_head.5": (2, 16)}
    scales = ["model.norm"]
    for number in range(LAYERS):
        block, layer = f"visual.blocks.{number}.", f"model.layers.{number}."
        norms |= {f"{block}norm1": VISION_WIDTH, f"{block}norm2": VISION_WIDTH}
        biased |= {f"{block}attn.qkv": (3 * VISION_WIDTH, VISION_WIDTH)}
        biased |= {f"{block}attn.proj": (VISION_WIDTH, VISION_WIDTH)}
        biased |= {f"{block}mlp.fc1": (2 * VISION_WIDTH, VISION_WIDTH), f"{block}mlp.fc2": (VISION_WIDTH, 64)}
        biased |= {f"{layer}self_attn.q_proj": (WIDTH, WIDTH)}
        biased |= {f"{layer}self_attn.{name}_proj": (side, WIDTH) for name in "kv"}
        plain |= {f"{layer}self_attn.o_proj": (WIDTH, WIDTH), f"{layer}mlp.down_proj": (WIDTH, 48)}
        plain |= {f"{layer}mlp.{name}_proj": (48, WIDTH) for name in ("gate", "up")}
        scales += [f"{layer}input_layernorm", f"{layer}post_attention_layernorm"]
    for name, shape in (biased | plain).items():
        state[f"{name}.weight"] = 2 * random(*shape)
    for name, (outer, _) in biased.items():
        state[f"{name}.bias"] = random(outer)
    for name, width in norms.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + random(width), random(width)
    return state | {f"{name}.weight": 1 + random(WIDTH) for name in scales}


def save_hpsv3(folder, change=lambda state: state, dtype=torch.float32):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(tiny_config(tokenizer)))
    state = change(tiny_state(len(tokenizer) + 1))
    save_file({name: value.to(dtype).contiguous() for name, value in state.items()}, folder / "HPSv3.safetensors")
    return folder


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def norm(x, state, name):
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def scaled(x, state, name):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]


def turned(x, angles):
    """[tokens, heads, dim] as complex numbers, of which the first half of dim is the real part."""
    real, imaginary = x.chunk(2, -1)
    number = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([number.real, number.imag], -1)


def attend(query, key, value, hidden=None):
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    weights = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    weights = weights if hidden is None else weights.masked_fill(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", weights.softmax(-1), value).flatten(1)


def see(patches, grid, state):
    """Qwen2-VL's vision transformer on the patches of one image, four of which become one token."""
    dim = VISION_WIDTH // VISION_HEADS
    rows, columns = torch.meshgrid(torch.arange(grid[1]), torch.arange(grid[2]), indexing="ij")
    blocks = [one.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).transpose(1, 2).flatten() for one in (rows, columns)]
    frequencies = 10000.0 ** -(torch.arange(0, dim // 2, 2) / (dim // 2))
    angles = torch.cat([one[:, None] * frequencies for one in blocks], dim=1)
    x = patches @ state["visual.patch_embed.proj.weight"].flatten(1).T
    for number in range(LAYERS):
        block = f"visual.blocks.{number}."
        y = linear(norm(x, state, f"{block}norm1"), state, f"{block}attn.qkv")
        query, key, value = y.unflatten(1, (3, VISION_HEADS, dim)).unbind(1)
        x = x + linear(attend(turned(query, angles), turned(key, angles), value), state, f"{block}attn.proj")
        y = linear(norm(x, state, f"{block}norm2"), state, f"{block}mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), state, f"{block}mlp.fc2")
    x = norm(x, state, "visual.merger.ln_q").reshape(-1, MERGED**2 * VISION_WIDTH)
    return linear(functional.gelu(linear(x, state, "visual.merger.mlp.0")), state, "visual.merger.mlp.2")


def read(x, state):
    """Qwen2 on tokens that are counted one after the other."""
    dim, length = WIDTH // HEADS, len(x)
    angles = torch.arange(length)[:, None] * THETA ** -(torch.arange(0, dim, 2) / dim)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    for number in range(LAYERS):
        layer = f"model.layers.{number}."
        y = scaled(x, state, f"{layer}input_layernorm")
        query, key, value = (linear(y, state, f"{layer}self_attn.{one}_proj").unflatten(1, (-1, dim)) for one in "qkv")
        y = attend(turned(query, angles), turned(key, angles), value, hidden)
        x = x + linear(y, state, f"{layer}self_attn.o_proj")
        y = scaled(x, state, f"{layer}post_attention_layernorm")
        y = functional.silu(linear(y, state, f"{layer}mlp.gate_proj")) * linear(y, state, f"{layer}mlp.up_proj")
        x = x + linear(y, state, f"{layer}mlp.down_proj")
    return scaled(x, state, "model.norm")


@torch.no_grad()
def by_the_authors(images, prompts, folder):
    """Their steps: PIL image of a fixed size, the whole turn, the head at every token, the one of <|Reward|>, mu."""
    state, tokenizer, scores = load_file(folder / "HPSv3.safetensors"), tiny_tokenizer(), []
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    processor = Qwen2VLImageProcessorPil(min_pixels=PIXELS, max_pixels=PIXELS)
    as_bytes = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for image, prompt in zip(as_bytes, prompts, strict=True):
        seen = processor([image], return_tensors="pt")
        turn = (TURN + AFTERWARDS).replace("{prompt}", prompt)
        turn = turn.replace("<|image_pad|>", "<|image_pad|>" * (len(seen.pixel_values) // MERGED**2))
        ids = torch.tensor(tokenizer(turn).input_ids)
        x = state["model.embed_tokens.weight"][ids]
        x[ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")] = see(
            seen.pixel_values, seen.image_grid_thw[0].tolist(), state
        )
        marks = linear(functional.relu(linear(read(x, state), state, "rm_head.0")), state, "rm_head.3")
        marks = linear(functional.relu(marks), state, "rm_head.5")
        (place,) = (ids == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero().flatten().tolist()
        scores.append(marks[place, 0])
    return torch.stack(scores)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hpsv3(tmp_path_factory.mktemp("hpsv3"))


def pictures(count=3, height=448, width=448):
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))
    return (noise * 255).round() / 255


def test_it_is_what_the_authors_compute(folder):
    expected = by_the_authors(pictures(), PROMPTS, folder)
    assert expected.std() > 0.01
    torch.testing.assert_close(load_reward(f"hps-v3:{folder}")(pictures(), PROMPTS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(96, 64), (600, 500)])
def test_an_image_of_another_size_is_resized_as_by_the_authors(folder, size):
    smooth = functional.interpolate(pictures(2, 8, 8), size, mode="bicubic").clamp(0, 1)
    smooth = (smooth * 255).round() / 255
    patches, grid = HpsV3Reward(folder)._loaded().see(smooth)
    processor = Qwen2VLImageProcessorPil(min_pixels=PIXELS, max_pixels=PIXELS)
    expected = processor(list((smooth * 255).byte().permute(0, 2, 3, 1).numpy()), return_tensors="pt")
    assert expected.image_grid_thw.tolist() == [list(grid)] * 2
    torch.testing.assert_close(patches, expected.pixel_values, rtol=0, atol=1.5 / 255 / 0.26)


def test_the_size_is_that_of_the_authors():
    assert canvas(448, 448, multiple=28) == canvas(512, 512, multiple=28) == canvas(64, 64, multiple=28) == (448, 448)
    assert canvas(720, 1280, multiple=28) == (336, 588)  # below the number of pixels from above it
    assert canvas(100, 50, multiple=28) == (644, 336)  # and above it from below


def test_the_rubric_is_the_authors_byte_for_byte():
    digest = hashlib.sha256(TURN.encode()).hexdigest()
    assert digest == "d01a23c2a1c791e094d886cfff80665dc6aefbcc52560c1b30374cb4dbf70545"


def test_prompt_and_image_both_matter(folder):
    reward = load_reward(f"hps-v3:{folder}")
    one = reward(pictures(1).repeat(2, 1, 1, 1), ["a red fox", "an oak"])
    other = reward(pictures(2), ["a red fox"] * 2)
    assert one[0] == pytest.approx(other[0].item(), abs=1e-4)
    assert min((one[0] - one[1]).abs(), (other[0] - other[1]).abs()) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 2])
def test_neither_the_batch_nor_the_neighbours_matter(folder, batch_size):
    images = pictures(3, 40, 60)
    alone = torch.cat([HpsV3Reward(folder)(images[k : k + 1], PROMPTS[k : k + 1]) for k in range(3)])
    scores = HpsV3Reward(folder, batch_size=batch_size)(images, PROMPTS)
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)


def test_the_gradient_reaches_every_image_and_is_finite(folder):
    images = pictures(2, 32, 32).requires_grad_()
    load_rewards({f"hps-v3:{folder}": 1.0}).with_gradient(images, PROMPTS[:2]).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert images.grad.abs().sum(dim=(1, 2, 3)).min() > 0


def test_the_model_stays_in_the_precision_of_its_file_and_the_head_is_float32(folder, tmp_path):
    reward = HpsV3Reward(save_hpsv3(tmp_path, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.float16):
        scores = reward(pictures(), PROMPTS)
    parts = reward._loaded()
    assert {one.dtype for one in parts.model.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in parts.head.parameters()} == {scores.dtype} == {torch.float32}
    torch.testing.assert_close(scores, HpsV3Reward(folder)(pictures(), PROMPTS), rtol=0.1, atol=0.1)


def test_the_version_is_of_model_and_head(folder, tmp_path):
    versions = {version_of(HpsV3Reward(folder)), version_of(load_reward(f"hps-v3:{folder}"))}
    for name in ("rm_head.5.bias", "visual.merger.ln_q.bias"):
        (tmp_path / name).mkdir()
        save_hpsv3(tmp_path / name, lambda state, name=name: state | {name: state[name] + 1})
        versions.add(version_of(HpsV3Reward(tmp_path / name)))
    assert len(versions) == 3


def test_the_named_one_is_the_published():
    assert load_reward("hps-v3") is HPS_V3
    assert repr(HPS_V3) == "HpsV3Reward('MizzenAI/HPSv3', processor='Qwen/Qwen2-VL-7B-Instruct')"
    assert [tuple(one.shape) for one in head_of(3584).state_dict().values()] == [
        *((1024, 3584), (1024,), (16, 1024), (16,), (2, 16), (2,))
    ]


def without(part):
    return lambda state: {name: value for name, value in state.items() if part not in name}


REFUSED = {
    "no head": (without("rm_head"), "lacks 6 of the weights.*three linear layers"),
    "part of the head": (without("rm_head.3.bias"), r"lacks 1 of the weights, such as 3\.bias"),
    "no words": (without("embed_tokens"), "has no words"),
    "lacks": (without("norm2.bias"), r"lacks 2 .*visual\.blocks\.0\.norm2\.bias"),
    "foreign": (lambda s: s | {"visual.more": torch.zeros(1)}, "1 weights too many, such as visual.more"),
    "other words": (lambda s: s | {"model.embed_tokens.weight": torch.zeros(9, WIDTH)}, "tokens with .* 9; expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_files_are_refused(case, tmp_path):
    change, fault = REFUSED[case]
    with pytest.raises(InputError, match=fault):
        HpsV3Reward(save_hpsv3(tmp_path, change))(pictures(1), ["a"])


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    file = save_hpsv3(tmp_path) / "HPSv3.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        HpsV3Reward(tmp_path)(pictures(1), ["a"])


def test_wrong_processors_images_prompts_and_settings_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="has no configuration and tokenizer of Qwen2-VL"):
        HpsV3Reward(folder, processor=tmp_path)(pictures(1), ["a"])
    with pytest.raises(RewardError, match="expected \\[0, 1\\]"):
        HpsV3Reward(folder)(2 * pictures(1), ["a"])
    with pytest.raises(RewardError, match="at most 200 times"):
        HpsV3Reward(folder)(torch.zeros(1, 3, 1, 201), ["a"])
    with pytest.raises(RewardError, match="has <.Reward.> in it") as caught:
        HpsV3Reward(folder)(pictures(2), ["a", "a <|Reward|>"])
    assert tuple(caught.value.indices) == (1,)
    with pytest.raises(InputError, match="batch_size is 0"):
        HpsV3Reward(folder, batch_size=0)
