"""The editor's making: it starts as the base, learns from what the pipeline will give it, and is a stock pipeline."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from PIL import Image

from rpo.config.load import load_config
from rpo.shapes import path
from rpo.shapes.edits import edit_words, parse_edits
from rpo.shapes.world import render
from scripts.shapes.edit_world import EditTask, draw_triple, triples
from scripts.shapes.networks import TextToLatent, assemble, build_scheduler, build_tokenizer, world_words
from scripts.shapes.pretrain_editor import (
    MAX_TOKENS,
    NEITHER_RATE,
    NO_IMAGE_RATE,
    NO_TEXT_RATE,
    SNR_LIMIT,
    Instructed,
    PretrainEditorConfig,
    disturbed,
    draw_instructed,
    extend_text_encoder,
    pretrain_editor,
    widen_unet,
)
from scripts.shapes.training import denoising_loss
from scripts.shapes.vae import Moments


@pytest.fixture(scope="module")
def base():
    return StableDiffusionPipeline.from_pretrained(path())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"), world_words() | edit_words(), MAX_TOKENS)


@pytest.fixture(scope="module")
def networks(base, tokenizer):
    return TextToLatent(widen_unet(base.unet), extend_text_encoder(base.text_encoder, base.tokenizer, tokenizer))


@pytest.fixture(scope="module")
def instructed(base, tokenizer):
    return draw_instructed(base.vae, tokenizer, 12, seed=0)


def test_every_word_of_an_instruction_is_one_token_and_it_fits(tokenizer):
    stream = triples(0)
    for instruction in (next(stream).instruction for _ in range(100)):
        words = instruction.replace(";", " ;").split()
        assert tokenizer.tokenize(instruction) == [f"{word}</w>" for word in words]
        assert len(tokenizer(instruction).input_ids) <= MAX_TOKENS


def test_untrained_it_denoises_as_the_base_does_whatever_the_source(base, networks):
    generator = torch.Generator().manual_seed(0)
    x_t, source = torch.randn(2, 2, 4, 8, 8, generator=generator)
    timestep, states = torch.tensor([10, 900]), torch.randn(2, 16, 96, generator=generator)
    with torch.no_grad():
        expected = base.unet(x_t, timestep, states).sample
        torch.testing.assert_close(networks.unet(torch.cat([x_t, source], 1), timestep, states).sample, expected)


def test_the_text_encoder_keeps_what_it_knows(base, tokenizer, networks):
    text = "a red circle to the left of a blue square"
    old = base.tokenizer([text], padding="max_length", return_tensors="pt").input_ids
    new = tokenizer([text], padding="max_length", return_tensors="pt").input_ids
    length = len(base.tokenizer(text).input_ids)
    with torch.no_grad():
        expected = base.text_encoder(old)[0][:, :length]
        torch.testing.assert_close(networks.text_encoder(new)[0][:, :length], expected)


def test_training_sees_the_source_as_the_pipeline_gives_it(base, tokenizer, networks, instructed):
    pipe = assemble(StableDiffusionInstructPix2PixPipeline, base.vae, networks, tokenizer)
    stream = triples(0)
    drawn = [next(stream) for _ in range(12)]
    image = pipe.image_processor.preprocess([Image.fromarray(render(triple.source)) for triple in drawn])
    latents = pipe.prepare_image_latents(image, 12, 1, torch.float32, torch.device("cpu"), False)
    torch.testing.assert_close(instructed.source[1::2], latents[1::2], atol=1e-4, rtol=1e-4)
    scale = base.vae.config.scaling_factor
    off = (instructed.source[::2] - latents[::2]).mul(scale).std().item()
    assert 0.01 < off < 0.5  # every other one passed through a disturbed latent, and is still the same scene
    again = disturbed(base.vae, latents[::2] * scale, torch.Generator().manual_seed(1))
    assert again.shape == latents[::2].shape


def test_the_stated_shares_go_without_source_or_instruction():
    ones, ids = torch.ones(4, 4, 8, 8), torch.ones(4, 3, dtype=torch.long)
    batch = Instructed(ones, Moments(ones, ones), ids, 0 * ids[:1]).draw(torch.Generator().manual_seed(0), 40_000)
    has_image = batch.inputs[:, 4:].flatten(1).all(1)
    has_text = batch.token_ids.all(1)
    shares = [(~has_image & has_text), (has_image & ~has_text), (~has_image & ~has_text)]
    for share, rate in zip(shares, (NO_IMAGE_RATE, NO_TEXT_RATE, NEITHER_RATE), strict=True):
        assert share.float().mean().item() == pytest.approx(rate, abs=0.005)
    assert set(batch.inputs[:, 4:].unique().tolist()) == {0.0, 1.0}


def test_the_loss_is_weighted_by_the_limited_ratio(networks, instructed):
    batch, alphas = instructed.draw(torch.Generator().manual_seed(0), 6), build_scheduler().alphas_cumprod
    with torch.no_grad():
        eps_hat = networks.unet(batch.inputs, batch.timestep, networks.text_encoder(batch.token_ids)[0]).sample
        error = (eps_hat - batch.eps).square().mean((1, 2, 3))
        snr = alphas[batch.timestep] / (1 - alphas[batch.timestep])
        expected = (error * torch.minimum(snr, torch.tensor(SNR_LIMIT)) / snr).mean()
        torch.testing.assert_close(denoising_loss(networks, batch, snr_limit=SNR_LIMIT), expected)
        torch.testing.assert_close(denoising_loss(networks, batch), error.mean())


@pytest.mark.slow
def test_the_script_makes_a_stock_pipeline_and_goes_on(tmp_path):
    words = ["device=cpu", "triples=8", f"output={tmp_path}", "loop.warmup_updates=0", "loop.progress=false"]
    pretrain_editor(load_config(PretrainEditorConfig, None, [*words, "loop.updates=1", "evaluate=0"]))
    pretrain_editor(load_config(PretrainEditorConfig, None, [*words, "loop.updates=2", "evaluate=4"]))
    folder = tmp_path / "checkpoint"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["known_sentences"]["all"]["cases"] == evaluation["held_out_sentences"]["all"]["cases"] == 4
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    source = Image.fromarray(render(draw_triple("add", np.random.default_rng(0)).source))
    assert pipe("add a red circle", image=source, num_inference_steps=1).images[0].size == (64, 64)


@pytest.mark.parametrize("task", ["add", "move", "repair"])
def test_tasks_have_their_kind(task: EditTask):
    (edit,) = parse_edits(draw_triple(task, np.random.default_rng(1)).instruction)
    assert edit.kind == {"repair": "change"}.get(task, task)
