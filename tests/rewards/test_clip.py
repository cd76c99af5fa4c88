import math
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTextModel

from rpo.errors import InputError
from rpo.rewards import RewardError, load_reward, load_rewards, score
from rpo.rewards import clip as module
from rpo.rewards.clip import CLIP_SCORE, PICK_SCORE, ClipReward
from rpo.shapes import PROXY
from tests.rewards.clip_models import EDGE, MAX_TOKENS, OLD_PREPROCESSOR, save_clip, tiny_clip
from tests.tiny import tiny_text_config, tiny_tokenizer

PROMPTS = ["a red fox", "a very old oak tree", "a red fox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def pictures(count=3, height=EDGE, width=EDGE):
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))
    return (noise * 255).round() / 255


def logits_by_transformers(images, prompts):
    """The way of a model card: image processor, tokenizer, one forward pass of the whole model."""
    as_bytes = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = CLIPImageProcessorPil.from_dict(dict(OLD_PREPROCESSOR))(list(as_bytes), return_tensors="pt").pixel_values
    tokens = tiny_tokenizer()(
        prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        output = tiny_clip()(pixel_values=pixels, **tokens)
    return output.logits_per_image.diagonal()


def test_pick_score_is_the_logit_of_the_model(folder):
    expected = logits_by_transformers(pictures(), PROMPTS)
    assert expected.std() > 0.1
    torch.testing.assert_close(load_reward(f"pick-score:{folder}")(pictures(), PROMPTS), expected, rtol=0, atol=1e-4)


def test_a_resized_image_scores_as_in_transformers_within_the_rounding_of_its_bytes(folder):
    images = pictures(3, 70, 96)
    expected = logits_by_transformers(images, PROMPTS)
    torch.testing.assert_close(ClipReward(folder)(images, PROMPTS), expected, rtol=0, atol=0.05 * math.exp(3))


def test_scales_and_the_cut_off_at_zero(folder):
    images, prompts = pictures(24), ["a red fox", "an oak"] * 12
    own = ClipReward(folder)(images, prompts)
    cosines = own / math.exp(3)
    assert cosines.min() < 0 < cosines.max()
    torch.testing.assert_close(load_reward(f"clip-score:{folder}")(images, prompts), 100 * cosines)
    paper = ClipReward(folder, scale=2.5, is_clamped=True)
    torch.testing.assert_close(paper(images, prompts), 2.5 * cosines.clamp(min=0))


def test_the_gradient_is_that_of_finite_differences(folder):
    reward = ClipReward(folder, scale=1.0)
    images = 0.25 + 0.5 * pictures(2, 48, 40)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS[:2]).sum(), leaf)
    for seed in range(3):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        direction += gradient / gradient.std()  # along pure noise the slope is lost in float32
        step = 3e-4
        slope = (reward(images + step * direction, PROMPTS[:2]) - reward(images - step * direction, PROMPTS[:2])).sum()
        assert (slope / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=0.02)


def test_climbing_the_gradient_raises_the_score_and_leaves_the_model_alone(folder):
    reward = ClipReward(folder)
    image = (0.25 + 0.5 * pictures(1)).requires_grad_()
    before = reward(image, ["a red fox"])
    before.sum().backward()
    assert image.grad is not None
    after = reward((image + 0.01 * image.grad.sign()).detach(), ["a red fox"])
    assert after.item() > before.item() + 0.1
    assert not any(parameter.requires_grad for parameter in reward._loaded.model.parameters())


