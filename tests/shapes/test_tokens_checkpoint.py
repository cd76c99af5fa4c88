"""The embedded masked-token generator, as stock diffusers loads and samples it."""

import json
import logging
import warnings

import pytest
import torch
from diffusers import AmusedPipeline, AmusedScheduler
from safetensors.torch import load_file

from rpo import shapes
from rpo.evaluation.held_out import Sampling
from rpo.shapes.evaluate import accuracies, judge_images
from rpo.shapes.prompts import sample_prompts
from rpo.shapes.world import training_scenes
from scripts.shapes.evaluate import reconstruction, token_images
from scripts.shapes.vae import channels_first
from scripts.shapes.vq import decode_tokens, encode_tokens

WEIGHTS = (
    "transformer/diffusion_pytorch_model.safetensors",
    "vqvae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.fixture(scope="module")
def pipe() -> AmusedPipeline:
    return AmusedPipeline.from_pretrained(shapes.tokens_path())


def in_domain_accuracy(pipe: AmusedPipeline, count: int) -> float:
    prompts = {"in_domain": sample_prompts("in_domain", count, seed=1)}
    sampling = Sampling(1, num_steps=shapes.TOKENS_NUM_STEPS, guidance_scale=shapes.TOKENS_GUIDANCE_SCALE)
    images = token_images(pipe, [prompt.text for prompt in prompts["in_domain"]], sampling)
    return accuracies(judge_images(images, prompts, sampling))["in_domain"][0].share.value


def test_it_loads_with_the_path_alone_in_one_dtype_and_complete(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe = AmusedPipeline.from_pretrained(shapes.tokens_path())
    finally:
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line for line in said if "deprecated" not in line] == []  # diffusers says so of every AmusedPipeline
    assert {pipe.transformer.dtype, pipe.vqvae.dtype, pipe.text_encoder.dtype} == {torch.float32}


def test_its_weights_are_half_precision_and_small() -> None:
    for name in WEIGHTS:
        assert {tensor.dtype for tensor in load_file(shapes.tokens_path() / name).values()} == {torch.float16}
    files = [file for file in shapes.tokens_path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20


def test_its_parts_agree_on_grid_codebook_and_mask(pipe: AmusedPipeline) -> None:
    assert type(pipe.scheduler) is AmusedScheduler
    assert pipe.scheduler.config.mask_token_id == pipe.transformer.config.vocab_size - 1
    assert pipe.transformer.config.codebook_size == pipe.vqvae.config.num_vq_embeddings
    assert pipe.scheduler.config.mask_token_id == pipe.transformer.config.codebook_size
    assert pipe.transformer.config.sample_size * pipe.vae_scale_factor == 64
    assert pipe.vqvae.config.lookup_from_codebook


def test_it_reads_prompts_as_the_checkpoint_does(pipe: AmusedPipeline) -> None:
    own = load_file(shapes.tokens_path() / "text_encoder" / "model.safetensors")
    assert torch.equal(own.pop("text_projection.weight"), torch.eye(96, dtype=torch.float16))
    shared = load_file(shapes.path() / "text_encoder" / "model.safetensors")
    assert own.keys() == shared.keys()
    assert all(torch.equal(own[name], shared[name]) for name in own)


@pytest.mark.slow
def test_its_vq_model_keeps_scenes(pipe: AmusedPipeline) -> None:
    images, captions = training_scenes(987_654_321, 256)
    scenes = channels_first(images)
    quality = reconstruction(scenes, captions, decode_tokens(pipe.vqvae, encode_tokens(pipe.vqvae, scenes)))
    assert quality["psnr_db"] >= 29
    assert quality["verified_after_round_trip"] >= 0.96


@pytest.mark.slow
def test_it_follows_prompts_and_leaves_room(pipe: AmusedPipeline) -> None:
    assert 0.25 <= in_domain_accuracy(pipe, 64) <= 0.9  # 64 images know it to within about 13 points


@pytest.mark.slow
def test_its_accuracy_is_what_was_asked_for(pipe: AmusedPipeline) -> None:
    assert 0.40 <= in_domain_accuracy(pipe, 400) <= 0.75


def test_its_card_tells_the_accuracy_that_was_asked_for() -> None:
    evaluation = json.loads((shapes.tokens_path() / "evaluation.json").read_text("utf-8"))
    assert 0.40 <= evaluation["accuracy"]["in_domain"]["all"] <= 0.75
    assert evaluation["vqvae"]["verified_after_round_trip"] >= 0.97
    sampler = (evaluation["num_steps"], evaluation["guidance_scale"])
    assert sampler == (shapes.TOKENS_NUM_STEPS, shapes.TOKENS_GUIDANCE_SCALE)


def test_the_same_seed_gives_the_same_images_and_another_seed_others(pipe: AmusedPipeline) -> None:
    def draw(seed):
        return token_images(pipe, ["a red circle", "two squares"], Sampling(seed, num_steps=2, guidance_scale=2.0))

    first = draw(0)
    assert (first == draw(0)).all()
    assert (first != draw(1)).any()
