import json
import string

import pytest
import torch
from torch.nn import functional
from transformers import BertTokenizer, CLIPImageProcessorPil

from rpo.errors import InputError
from rpo.rewards import RewardError, load_reward, load_rewards
from rpo.rewards.image_reward import DEVIATION, IMAGE_REWARD, MEAN, BlipReward, from_blip
from rpo.rewards.weights import LinearHead
from tests.rewards.clip_models import OLD_PREPROCESSOR

EDGE, PATCH, WIDTH, VISION_HEADS, TEXT_WIDTH, TEXT_HEADS, LAYERS, LENGTH = 32, 8, 128, 2, 24, 3, 2, 40
PROMPTS = ["a red fox", "a very old oak tree, its leaves", "a red fox"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), ",", "."]
TEXT_CONFIG = {
    "architectures": ["BertModel"],
    "vocab_size": len(WORDS) + 2,
    "hidden_size": TEXT_WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": TEXT_HEADS,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": LENGTH,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "encoder_width": 768,
    "add_cross_attention": True,
}
"""The file beside the published weights says 768 too, whatever the width of the vision transformer is."""


def tiny_state():
    """Random weights in the layout of the published file, with what it has beside them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    state = {
        f"{vision}cls_token": random(1, 1, WIDTH),
        f"{vision}pos_embed": random(1, (EDGE // PATCH) ** 2 + 1, WIDTH),
        f"{vision}patch_embed.proj.weight": random(WIDTH, 3, PATCH, PATCH),
        f"{vision}patch_embed.proj.bias": random(WIDTH),
        f"{text}embeddings.position_ids": torch.arange(LENGTH)[None],
        f"{text}embeddings.word_embeddings.weight": random(len(WORDS) + 2, TEXT_WIDTH),
        f"{text}embeddings.position_embeddings.weight": random(LENGTH, TEXT_WIDTH),
        "blip.vision_proj.weight": random(4, WIDTH),
        "blip.text_proj.weight": random(4, TEXT_WIDTH),
    }
    norms, linear = {f"{vision}norm": WIDTH, f"{text}embeddings.LayerNorm": TEXT_WIDTH}, {}
    for number in range(LAYERS):
        block, layer = f"{vision}blocks.{number}.", f"{text}encoder.layer.{number}."
        norms |= {f"{block}norm1": WIDTH, f"{block}norm2": WIDTH, f"{layer}output.LayerNorm": TEXT_WIDTH}
        linear |= {f"{block}attn.qkv": (3 * WIDTH, WIDTH), f"{block}attn.proj": (WIDTH, WIDTH)}
        linear |= {f"{block}mlp.fc1": (4 * WIDTH, WIDTH), f"{block}mlp.fc2": (WIDTH, 4 * WIDTH)}
        linear |= {f"{layer}intermediate.dense": (48, TEXT_WIDTH), f"{layer}output.dense": (TEXT_WIDTH, 48)}
        for name, width in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            norms |= {f"{layer}{name}.output.LayerNorm": TEXT_WIDTH}
            linear |= {f"{layer}{name}.output.dense": (TEXT_WIDTH, TEXT_WIDTH)}
            linear |= {f"{layer}{name}.self.query": (TEXT_WIDTH, TEXT_WIDTH)}
            linear |= {f"{layer}{name}.self.{part}": (TEXT_WIDTH, width) for part in ("key", "value")}
    for name, (outer, inner) in linear.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = random(outer, inner), random(outer)
    for name, width in norms.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + random(width), random(width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = LinearHead(TEXT_WIDTH).state_dict()
    return state | {f"mlp.{name}": 2 * value for name, value in head.items()}


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x, state, name, epsilon):
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], epsilon)


def attention(query, key, value, heads, mask=None):
    query, key, value = (one.unflatten(-1, (heads, -1)).transpose(0, 1) for one in (query, key, value))
    weights = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    if mask is not None:
        weights = weights - 10000 * (1 - mask.float())
    return (weights.softmax(-1) @ value).transpose(0, 1).flatten(1)


def see(pixels, state):
    """BLIP's vision transformer on one image."""
    root = "blip.visual_encoder."
    patches = functional.conv2d(
        pixels[None], state[f"{root}patch_embed.proj.weight"], state[f"{root}patch_embed.proj.bias"], stride=PATCH
    )
    x = torch.cat([state[f"{root}cls_token"][0], patches[0].flatten(1).T]) + state[f"{root}pos_embed"][0]
    for number in range(LAYERS):
        block = f"{root}blocks.{number}."
        query, key, value = linear(norm(x, state, f"{block}norm1", 1e-6), state, f"{block}attn.qkv").chunk(3, -1)
        x = x + linear(attention(query, key, value, VISION_HEADS), state, f"{block}attn.proj")
        y = functional.gelu(linear(norm(x, state, f"{block}norm2", 1e-6), state, f"{block}mlp.fc1"))
        x = x + linear(y, state, f"{block}mlp.fc2")
    return norm(x, state, f"{root}norm", 1e-6)


