import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from rpo.shapes.edit_world import EditTask, draw_triple, triples
from rpo.shapes.edits import parse_edits
from rpo.shapes.networks import build_scheduler
from rpo.shapes.pretrain_denoiser import TextToLatent
from rpo.shapes.pretrain_editor import SNR_LIMIT, PretrainEditorConfig, instructed_loss, pretrain_editor
from rpo.shapes.pretrain_editor_data import (
    NEITHER_RATE,
    NO_IMAGE_RATE,
    NO_TEXT_RATE,
    Instructed,
    disturbed,
    draw_batch,
    draw_instructed,
)
from rpo.shapes.pretrain_editor_evaluate import editor_table
from rpo.shapes.pretrain_editor_networks import (
    MAX_TOKENS,
    assemble_editor,
    build_editor_tokenizer,
    extend_text_encoder,
    load_base,
    widen_unet,
)
from rpo.shapes.pretrain_vae import Moments
from rpo.shapes.world import render


@pytest.fixture(scope="module")
def base():
    return load_base()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return build_editor_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def text_encoder(base, tokenizer):
    return extend_text_encoder(base.text_encoder, base.tokenizer, tokenizer)


@pytest.fixture(scope="module")
def instructed(base, tokenizer) -> Instructed:
    return draw_instructed(base.vae, tokenizer, 12, seed=0)


def test_every_word_of_an_instruction_is_one_token_and_it_fits(tokenizer) -> None:
    stream = triples(0)
    for instruction in (next(stream).instruction for _ in range(100)):
        words = instruction.replace(";", " ;").split()
        assert tokenizer.tokenize(instruction) == [f"{word}</w>" for word in words]
        assert len(tokenizer(instruction).input_ids) <= MAX_TOKENS


def test_untrained_it_denoises_as_the_base_does_whatever_the_source(base) -> None:
    unet = widen_unet(base.unet)
    generator = torch.Generator().manual_seed(0)
    x_t, source = torch.randn(2, 2, 4, 8, 8, generator=generator)
    timestep, states = torch.tensor([10, 900]), torch.randn(2, 16, 96, generator=generator)
    with torch.no_grad():
        expected = base.unet(x_t, timestep, states).sample
        torch.testing.assert_close(unet(torch.cat([x_t, source], 1), timestep, states).sample, expected)


def test_the_text_encoder_keeps_what_it_knows(base, tokenizer, text_encoder) -> None:
    text = "a red circle to the left of a blue square"
    old = base.tokenizer([text], padding="max_length", return_tensors="pt").input_ids
    new = tokenizer([text], padding="max_length", return_tensors="pt").input_ids
    length = len(base.tokenizer(text).input_ids)
    with torch.no_grad():
        expected = base.text_encoder(old)[0][:, :length]
        torch.testing.assert_close(text_encoder(new)[0][:, :length], expected)
    assert text_encoder.config.max_position_embeddings == MAX_TOKENS


def test_training_sees_the_source_as_the_pipeline_gives_it(base, tokenizer, text_encoder, instructed) -> None:
    pipe = assemble_editor(base.vae, widen_unet(base.unet), text_encoder, tokenizer)
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


def test_the_stated_shares_go_without_source_or_instruction() -> None:
    ones = torch.ones(4, 4, 8, 8)
    data = Instructed(
        ones, Moments(ones, ones), torch.ones(4, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    )
    batch = draw_batch(data, build_scheduler().alphas_cumprod, 40_000, torch.Generator().manual_seed(0))
    has_image = batch.inputs[:, 4:].flatten(1).all(1)
    has_text = batch.token_ids.all(1)
    shares = [(~has_image & has_text), (has_image & ~has_text), (~has_image & ~has_text)]
    for share, rate in zip(shares, (NO_IMAGE_RATE, NO_TEXT_RATE, NEITHER_RATE), strict=True):
        assert share.float().mean().item() == pytest.approx(rate, abs=0.005)
    assert set(batch.inputs[:, 4:].unique().tolist()) == {0.0, 1.0}


def test_the_loss_is_weighted_by_the_limited_ratio(base, text_encoder, instructed) -> None:
    alphas = build_scheduler().alphas_cumprod
    networks = TextToLatent(widen_unet(base.unet), text_encoder)
    batch = draw_batch(instructed, alphas, 6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        eps_hat = networks.unet(batch.inputs, batch.timestep, text_encoder(batch.token_ids)[0]).sample
        error = (eps_hat - batch.eps).square().mean((1, 2, 3))
        snr = alphas[batch.timestep] / (1 - alphas[batch.timestep])
        expected = (error * torch.minimum(snr, torch.tensor(SNR_LIMIT)) / snr).mean()
        torch.testing.assert_close(instructed_loss(networks, batch, alphas), expected)


def test_a_run_writes_a_stock_pipeline_continues_and_refuses_other_settings(tmp_path: Path) -> None:
    def config(steps: int, **changes) -> PretrainEditorConfig:
        small = {"triples": 8, "batch_size": 2, "evaluate": 0, "save_every": 2, "device": "cpu"}
        folders = {"out": tmp_path / "out", "state": tmp_path / "state"}
        return PretrainEditorConfig(steps=steps, **(small | folders | changes))

    pretrain_editor(config(2))
    evaluation = pretrain_editor(config(3, evaluate=8))
    lines = [json.loads(line) for line in (tmp_path / "state" / "log.jsonl").read_text().splitlines()]
    assert [line["resumed_at"] for line in lines if "resumed_at" in line] == [2]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == evaluation
    assert "known_sentences: " in editor_table(evaluation)
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    source = Image.fromarray(render(draw_triple("add", np.random.default_rng(0)).source))
    assert pipe("add a red circle", image=source, num_inference_steps=1).images[0].size == (64, 64)
    with pytest.raises(ValueError, match="holds a run with other settings .batch_size: 2 -> 3"):
        pretrain_editor(config(3, batch_size=3))
    undisturbed = tmp_path / "undisturbed"
    pretrain_editor(config(3, state=undisturbed, save_every=1))
    one, other = (
        torch.load(folder / "editor.pt", weights_only=True)["state"]["average_unet"]
        for folder in (tmp_path / "state", undisturbed)
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("task", ["add", "move", "repair"])
def test_tasks_have_their_kind(task: EditTask) -> None:
    (edit,) = parse_edits(draw_triple(task, np.random.default_rng(1)).instruction)
    assert edit.kind == {"repair": "change"}.get(task, task)
