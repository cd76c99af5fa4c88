import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from rpo import words as world
from rpo.data.pixels import to_pixels
from rpo.evaluation.held_out import Sampling
from rpo.models.checkpoint import Checkpoint
from rpo.models.packaged import expression_of, folder_of, imports_of
from rpo.rewards import load_reward
from rpo.words.prompts import held_out_texts, prompt_of, sample_words
from rpo.words.world import HEIGHT, WIDTH
from scripts.words.evaluate import vae_quality

WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.fixture(scope="module")
def model():
    return Checkpoint.load("words")


def test_its_weights_are_half_precision_and_small():
    for name in WEIGHTS:
        assert {tensor.dtype for tensor in load_file(world.path() / name).values()} == {torch.float16}
    sizes = [file.stat().st_size for file in world.path().rglob("*") if file.is_file()]
    assert sum(sizes) <= 14e6


def test_its_name_stands_for_its_folder():
    assert folder_of("words") == world.path()
    assert (expression_of("words"), imports_of("words")) == ("rpo.words.path()", ("import rpo.words",))
    assert (expression_of("owner/words"), imports_of("owner/words")) == ("", ())


def test_one_token_stands_for_each_letter(model):
    for word in sample_words("train", 30, seed=0):
        tokens = model.pipe.tokenizer.tokenize(prompt_of(word))
        quoted = [*word[:-1].lower(), word[-1].lower() + "</w>"]
        assert tokens == ["the</w>", "word</w>", '"</w>', *quoted, '"</w>']
        assert len(tokens) + 2 <= model.pipe.tokenizer.model_max_length


def test_stock_diffusers_draws_the_same_words(model):
    pipe = StableDiffusionPipeline.from_pretrained(world.path())
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is DDIMScheduler
    prompts = [prompt_of(word) for word in sample_words("train", 3, seed=1)]
    x_t = torch.randn(3, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    stock = pipe(prompts, latents=x_t, num_inference_steps=4, guidance_scale=2.0, output_type="pt").images
    again = model.pipe
    again.set_progress_bar_config(disable=True)
    ours = again(prompts, latents=x_t, num_inference_steps=4, guidance_scale=2.0, output_type="pt").images
    assert stock.shape == (3, 3, HEIGHT, WIDTH)
    torch.testing.assert_close(ours, stock)
    by_name = Sampling(0, num_steps=4, guidance_scale=2.0).draw(model, prompts)
    by_folder = Sampling(0, num_steps=4, guidance_scale=2.0).draw(Checkpoint(pipe), prompts)
    assert torch.equal(by_name, by_folder) and by_name.shape == stock.shape


def test_its_autoencoder_keeps_words(model):
    assert vae_quality(model.pipe.vae, 64, seed=987_654_321)["judged_after_round_trip"] >= 0.97


def test_it_follows_prompts_and_leaves_room(model):
    prompts = held_out_texts(96, seed=1)["in_domain"]
    sampling = Sampling(1, num_steps=world.NUM_STEPS, guidance_scale=world.GUIDANCE_SCALE, eta=world.ETA)
    images = sampling.draw(model, prompts, batch_size=96)
    # 25 % to 60 % is asked of the true accuracy; 96 images know it to within about 10 points.
    assert 0.15 <= load_reward("words-judge")(images, prompts).mean() <= 0.70
    assert len({image.tobytes() for image in np.asarray(to_pixels(images))}) == len(prompts)


def test_its_card_tells_the_accuracy_that_was_asked_for():
    evaluation = json.loads((world.path() / "evaluation.json").read_text("utf-8"))
    assert 0.25 <= evaluation["accuracy"]["in_domain"][f"guidance {world.GUIDANCE_SCALE:g}"] <= 0.60
    sampler = (evaluation["num_steps"], evaluation["eta"], evaluation["guidance_scale"])
    assert sampler == (world.NUM_STEPS, world.ETA, world.GUIDANCE_SCALE)


def test_missing_weights_are_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(world, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match=r"lacks model_index.json, unet/.*install rpo again, or train it with"):
        world.path()