def read(ids, mask, seen, state):
    """BLIP's text encoder on one prompt, each layer looking at the image after it has read."""
    root = "blip.text_encoder."
    x = state[f"{root}embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{root}embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x, state, f"{root}embeddings.LayerNorm", 1e-12)
    for number in range(LAYERS):
        layer = f"{root}encoder.layer.{number}."
        for name, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            source = x if source is None else source
            query = linear(x, state, f"{layer}{name}.self.query")
            key, value = (linear(source, state, f"{layer}{name}.self.{part}") for part in ("key", "value"))
            y = linear(attention(query, key, value, TEXT_HEADS, hidden), state, f"{layer}{name}.output.dense")
            x = norm(y + x, state, f"{layer}{name}.output.LayerNorm", 1e-12)
        y = linear(functional.gelu(linear(x, state, f"{layer}intermediate.dense")), state, f"{layer}output.dense")
        x = norm(y + x, state, f"{layer}output.LayerNorm", 1e-12)
    return x


def by_the_authors(images, prompts, folder):
    """Their steps: PIL image, 35 tokens with padding, first token, head, mean and deviation."""
    state = tiny_state()
    tokens = BertTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    as_bytes = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = CLIPImageProcessorPil.from_dict(dict(OLD_PREPROCESSOR))(list(as_bytes), return_tensors="pt").pixel_values
    scores = []
    for one, ids, mask in zip(pixels, tokens.input_ids, tokens.attention_mask, strict=True):
        x = read(ids, mask, see(one, state), state)[0]
        for number in (0, 2, 4, 6, 7):
            x = linear(x, state, f"mlp.layers.{number}")
        scores.append((x[0] - 0.16717362830052426) / 1.0333394966054072)
    return torch.stack(scores)


def save_image_reward(folder, state=None, config=None, words=WORDS):
    torch.save(tiny_state() if state is None else state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(TEXT_CONFIG if config is None else config))
    BertTokenizer({word: index for index, word in enumerate(words)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_image_reward(tmp_path_factory.mktemp("image_reward"))


def pictures(count=3, height=EDGE, width=EDGE):
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))
    return (noise * 255).round() / 255


def test_it_is_what_the_authors_compute(folder):
    images, prompts = pictures(4), [*PROMPTS, "x" * 60]
    expected = by_the_authors(images, prompts, folder)
    assert expected.std() > 0.01
    torch.testing.assert_close(load_reward(f"image-reward:{folder}")(images, prompts), expected, rtol=1e-4, atol=1e-5)


def test_prompt_and_image_both_matter(folder):
    reward = load_reward(f"image-reward:{folder}")
    one = reward(pictures(1).repeat(2, 1, 1, 1), ["a red fox", "an oak"])
    other = reward(pictures(2), ["a red fox"] * 2)
    assert one[0] == pytest.approx(other[0].item(), abs=1e-5)
    assert min((one[0] - one[1]).abs(), (other[0] - other[1]).abs()) > 1e-4


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_neither_the_batch_nor_the_neighbours_matter(folder, batch_size):
    images, prompts = pictures(5, 40, 50), ["a", "a prompt of many more words", "b c", "a", "d"]
    alone = torch.cat([BlipReward(folder)(images[k : k + 1], prompts[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(BlipReward(folder, batch_size=batch_size)(images, prompts), alone, rtol=1e-4, atol=1e-5)


def test_the_gradient_reaches_every_image_and_is_finite(folder):
    images = torch.cat([pictures(2), torch.full((1, 3, EDGE, EDGE), 0.5)]).requires_grad_()
    load_rewards({f"image-reward:{folder}": 1.0}).with_gradient(images, PROMPTS).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert images.grad.abs().sum(dim=(1, 2, 3)).min() > 0


def test_it_stays_in_float32_under_autocast(folder):
    plain = BlipReward(folder)(pictures(), PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        scores = BlipReward(folder)(pictures(), PROMPTS)
    assert scores.dtype == torch.float32 and torch.equal(scores, plain)


def test_what_the_score_does_not_ask_for_is_left_out():
    kept = from_blip(tiny_state())
    names = set().union(*kept)
    assert not [name for name in names if "proj." in name and "patch" not in name and not name.startswith("encoder")]
    assert len(names) == len(tiny_state()) - 3


def test_the_named_one_is_the_published():
    assert load_reward("image-reward") is IMAGE_REWARD
    assert repr(IMAGE_REWARD) == "BlipReward('THUDM/ImageReward', tokenizer='google-bert/bert-base-uncased')"
    assert (MEAN, DEVIATION) == (0.16717362830052426, 1.0333394966054072)


REFUSED = {
    "no image part": (lambda s: {key: s[key] for key in s if "visual" not in key}, None, "has no blip.visual_encoder"),
    "lacks": (lambda s: {key: s[key] for key in s if "norm2.bias" not in key}, None, r"lacks 2 .*layer_norm2\.bias"),
    "no head": (lambda s: {key: s[key] for key in s if "mlp.layers" not in key}, None, "lacks 10 .*five linear layers"),
    "foreign": (lambda s: s | {"mlp.more": s["mlp.layers.0.bias"]}, None, "1 weights too many, such as more"),
    "other depth": (lambda s: s, TEXT_CONFIG | {"num_hidden_layers": 1}, "26 weights too many"),
    "short configuration": (lambda s: s, {"vocab_size": 9}, "med_config.json does not say hidden_size, "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_files_are_refused(case, tmp_path):
    change, config, fault = REFUSED[case]
    reward = BlipReward(save_image_reward(tmp_path, change(tiny_state()), config))
    with pytest.raises(InputError, match=fault):
        reward(pictures(1), ["a"])


def test_wrong_tokenizers_images_and_settings_are_refused(folder, tmp_path):
    save_image_reward(tmp_path, words=[*WORDS, "more"])
    with pytest.raises(InputError, match="62 tokens, the model of .* 61"):
        BlipReward(tmp_path)(pictures(1), ["a"])
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", "no/where"):
        with pytest.raises(InputError, match="has 7 tokens, the model of .* 61"):
            BlipReward(folder, tokenizer=place)(pictures(1), ["a"])
    with pytest.raises(RewardError, match="expected \\[0, 1\\]"):
        BlipReward(folder)(2 * pictures(1), ["a"])
    with pytest.raises(InputError, match="batch_size is 0"):
        BlipReward(folder, batch_size=0)
