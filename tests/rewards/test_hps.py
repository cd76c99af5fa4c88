import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig

from rpo.errors import InputError
from rpo.rewards import load_reward, load_rewards
from rpo.rewards.hps import HPS_V2, HPS_V2_1, V2_1_FILE, V2_FILE, Letterbox, from_open_clip
from tests.tiny import tiny_text_config, tiny_tokenizer

EDGE, PATCH, WIDTH, TEXT_WIDTH, HEADS, LAYERS, DIM, LENGTH = 32, 8, 40, 32, 4, 2, 16, 24
PROMPTS = ["a red fox", "a very old oak tree", "a red fox"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def tiny_config():
    text = tiny_text_config(projection_dim=DIM).to_dict() | {"max_position_embeddings": LENGTH, "hidden_act": "gelu"}
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "image_size": EDGE,
        "patch_size": PATCH,
        "projection_dim": DIM,
        "hidden_act": "gelu",
    }
    return CLIPConfig(
        text_config=text | {"intermediate_size": 4 * TEXT_WIDTH}, vision_config=vision, projection_dim=DIM
    )


def tiny_state():
    """Random weights in the layout of open_clip's CLIP."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    state = {
        "positional_embedding": random(LENGTH, TEXT_WIDTH),
        "text_projection": random(TEXT_WIDTH, DIM),
        "logit_scale": torch.tensor(math.log(100)),
        "token_embedding.weight": random(tiny_text_config().vocab_size, TEXT_WIDTH),
        "visual.class_embedding": random(WIDTH),
        "visual.positional_embedding": random((EDGE // PATCH) ** 2 + 1, WIDTH),
        "visual.proj": random(WIDTH, DIM),
        "visual.conv1.weight": random(WIDTH, 3, PATCH, PATCH),
    }
    norms = {"ln_final": TEXT_WIDTH, "visual.ln_pre": WIDTH, "visual.ln_post": WIDTH}
    for tower, width in (("transformer", TEXT_WIDTH), ("visual.transformer", WIDTH)):
        for number in range(LAYERS):
            block = f"{tower}.resblocks.{number}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            for name, outer, inner in (
                ("attn.in_proj_", 3 * width, width),
                ("attn.out_proj.", width, width),
                ("mlp.c_fc.", 4 * width, width),
                ("mlp.c_proj.", width, 4 * width),
            ):
                state[f"{block}.{name}weight"], state[f"{block}.{name}bias"] = random(outer, inner), random(outer)
    for name, width in norms.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + random(width), random(width)
    return state


def norm(x, state, name):
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def blocks(x, state, tower, *, is_causal):
    """open_clip's residual blocks; torch's own attention reads the joined projection."""
    width, length = x.shape[-1], x.shape[1]
    mask = torch.full((length, length), -math.inf).triu(1) if is_causal else None
    for number in range(LAYERS):
        name = f"{tower}.resblocks.{number}"
        own = f"{name}.attn."
        attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        attention.load_state_dict({key.removeprefix(own): value for key, value in state.items() if key.startswith(own)})
        y = norm(x, state, f"{name}.ln_1")
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = norm(x, state, f"{name}.ln_2") @ state[f"{name}.mlp.c_fc.weight"].T + state[f"{name}.mlp.c_fc.bias"]
        x = x + functional.gelu(y) @ state[f"{name}.mlp.c_proj.weight"].T + state[f"{name}.mlp.c_proj.bias"]
    return x


def tokens_of_open_clip(prompts):
    """Cut off with the end token at the last place, and filled up with 0."""
    tokenizer, rows = tiny_tokenizer(), torch.zeros(len(prompts), LENGTH, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = tokenizer(prompt).input_ids[:LENGTH]
        ids[-1] = tokenizer.eos_token_id
        row[: len(ids)] = torch.tensor(ids)
    return rows


@torch.no_grad()
def by_open_clip(pixels, prompts):
    state = tiny_state()
    x = functional.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = norm(x + state["visual.positional_embedding"], state, "visual.ln_pre")
    x = blocks(x, state, "visual.transformer", is_causal=False)
    image = norm(x[:, 0], state, "visual.ln_post") @ state["visual.proj"]
    tokens = tokens_of_open_clip(prompts)
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    x = norm(blocks(x, state, "transformer", is_causal=True), state, "ln_final")
    text = x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ state["text_projection"]
    return functional.cosine_similarity(image, text)


def save_hps(folder, state=None, *, eos_token_id=None):
    config = tiny_config()
    if eos_token_id is not None:
        config.text_config.eos_token_id = eos_token_id
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    torch.save({"state_dict": tiny_state() if state is None else state}, folder / V2_1_FILE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hps(tmp_path_factory.mktemp("hps"))


def pictures(count=3, height=EDGE, width=EDGE):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_it_is_the_cosine_of_open_clip(folder):
    images, prompts = pictures(4), [*PROMPTS, "x" * 100]
    expected = by_open_clip((images - MEAN) / STD, prompts)
    assert expected.std() > 0.05
    torch.testing.assert_close(load_reward(f"hps-v2.1:{folder}")(images, prompts), expected, rtol=0, atol=1e-5)


def test_the_number_of_the_end_token_in_the_configuration_does_not_matter(folder, tmp_path):
    old = save_hps(tmp_path, eos_token_id=2)  # as laion's has it
    expected = load_reward(f"hps-v2.1:{folder}")(pictures(), PROMPTS)
    torch.testing.assert_close(load_reward(f"hps-v2.1:{old}")(pictures(), PROMPTS), expected)


def test_both_versions_read_their_own_file(folder, tmp_path):
    save_hps(tmp_path)
    (tmp_path / V2_1_FILE).rename(tmp_path / V2_FILE)
    expected = load_reward(f"hps-v2.1:{folder}")(pictures(), PROMPTS)
    assert torch.equal(load_reward(f"hps-v2:{tmp_path}")(pictures(), PROMPTS), expected)
    with pytest.raises(InputError, match=rf"has no {V2_1_FILE}"):
        load_reward(f"hps-v2.1:{tmp_path}")(pictures(), PROMPTS)


def test_every_weight_has_its_place():
    state = tiny_state()
    renamed = from_open_clip(state)
    assert sum(value.numel() for value in renamed.values()) == sum(value.numel() for value in state.values())
    first, last = (f"vision_model.encoder.layers.0.self_attn.{letter}_proj.weight" for letter in "qv")
    joined = state["visual.transformer.resblocks.0.attn.in_proj_weight"]
    assert torch.equal(renamed[first], joined[:WIDTH]) and torch.equal(renamed[last], joined[2 * WIDTH :])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (64, 48), (20, 31), (32, 24)])
def test_the_whole_image_is_in_the_middle_of_a_black_square(height, width):
    images = 0.25 + 0.5 * pictures(2, 4, 4).repeat_interleave(20, 2).repeat_interleave(20, 3)[:, :, :height, :width]
    pixels = Letterbox(EDGE)(images) * STD + MEAN
    assert pixels.shape == (2, 3, EDGE, EDGE)
    long = max(height, width)
    inner_height, inner_width = round(height * EDGE / long), round(width * EDGE / long)
    top, left = (EDGE - inner_height) // 2, (EDGE - inner_width) // 2
    inside = torch.zeros(EDGE, EDGE, dtype=torch.bool)
    inside[top : top + inner_height, left : left + inner_width] = True
    assert pixels[:, :, ~inside].abs().sum() < 1e-4
    expected = functional.interpolate(images, (inner_height, inner_width), mode="bicubic", antialias=True)
    inner = pixels[:, :, top : top + inner_height, left : left + inner_width]
    torch.testing.assert_close(inner, expected, rtol=0, atol=1e-5)


def test_no_image_is_cut():
    images = torch.zeros(1, 3, 32, 96)
    images[..., :8] = 1
    pixels = Letterbox(EDGE)(images) * STD + MEAN
    assert pixels[0, :, 16, 0].min() > 0.9 and pixels[0, :, :10].abs().max() < 1e-5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_neither_the_batch_nor_the_neighbours_matter(folder, count):
    reward, images = load_reward(f"hps-v2.1:{folder}"), pictures(5, 40, 50)
    prompts = ["a", "a prompt of many more words", "b c", "a", "d"]
    parts = [reward(some, prompts[k * count : k * count + len(some)]) for k, some in enumerate(images.split(count))]
    torch.testing.assert_close(torch.cat(parts), reward(images, prompts), rtol=0, atol=1e-5)


def test_the_gradient_reaches_every_pixel_and_is_finite(folder):
    images = torch.cat([pictures(2, 48, 40), torch.full((1, 3, 48, 40), 0.5)]).requires_grad_()
    load_rewards({f"hps-v2.1:{folder}": 1.0}).with_gradient(images, PROMPTS).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert (images.grad[:2] != 0).float().mean() > 0.99


def test_a_prompt_is_embedded_once(folder, monkeypatch):
    reward = load_reward(f"hps-v2.1:{folder}")
    first = reward(pictures(), PROMPTS)
    monkeypatch.setattr(reward._loaded.model, "get_text_features", None)
    assert torch.equal(reward(pictures(), PROMPTS), first)


def test_the_named_ones_are_the_published():
    assert (load_reward("hps-v2"), load_reward("hps-v2.1")) == (HPS_V2, HPS_V2_1)
    assert repr(HPS_V2_1) == (
        "ClipReward('xswu/HPSv2/HPS_v2.1_compressed.pt', processor='laion/CLIP-ViT-H-14-laion2B-s32B-b79K', scale=1.0)"
    )


def test_a_wrong_file_is_refused(tmp_path):
    state = tiny_state()
    lacking = {key: value for key, value in state.items() if key != "visual.proj"}
    cases = (
        (lacking, "lacks 1 .*visual_projection"),
        (state | {"score_predictor.weight": torch.zeros(1)}, "1 weights too many, such as score_predictor"),
        (state | {"visual.proj": torch.zeros(WIDTH, 2)}, r"has visual_projection\.weight of shape"),
    )
    for number, (wrong, fault) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        folder = save_hps(tmp_path / str(number), wrong)
        with pytest.raises(InputError, match=rf"{V2_1_FILE} .*{fault}.*; expected open_clip's weights"):
            load_reward(f"hps-v2.1:{folder}")(pictures(1), ["a"])
    save_hps(tmp_path / "0")
    for file in (tmp_path / "0").glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="has . tokens, the model 514; expected as many"):
        load_reward(f"hps-v2.1:{tmp_path / '0'}")(pictures(1), ["a"])
    (tmp_path / "0" / "config.json").unlink()
    with pytest.raises(InputError, match="no configuration and tokenizer of a CLIP model"):
        load_reward(f"hps-v2.1:{tmp_path / '0'}")(pictures(1), ["a"])


@pytest.mark.slow
def test_it_is_what_open_clip_itself_says(tmp_path):
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch says RuntimeError
        pytest.skip(f"open_clip cannot be imported: {error}")
    torch.manual_seed(0)
    config = tiny_config()
    vision = {"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH, "image_size": EDGE}
    text = {"context_length": LENGTH, "vocab_size": config.text_config.vocab_size, "width": TEXT_WIDTH}
    model = open_clip.CLIP(DIM, vision, text | {"heads": HEADS, "layers": LAYERS}).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    images = pictures(3, 64, 40)
    pixels = Letterbox(EDGE)(images)
    with torch.no_grad():
        found = model.encode_image(pixels), model.encode_text(tokens_of_open_clip(PROMPTS))
    folder = save_hps(tmp_path, model.state_dict())
    scores = load_reward(f"hps-v2.1:{folder}")(images, PROMPTS)
    torch.testing.assert_close(scores, functional.cosine_similarity(*found), rtol=0, atol=1e-5)
