"""The words checkpoint's making: networks of the sizes that are said, and a whole run that is only small."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from rpo.config.load import load_config
from rpo.words.prompts import prompt_of
from rpo.words.world import HEIGHT, WIDTH, training_images
from scripts.shapes.networks import build_tokenizer, seeded
from scripts.shapes.vae import channels_first, vae_loss
from scripts.words.networks import KNOWN, LATENT_CHANNELS, MAX_TOKENS, build_text_to_latent, build_vae
from scripts.words.pretrain import WordsConfig, pretrain


def test_posteriors_begin_narrow():
    images = channels_first(training_images(0, 4, mistakes=0.0)[0]).float() / 127.5 - 1
    posterior = seeded(0, build_vae).encode(images).latent_dist
    assert posterior.mean.shape == (4, LATENT_CHANNELS, HEIGHT // 4, WIDTH // 4)
    assert 0.05 < posterior.std.mean() < 0.3


def test_its_loss_is_squared_error_alone_beside_the_kl():
    vae, images = seeded(0, build_vae), channels_first(training_images(0, 2, mistakes=0.0)[0])
    noise = torch.zeros(2, LATENT_CHANNELS, HEIGHT // 4, WIDTH // 4)
    with torch.no_grad():
        wanted = images.float() / 127.5 - 1
        l1 = (vae.decode(vae.encode(wanted).latent_dist.mean).sample - wanted).abs().mean()
        both, one = vae_loss(vae, images, noise), vae_loss(vae, images, noise, l1_weight=0.0)
    assert (both - one).item() == pytest.approx(l1.item(), rel=1e-4)


def test_the_networks_take_a_prompt_of_five_letters(tmp_path):
    tokenizer = build_tokenizer(tmp_path, KNOWN, MAX_TOKENS)
    ids = tokenizer(prompt_of("TALIN"), padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, MAX_TOKENS)
    networks = build_text_to_latent(tokenizer)
    latents = torch.zeros(1, LATENT_CHANNELS, HEIGHT // 4, WIDTH // 4)
    assert networks(latents, torch.tensor([5]), ids).shape == latents.shape


def test_a_small_run_ends_in_a_folder_that_stock_diffusers_draws_with(tmp_path):
    words = [f"output={tmp_path}", "images=32", "evaluate=0", "device=cpu"]
    for part in ("vae", "denoiser"):
        words += [f"{part}.updates=2", f"{part}.warmup_updates=0", f"{part}.progress=false"]
    pretrain(load_config(WordsConfig, None, words))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "checkpoint")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(prompt_of("CAT"), num_inference_steps=1).images[0]
    assert image.size == (WIDTH, HEIGHT)
