"""The making of the token generator: tokens decode as they should, masks are what they say, the loss is of those."""

import json
import math

import pytest
import torch
from diffusers import AmusedPipeline, AutoencoderKL
from safetensors.torch import load_file
from torch.nn import functional

from rpo import shapes
from rpo.config.load import load_config
from rpo.shapes.world import training_scenes
from scripts.shapes.networks import (
    build_projected_text_encoder,
    build_token_denoiser,
    build_tokenizer,
    seeded,
    world_words,
)
from scripts.shapes.pretrain_tokens import (
    MICRO_CONDITIONS,
    Captioned,
    Masked,
    PretrainTokensConfig,
    Told,
    captioned_tokens,
    draw_masks,
    masked_loss,
    pretrain_tokens,
)
from scripts.shapes.vae import channels_first, decode, encode
from scripts.shapes.vq import decode_tokens, encode_tokens, kmeans, make_vq


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(str(shapes.path()), subfolder="vae").requires_grad_(False)


@pytest.fixture(scope="module")
def scenes():
    return channels_first(training_scenes(3, 48)[0])


@pytest.fixture(scope="module")
def vq(vae, scenes):
    return make_vq(vae, scenes, torch.Generator().manual_seed(0))


def test_its_latents_are_the_autoencoders_means(vae, vq, scenes):
    found = vq.encode(scenes[:4].float() / 255).latents
    wanted = encode(vae, scenes[:4], scale=1.0).mean
    # Not exactly: beyond the edge the convolutions see black for one and grey for the other.
    assert (found - wanted).abs().mean() < 0.05 * wanted.std()


def test_it_decodes_latents_as_the_autoencoder_does(vae, vq, scenes):
    mean = encode(vae, scenes[:4], scale=1.0).mean
    found = vq.decode(mean, force_not_quantize=False).sample.clamp(0, 1)
    codes = vq.quantize.embedding.weight[torch.cdist(mean.movedim(1, -1), vq.quantize.embedding.weight).argmin(-1)]
    wanted = decode(vae, codes.movedim(-1, 1) * vae.config.scaling_factor)
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=0)


def test_tokens_decode_to_what_the_vq_model_itself_makes_of_the_images(vq, scenes):
    tokens = encode_tokens(vq, scenes[:4])
    assert tokens.shape == (4, 8, 8) and tokens.dtype == torch.int64
    with torch.no_grad():
        wanted = vq(scenes[:4].float() / 255).sample.clamp(0, 1)
    torch.testing.assert_close(decode_tokens(vq, tokens), wanted)


def test_kmeans_finds_separate_clusters():
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centers[:, None] + 0.1 * torch.randn(3, 50, 2, generator=generator)).flatten(0, 1)
    found = kmeans(points, 3, generator)
    assert torch.cdist(centers, found).amin(1).max() < 0.1


def test_the_share_of_masked_tokens_is_a_cosine():
    masked = draw_masks(torch.Size((4000, 8, 8)), torch.Generator().manual_seed(0)).flatten(1).sum(1)
    assert masked.min() >= 1 and masked.max() <= 64
    assert masked.float().mean().item() / 64 == pytest.approx(2 / math.pi, abs=0.02)
    assert (masked > 32).float().mean().item() == pytest.approx(2 / 3, abs=0.03)  # cos(pi u / 2) > 1/2 for u < 2/3


