"""The proxy's making: its loss, its data, how it is measured, and an ordinary CLIP checkpoint as its result."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import rpo.shapes
from rpo.config.load import load_config
from rpo.rewards import load_reward
from rpo.rewards.clip import ClipReward
from rpo.shapes import PROXY
from rpo.shapes.evaluate import judge_images, usual_sampling
from rpo.shapes.prompts import sample_prompts
from rpo.shapes.world import draw_scene, render
from scripts.shapes import evaluate
from scripts.shapes.evaluate import Proxy, agreement, agreements, decode_noisy, scene_accuracy, to_pixel_values
from scripts.shapes.networks import MAX_TOKENS
from scripts.shapes.pretrain_proxy import (
    PretrainProxyConfig,
    contrastive_loss,
    prepare,
    pretrain_proxy,
    truth_table,
)
from scripts.shapes.proxy_scenes import FAMILY_SIZE, draw_families, known_prompts
from scripts.shapes.vae import channels_first, decode, encode

CPU = torch.device("cpu")
HELD_OUT_SEED = 987_654


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(str(rpo.shapes.path()), subfolder="vae")


@pytest.fixture(scope="module")
def families():
    return draw_families(0, 10)


@pytest.fixture(scope="module")
def data(families):
    tokenizer = CLIPTokenizer.from_pretrained(str(rpo.shapes.path() / "tokenizer"), model_max_length=MAX_TOKENS)
    return prepare(families, tokenizer, seed=0, device=CPU)


def random_logits(rows=5, columns=5):
    return 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_with_one_caption_each_the_loss_is_that_of_clip():
    logits = random_logits()
    target = torch.arange(5)
    expected = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(5, dtype=torch.bool)), expected)


def test_right_captions_do_not_compete_and_rows_without_any_are_wrong_images_only():
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
    holds = torch.tensor([[True, True, False], [False, False, False]])
    image_to_text = (math.log(1 + math.exp(-1 - 1)) + math.log(1 + math.exp(-1 - 2))) / 2
    text_to_image = (math.log(1 + math.exp(0.5 - 1)) + math.log(1 + math.exp(0 - 2))) / 2
    assert contrastive_loss(logits, holds).item() == pytest.approx((image_to_text + text_to_image) / 2)


def test_nothing_right_or_nothing_wrong_teaches_nothing():
    logits = random_logits().requires_grad_()
    for holds in (torch.zeros(5, 5, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool)):
        loss = contrastive_loss(logits, holds)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(gradient, torch.zeros_like(logits))


def test_the_truth_table_holds_the_captions(families):
    sentences = [prompt.text for prompt in known_prompts()]
    table = truth_table(families, sentences)
    found = [{sentences[column] for column in row.nonzero().flatten().tolist()} for row in table]
    assert found == [set(captions) for captions in families.captions]


def test_a_batch_is_of_whole_families_with_captions_that_belong_to_them(data, families):
    generator = torch.Generator().manual_seed(5)
    sentences = [prompt.text for prompt in known_prompts()]
    ids_of = {tuple(ids): sentence for ids, sentence in zip(data.token_ids.tolist(), sentences, strict=True)}
    forms = set()
    for _ in range(10):
        batch = data.draw(generator, 3)
        assert batch.pixels.shape == (3 * FAMILY_SIZE, 3, 64, 64)
        captions = [ids_of[tuple(ids)] for ids in batch.token_ids.tolist()]
        matches = (data.images[:, :, None] == batch.pixels).flatten(3).all(3)  # [form, scene, position]
        for position in range(3 * FAMILY_SIZE):
            # Two near misses of a family may be the same scene; a batch keeps the order within the family.
            form, scene = next(
                found
                for found in matches[:, :, position].nonzero().tolist()
                if (found[1] - position) % FAMILY_SIZE == 0
            )
            forms.add(form)
            right = families.captions[scene]
            assert captions[position] in (right or families.captions[scene - scene % FAMILY_SIZE])
            assert batch.holds[position].tolist() == [caption in right for caption in captions]
    assert forms == {0, 1}


def test_pixels_are_what_the_saved_image_processor_makes(families):
    images = channels_first(families.images[:4])
    processor = CLIPImageProcessorPil.from_pretrained(PROXY)
    expected = processor(list(families.images[:4]), return_tensors="pt").pixel_values
    torch.testing.assert_close(to_pixel_values(images), expected, rtol=0, atol=1e-5)


def test_decoded_images_are_the_autoencoders_and_noise_makes_them_worse(vae, families, monkeypatch):
    images = channels_first(families.images)
    noisy = decode_noisy(vae, images, seed=1)
    assert torch.equal(noisy, decode_noisy(vae, images, seed=1))
    monkeypatch.setattr(evaluate, "LATENT_NOISE", 0.0)
    clean = decode_noisy(vae, images, seed=1)
    assert torch.equal(clean, (decode(vae, encode(vae, images).mean) * 255).round().byte())
    errors = [(some.float() - images.float()).abs().mean().item() for some in (clean, noisy)]
    assert errors[0] < errors[1] < 5 * errors[0]


def test_agreement_in_numbers_that_can_be_checked_by_hand():
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 2.0], [5.0, 6.0, 7.0]])
    holds = np.array([[True, False, False], [True, False, False], [True, True, True]])
    verified = np.array([[1.0, 0.5, 0.2], [1.0, 0.5, 0.2], [1.0, 1.0, 1.0]])
    found = agreement(scores, holds, verified)
    assert found["accuracy"] == pytest.approx(5 / 9)
    assert found["best_of_n"] == pytest.approx(2 / 3)
    assert found["worst_of_n"] == pytest.approx(2 / 3)
    assert (found["pairs"], found["auc_within"]) == (4, pytest.approx(2.5 / 4))
    assert found["auc"] == pytest.approx((4 + 1 + 12) / 20)  # of 3, of 1, and of 5, 6 and 7
    assert found["spearman_within"] == pytest.approx((1 - math.sqrt(3) / 2) / 2)
    nothing = agreement(np.array([[1.0, 2.0]]), np.array([[True, True]]), np.array([[1.0, 1.0]]))
    assert all(math.isnan(nothing[name]) for name in ("auc_within", "auc", "spearman_within"))


def test_each_domain_is_compared_by_itself():
    prompts = {split: sample_prompts(split, 4, 0) for split in ("train", "in_domain")}
    generator = np.random.default_rng(0)
    pictures = []
    for prompt in [prompt for some in prompts.values() for prompt in some]:
        right = render(draw_scene(prompt, generator))
        pictures += [right, np.full_like(right, 240)]
    evaluation = judge_images(np.stack(pictures), prompts, usual_sampling(0, images_per_prompt=2))
    found = agreements(evaluation, np.array([1.0, 0.0] * 4 + [0.0, 1.0] * 4))
    assert found["train"]["auc_within"] == found["train"]["best_of_n"] == 1
    assert found["in_domain"]["auc_within"] == found["in_domain"]["best_of_n"] == 0


@pytest.fixture(scope="module")
def held_out():
    return draw_families(HELD_OUT_SEED, 60)


def test_the_embedded_proxy_knows_scenes_that_it_never_saw(held_out):
    images = channels_first(held_out.images)
    found = scene_accuracy(Proxy.load(PROXY, CPU), images, held_out)
    assert found["caption_retrieval"] >= 0.9
    assert found["right_above_near_miss"] >= 0.95
    texts = [prompt.text for prompt in held_out.prompts for _ in range(FAMILY_SIZE)]
    scores = load_reward("shapes-clip")(images / 255, texts).view(-1, FAMILY_SIZE)
    assert (scores[:, :1] > scores[:, 1:]).float().mean() >= 0.95


def test_the_embedded_proxy_is_small_and_says_how_good_it_is():
    assert sum(file.stat().st_size for file in PROXY.iterdir()) <= 6 * 2**20
    assert (PROXY / "model.safetensors").stat().st_mode & 0o044 == 0o044
    numbers = json.loads((PROXY / "evaluation.json").read_text())
    for split in ("train", "in_domain", "out_of_domain"):
        assert 0.5 < numbers["base_images"][split]["auc_within"] < 1  # helpful, and not the truth


@pytest.mark.slow
def test_the_script_makes_an_ordinary_clip_checkpoint_and_stops_where_it_should(tmp_path):
    words = ["device=cpu", "families=6", "loop.warmup_updates=0", "loop.progress=false", f"output={tmp_path}"]
    pretrain_proxy(load_config(PretrainProxyConfig, None, [*words, "loop.updates=4", "stop=2", "evaluate=4"]))
    folder = tmp_path / "checkpoint"
    assert (tmp_path / "proxy/checkpoint-000002").is_dir() and not (tmp_path / "proxy/checkpoint-000003").exists()
    assert "out_of_domain" in json.loads((folder / "evaluation.json").read_text())["base_images"]
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16}
    model, info = CLIPModel.from_pretrained(str(folder), output_loading_info=True)
    assert not info["missing_keys"] and model.dtype == torch.float32
    scenes = draw_families(1, 3)
    images, texts = channels_first(scenes.images), [scenes.prompts[index // 4].text for index in range(12)]
    proxy = Proxy.load(folder, CPU)
    expected = (proxy.embed_images(images) * proxy.embed_texts(texts)).sum(-1)
    torch.testing.assert_close(ClipReward(folder, scale=1.0)(images / 255, texts), expected, rtol=0, atol=1e-5)
