import dataclasses
import json
import math

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import rpo.shapes
from rpo.config import load_config
from rpo.rewards.clip import ClipReward
from rpo.shapes import pretrain_proxy as script
from rpo.shapes import proxy_data
from rpo.shapes.networks import MAX_TOKENS
from rpo.shapes.pretrain_evaluate import to_channels_first
from rpo.shapes.pretrain_proxy import PretrainProxyConfig, contrastive_loss, pretrain_proxy
from rpo.shapes.pretrain_vae import round_trip
from rpo.shapes.proxy_checkpoint import PREPROCESSOR
from rpo.shapes.proxy_data import decode_noisy, draw_batch, load_data, to_pixel_values, truth_table
from rpo.shapes.proxy_evaluate import Proxy
from rpo.shapes.proxy_scenes import FAMILY_SIZE, draw_families, known_prompts

CPU = torch.device("cpu")
QUICK = PretrainProxyConfig(
    families=6, steps=4, batch_families=2, held_out_families=0, prompts_per_split=0, log_every=1, save_every=2
)


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(str(rpo.shapes.path()), subfolder="vae")


@pytest.fixture(scope="module")
def families():
    return draw_families(0, 10)


@pytest.fixture(scope="module")
def data(families, tmp_path_factory):
    tokenizer = CLIPTokenizer.from_pretrained(str(rpo.shapes.path() / "tokenizer"), model_max_length=MAX_TOKENS)
    file = tmp_path_factory.mktemp("data") / "decoded.pt"
    return load_data(families, tokenizer, file, seed=0, device=CPU)


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


def test_the_gradient_of_the_loss_is_that_of_finite_differences():
    holds = torch.tensor([[True, True, False, False], [False, False, True, False], [False] * 4])
    assert torch.autograd.gradcheck(
        lambda logits: contrastive_loss(logits, holds), random_logits(3, 4).requires_grad_()
    )


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
        batch = draw_batch(data, 3, generator)
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
    images = to_channels_first(families.images[:4])
    processor = CLIPImageProcessorPil.from_dict(dict(PREPROCESSOR))
    expected = processor(list(families.images[:4]), return_tensors="pt").pixel_values
    torch.testing.assert_close(to_pixel_values(images), expected, rtol=0, atol=1e-5)


def test_decoded_images_are_the_autoencoders_and_noise_makes_them_worse(vae, families, monkeypatch):
    images = to_channels_first(families.images)
    noisy = decode_noisy(vae, images, seed=1)
    assert torch.equal(noisy, decode_noisy(vae, images, seed=1))
    monkeypatch.setattr(proxy_data, "LATENT_NOISE", 0.0)
    clean = decode_noisy(vae, images, seed=1)
    assert torch.equal(clean, (round_trip(vae, images) * 255).round().byte())
    errors = [(some.float() - images.float()).abs().mean().item() for some in (clean, noisy)]
    assert errors[0] < errors[1] < 5 * errors[0]


def test_a_killed_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    undisturbed = dataclasses.replace(QUICK, out=tmp_path / "a", state=tmp_path / "state-a")
    assert pretrain_proxy(undisturbed) == {}
    killed = dataclasses.replace(QUICK, out=tmp_path / "b", state=tmp_path / "state-b")

    def dying(*args, **more):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return contrastive_loss(*args, **more)

    calls: list[int] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "contrastive_loss", dying)
        pretrain_proxy(killed)
    assert not killed.out.exists()
    pretrain_proxy(dataclasses.replace(killed, stop=3))
    pretrain_proxy(killed)
    first, second = (load_file(config.out / "model.safetensors") for config in (undisturbed, killed))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    lines = [json.loads(line) for line in (killed.state / "log.jsonl").read_text().splitlines()]
    assert [line["resumed_at"] for line in lines if "resumed_at" in line] == [2, 3]
    with pytest.raises(ValueError, match="holds a run with other settings .*lr: 0.001 -> 0.002"):
        pretrain_proxy(dataclasses.replace(killed, lr=2e-3))


def test_the_folder_is_an_ordinary_clip_checkpoint_in_half_precision(tmp_path):
    config = dataclasses.replace(QUICK, out=tmp_path / "clip", state=tmp_path / "state")
    pretrain_proxy(config)
    stored = load_file(config.out / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert sum(file.stat().st_size for file in config.out.iterdir()) < 6 * 2**20
    model, info = CLIPModel.from_pretrained(str(config.out), output_loading_info=True)
    assert not info["missing_keys"]
    assert model.dtype == torch.float32
    scenes = draw_families(1, 3)
    images, texts = to_channels_first(scenes.images), [scenes.prompts[index // 4].text for index in range(12)]
    proxy = Proxy.load(config.out, CPU)
    expected = (proxy.embed_images(images) * proxy.embed_texts(texts)).sum(-1)
    scores = ClipReward(config.out, scale=1.0)(images / 255, texts)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_the_settings_are_strict():
    assert load_config(PretrainProxyConfig, None, ["steps=7", "out=here"]).steps == 7
    with pytest.raises(ValueError, match="steps"):
        load_config(PretrainProxyConfig, None, ["stps=7"])