def test_the_loss_is_the_mean_over_masked_tokens_of_a_network_that_does_not_see_them():
    transformer = seeded(0, build_token_denoiser)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (2, 8, 8), generator=generator)
    is_masked = draw_masks(tokens.shape, generator)
    told = Told(torch.randn(2, 16, 96, generator=generator), torch.randn(2, 96, generator=generator))
    with torch.no_grad():
        loss = masked_loss(transformer, Masked(tokens, is_masked, told))
        seen = torch.where(is_masked, 256, tokens)
        logits = transformer(seen, told.states, told.pooled, torch.tensor([MICRO_CONDITIONS] * 2))
        surprise = -functional.log_softmax(logits, 1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(loss, surprise[is_masked].mean())


def test_every_image_keeps_its_caption_but_one_in_ten():
    told = Told(torch.arange(4.0).view(4, 1, 1), torch.arange(4.0).view(4, 1))
    tokens = torch.arange(3).view(3, 1, 1).expand(3, 2, 2)
    captioned = Captioned(tokens, told, torch.tensor([2, 0, 1]))
    batch = captioned.draw(torch.Generator().manual_seed(0), 4000)
    row = batch.told.pooled[:, 0]
    assert torch.equal(row, batch.told.states[:, 0, 0])
    assert (row == 3).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(row[row < 3].long(), torch.tensor([2, 0, 1])[batch.tokens[:, 0, 0]][row < 3])


def test_the_transformer_is_told_what_the_pipeline_tells_it(tmp_path):
    tokenizer, text_encoder = build_tokenizer(tmp_path, world_words()), build_projected_text_encoder()
    captions = ["two green squares", "a red circle", "two green squares"]
    captioned = captioned_tokens(torch.zeros(3, 8, 8, dtype=torch.long), captions, tokenizer, text_encoder)
    assert captioned.caption.tolist() == [1, 0, 1]
    pipe, heard = AmusedPipeline.from_pretrained(shapes.tokens_path()), {}

    def listen(_, **told):
        heard.update(told)
        raise InterruptedError

    pipe.transformer.forward = listen
    with pytest.raises(InterruptedError):
        pipe(["a red circle", "two green squares"], guidance_scale=2.0)
    rows = [2, 2, 0, 1]  # the empty prompt is the last
    torch.testing.assert_close(heard["encoder_hidden_states"], captioned.told.states[rows])
    torch.testing.assert_close(heard["pooled_text_emb"], captioned.told.pooled[rows])
    assert heard["micro_conds"].tolist() == [list(MICRO_CONDITIONS)] * 4


@pytest.mark.slow
def test_the_script_makes_a_checkpoint_goes_on_and_refuses_other_data(tmp_path, monkeypatch):
    sizes = {"pretrain_tokens.BATCH": 4, "evaluate.HELD_OUT_SCENES": 16, "vq.KMEANS_ROUNDS": 1}
    for name, size in sizes.items():
        monkeypatch.setattr(f"scripts.shapes.{name}", size)
    words = ["device=cpu", "scenes=48", "denoiser.warmup_updates=0"]
    words += [f"output={tmp_path}", "denoiser.progress=false"]

    def config(*more):
        return load_config(PretrainTokensConfig, None, [*words, *more])

    pretrain_tokens(config("denoiser.updates=1", "evaluate=4"))
    folder = tmp_path / "checkpoint"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert set(evaluation["accuracy"]) == {"train", "in_domain", "out_of_domain"}
    assert evaluation["vqvae"]["verified"] == 1.0
    pipe = AmusedPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (64, 64)
    stored = {file.parent.name: load_file(file) for file in folder.rglob("*.safetensors")}
    assert set(stored) == {"text_encoder", "transformer", "vqvae"}
    assert {value.dtype for part in stored.values() for value in part.values()} == {torch.float16}
    own = {f"text_model.{name.removeprefix('text_model.')}": name for name in pipe.text_encoder.state_dict()}
    assert set(stored["text_encoder"]) == {name.replace("text_model.text_proj", "text_proj") for name in own}
    pretrain_tokens(config("denoiser.updates=2", "evaluate=0"))
    assert (tmp_path / "denoiser/checkpoint-000002").is_dir()
    assert not (folder / "evaluation.json").exists()  # the numbers of the replaced weights went with them
    with pytest.raises(ValueError, match="scenes"):
        pretrain_tokens(config("scenes=47"))