def test_a_weighted_reward_keeps_the_gradient(folder):
    images = pictures(2).requires_grad_()
    load_rewards({f"pick-score:{folder}": 0.5}).with_gradient(images, PROMPTS[:2]).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_neither_the_batch_nor_the_neighbours_matter(folder, batch_size):
    images, prompts = pictures(5, 40, 50), ["a", "a prompt of many more words", "b c", "a", "d"]
    reward = ClipReward(folder, batch_size=batch_size)
    alone = torch.cat([ClipReward(folder)(images[k : k + 1], prompts[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(reward(images, prompts), alone, rtol=0, atol=1e-4)


def test_what_was_asked_before_changes_no_bit():
    """Or a resumed run, whose memory is empty, would go on with other numbers."""
    prompts = ["a red circle", "two blue squares", "a green triangle to the left of a magenta circle", "three circles"]
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fresh, used = ClipReward(PROXY), ClipReward(PROXY)
    used(images[:1], prompts[2:3])
    used(images[:2], prompts[:2])
    assert torch.equal(fresh(images, prompts), used(images, prompts))


def test_each_prompt_is_embedded_once_and_the_oldest_are_forgotten(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_TEXTS", 2)
    reward = ClipReward(folder)
    first = reward(pictures(), PROMPTS)
    asked = []
    embed = reward._loaded.model.get_text_features

    def counting(ids, **more):
        asked.append(len(ids))
        return embed(ids, **more)

    monkeypatch.setattr(reward._loaded.model, "get_text_features", counting)
    assert torch.equal(reward(pictures(), PROMPTS), first)
    assert asked == []
    reward(pictures(2), ["a red fox", "a third"])  # forgets the oak, which was asked for longest ago
    reward(pictures(1), ["a red fox"])
    assert asked == [1]
    reward(pictures(1), ["a very old oak tree"])
    assert asked == [1, 1]
    reward(pictures(5), list("abcde"))  # more at once than are kept
    assert len(reward._texts) == 2


def test_long_prompts_are_cut_off_and_empty_ones_are_scored(folder):
    reward = ClipReward(folder)
    long = "x" * 200
    scores = reward(pictures(1).repeat(3, 1, 1, 1), [long, long + " and more", ""])
    assert scores[0] == scores[1]
    assert scores[2] != scores[0]
    expected = logits_by_transformers(pictures(1), [long])
    torch.testing.assert_close(scores[:1], expected, rtol=0, atol=1e-4)


def test_it_stays_in_float32_whatever_surrounds_it(folder, tmp_path):
    plain = ClipReward(folder)(pictures(), PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ClipReward(folder)(pictures(), PROMPTS), plain)
    half = save_clip(tmp_path)
    weights = {key: value.half() for key, value in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    reward = ClipReward(half)
    assert reward(pictures().half(), PROMPTS).dtype == torch.float32
    assert {parameter.dtype for parameter in reward._loaded.model.parameters()} == {torch.float32}


def test_features_may_be_a_tensor_as_in_older_transformers(folder, monkeypatch):
    reward = ClipReward(folder)
    expected = reward(pictures(), PROMPTS)
    model = reward._loaded.model
    for name in ("get_image_features", "get_text_features"):
        inner = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *args, inner=inner, **more: inner(*args, **more).pooler_output)
    reward._texts.clear()
    assert torch.equal(reward(pictures(), PROMPTS), expected)


def test_the_processor_may_lie_elsewhere_and_in_the_newest_form(folder, tmp_path):
    model = save_clip(tmp_path / "model", has_processor=False)
    processor = CLIPProcessor(CLIPImageProcessorPil.from_dict(dict(OLD_PREPROCESSOR)), tiny_tokenizer())
    processor.save_pretrained(tmp_path / "processor")
    assert (tmp_path / "processor" / "processor_config.json").exists()
    reward = ClipReward(model, processor=tmp_path / "processor")
    assert torch.equal(reward(pictures(), PROMPTS), ClipReward(folder)(pictures(), PROMPTS))


def test_making_the_named_rewards_asks_for_nothing(no_network, tmp_path):
    assert load_reward("clip-score") is CLIP_SCORE
    assert load_reward("pick-score") is PICK_SCORE
    assert repr(CLIP_SCORE) == "ClipReward('openai/clip-vit-large-patch14', scale=100.0)"
    assert repr(PICK_SCORE) == (
        "ClipReward('yuvalkirstain/PickScore_v1', processor='laion/CLIP-ViT-H-14-laion2B-s32B-b79K', scale=None)"
    )
    assert repr(load_reward("clip-score:some/where")) == "ClipReward('some/where', scale=100.0)"
    assert repr(load_reward("pick-score:C:/mine")) == "ClipReward('C:/mine', scale=None)"
    ClipReward(tmp_path / "nothing")


def test_images_out_of_range_are_refused(folder):
    reward = ClipReward(folder)
    with pytest.raises(RewardError, match=r"got values from -0\.5 to 1; expected \[0, 1\]"):
        reward(torch.cat([pictures(1), torch.tensor([-0.5, 1.0]).repeat(1, 3, 32, 16)]), PROMPTS[:2])
    with pytest.raises(RewardError, match="got 3 prompts for 2 images"):
        reward(pictures(2), PROMPTS)
    with pytest.raises(RewardError, match=r"reward 'mine', image 0 .*got values from 0 to 255"):
        score(reward, (pictures(1) * 255).round().index_fill(2, torch.tensor([0]), 0), ["a"], name="mine")


@pytest.mark.parametrize("bad", [{"scale": 0.0}, {"scale": -1.0}, {"scale": math.inf}, {"batch_size": 0}])
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*; expected"):
        ClipReward("some/where", **bad)


def test_what_is_no_clip_checkpoint_is_refused(tmp_path):
    CLIPTextModel(tiny_text_config()).save_pretrained(tmp_path / "text")
    with pytest.raises(
        ValueError, match="its configuration says model_type 'clip_text_model'; expected a folder or hub"
    ):
        ClipReward(tmp_path / "text")(pictures(1), ["a"])
    lacking = save_clip(tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks 1 weights, such as visual_projection\.weight"):
        ClipReward(lacking)(pictures(1), ["a"])
    with pytest.raises(ValueError, match="no CLIP reward can be made of .*nothing'"):
        ClipReward(tmp_path / "nothing")(pictures(1), ["a"])
    with pytest.raises(ValueError, match="no CLIP reward can be made of .*bare"):
        ClipReward(save_clip(tmp_path / "bare", has_processor=False))(pictures(1), ["a"])


def test_a_tokenizer_that_is_not_the_models_is_refused(folder, tmp_path):
    half = save_clip(tmp_path, has_model=False)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=f"{half}' has . tokens, the model 514; expected as many"):
        ClipReward(folder, processor=half)(pictures(1), ["a"])


def test_it_is_the_model_class_of_transformers(folder):
    reward = ClipReward(folder)
    reward(pictures(1), ["a"])
    assert type(reward._loaded.model) is CLIPModel
    assert not reward._loaded.model.training
