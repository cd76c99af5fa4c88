"""The checkpoint's making: every word is one token, batches are what they say, a kill changes nothing."""

import json
from functools import partial

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from rpo.config.load import load_config
from rpo.shapes.prompts import prompts
from rpo.shapes.world import training_scenes
from rpo.training.loop import LoopConfig
from scripts.shapes.networks import MAX_TOKENS, build_scheduler, build_tokenizer, build_vae, seeded, world_words
from scripts.shapes.pretrain import Captioned, PretrainConfig, pretrain
from scripts.shapes.training import noisy, train
from scripts.shapes.vae import Moments, channels_first, psnr, vae_loss


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"), world_words())


@pytest.fixture
def captioned():
    mean = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(12 * MAX_TOKENS).view(12, MAX_TOKENS) + 1
    return Captioned(Moments(mean, torch.full_like(mean, 0.1)), ids, torch.zeros(1, MAX_TOKENS, dtype=torch.long))


def test_every_word_of_the_world_is_one_token_and_every_prompt_fits(tokenizer):
    for prompt in [*prompts("train"), *prompts("in_domain"), *prompts("out_of_domain")]:
        assert tokenizer.tokenize(prompt.text) == [f"{word}</w>" for word in prompt.text.split()]
        assert len(tokenizer(prompt.text).input_ids) <= MAX_TOKENS


def test_other_text_is_spelled_in_bytes_and_comes_back(tokenizer):
    ids = tokenizer("zyx 7 é").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "zyx 7 é"


def test_merges_of_one_word_leave_the_others_whole(tmp_path):
    # "re" of "red" also occurs inside "green" and "three", and "tree" begins like "trees".
    words = ["red", "green", "three", "tree", "trees", "e"]
    tokenizer = build_tokenizer(tmp_path, words)
    assert [tokenizer.tokenize(word) for word in words] == [[f"{word}</w>"] for word in words]


def test_vae_loss_is_reconstruction_plus_weighted_kl():
    vae, scenes = seeded(0, build_vae), channels_first(training_scenes(0, 2)[0])
    images, noise = scenes.float() / 127.5 - 1, torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.mean + posterior.std * noise).sample - images
        expected = error.abs().mean() + (error**2).mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        assert vae_loss(vae, scenes, noise).item() == pytest.approx(expected.item(), rel=1e-5)


def test_psnr_of_a_constant_error_of_one_tenth_is_twenty():
    images = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    assert psnr(images, torch.full((2, 3, 4, 4), 0.3)) == pytest.approx(20, abs=1e-4)


def test_noisy_latents_are_alpha_x0_plus_sigma_eps():
    x_0 = torch.full((8, 4, 8, 8), 2.0)
    batch = noisy(x_0, torch.zeros(8, 3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch.inputs, build_scheduler().add_noise(x_0, batch.eps, batch.timestep))


def test_latents_have_the_posteriors_spread(captioned):
    picked = torch.zeros(400, dtype=torch.long)
    drawn = captioned.moments.draw(picked, torch.Generator().manual_seed(0)) - captioned.moments.mean[0]
    assert drawn.std().item() == pytest.approx(0.1, rel=0.02)


def test_one_caption_in_ten_is_emptied(captioned):
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([captioned.draw(generator).token_ids for _ in range(80)])
    assert (ids == 0).all(dim=1).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert all((row == captioned.token_ids).all(dim=1).any() for row in ids[(ids > 0).all(dim=1)][:50])


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_killed_training_ends_with_the_same_weights(tmp_path, ema_decay):
    def weights(folder, dies_at=None):
        network = seeded(0, partial(torch.nn.Linear, 3, 2))

        def loss_of(batch):
            if counted.append(1) or len(counted) == dies_at:
                raise KeyboardInterrupt
            return network(batch).square().mean()

        counted, loop = [], LoopConfig(6, 1e-2, checkpoint_every=2, ema_decay=ema_decay, progress=False)
        draw = lambda generator: torch.randn(4, 3, generator=generator)  # noqa: E731
        train(folder / "toy", network, draw, loss_of, loop, data="toy", seed=3)
        return network.weight

    undisturbed = weights(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "b", dies_at=4)
    assert torch.equal(weights(tmp_path / "b"), undisturbed)
    assert torch.equal(undisturbed, undisturbed.half().float()) and not undisturbed.requires_grad


@pytest.mark.slow
def test_the_script_makes_a_checkpoint_goes_on_and_refuses_other_data(tmp_path, monkeypatch):
    for name, size in {"vae.BATCH": 4, "pretrain.BATCH": 4, "evaluate.HELD_OUT_SCENES": 16}.items():
        monkeypatch.setattr(f"scripts.shapes.{name}", size)
    words = ["device=cpu", "scenes=48", "vae.updates=2", "vae.warmup_updates=0", "denoiser.warmup_updates=0"]
    words += [f"output={tmp_path}", "vae.progress=false", "denoiser.progress=false"]

    def config(*more):
        return load_config(PretrainConfig, None, [*words, *more])

    before = torch.get_rng_state()
    pretrain(config("denoiser.updates=1", "evaluate=4"))
    assert torch.equal(before, torch.get_rng_state())
    folder = tmp_path / "checkpoint"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert set(evaluation["accuracy"]) == {"train", "in_domain", "out_of_domain"}
    assert evaluation["vae"]["verified"] == 1.0
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (64, 64)
    stored = load_file(folder / "text_encoder/model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert all(name.startswith("text_model.") for name in stored)
    pretrain(config("denoiser.updates=2", "evaluate=0"))
    assert (tmp_path / "denoiser/checkpoint-000002").is_dir()
    assert not (folder / "evaluation.json").exists()  # the numbers of the replaced weights went with them
    with pytest.raises(ValueError, match="scenes"):
        pretrain(config("scenes=47"))
