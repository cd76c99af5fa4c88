"""The model layer against the pipeline it is a view of, and what it refuses."""

import json
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import rpo.shapes
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.process.transition import Ddim
from rpo.sampling.sample import image_generator, sample
from rpo.types import Conditioning
from tests.tiny import save_tiny_sd, tiny_sd, tiny_sdxl

PROMPTS = ["a red circle", "", "a very " + "long " * 90 + "prompt", "a red circle"]


def pipeline_latents(pipe, prompts, **kwargs):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompts, output_type="latent", **kwargs).images


def our_latents(model, prompts, generators, *, num_steps, guidance_scale, negative_prompt=""):
    cond = model.encode_prompts(prompts, negative_prompt=negative_prompt)
    kernel = Ddim(eta=0.0)
    return sample(model, cond, model.grid(num_steps), kernel, guidance_scale=guidance_scale, generators=generators).x_0


def generators(count):
    return [image_generator(7, index, 0) for index in range(count)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("num_steps", [5, 7])
def test_sampling_ends_where_the_pipeline_ends(prediction_type, guidance_scale, num_steps):
    pipe = tiny_sd(prediction_type)
    ours = our_latents(Checkpoint(pipe), PROMPTS, generators(4), num_steps=num_steps, guidance_scale=guidance_scale)
    theirs = pipeline_latents(
        pipe, PROMPTS, generator=generators(4), num_inference_steps=num_steps, guidance_scale=guidance_scale
    )
    assert (ours - theirs).abs().max() < 1e-4


def test_negative_prompts_behave_as_in_the_pipeline():
    pipe = tiny_sd()
    ours = our_latents(
        Checkpoint(pipe), PROMPTS, generators(4), num_steps=4, guidance_scale=4.0, negative_prompt="blue"
    )
    theirs = pipeline_latents(
        pipe,
        PROMPTS,
        negative_prompt=["blue"] * 4,
        generator=generators(4),
        num_inference_steps=4,
        guidance_scale=4.0,
    )
    assert (ours - theirs).abs().max() < 1e-4
    without = our_latents(Checkpoint(pipe), PROMPTS, generators(4), num_steps=4, guidance_scale=4.0)
    assert (ours - without).abs().max() > 1e-3


def test_each_row_is_guided_away_from_its_own_negative():
    model = Checkpoint(tiny_sd())
    texts = model.encode_prompts(["a red circle", "two dogs", "blue", "a house"]).tokens
    x_t, timestep = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 700])
    prompt, negative = (
        model.predict(x_t, timestep, Conditioning({"tokens": some}, {"tokens": some}))
        for some in (texts[:2], texts[2:])
    )
    found = model.predict(x_t, timestep, Conditioning({"tokens": texts[:2]}, {"tokens": texts[2:]}), 3.0)
    assert torch.allclose(found, negative + 3 * (prompt - negative), atol=1e-5)


def test_sampling_on_shapes_ends_where_the_pipeline_ends():
    pipe = StableDiffusionPipeline.from_pretrained(rpo.shapes.path())
    prompts = ["a red circle", "three green triangles", "a red circle above a blue square"]
    ours = our_latents(Checkpoint(pipe), prompts, generators(3), num_steps=20, guidance_scale=3.0)
    theirs = pipeline_latents(pipe, prompts, generator=generators(3), num_inference_steps=20, guidance_scale=3.0)
    assert (ours - theirs).abs().max() < 1e-4


def test_decode_equals_the_pipeline_s_images():
    pipe = tiny_sd()
    model = Checkpoint(pipe)
    ours = model.decode(our_latents(model, PROMPTS, generators(4), num_steps=3, guidance_scale=2.0))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(PROMPTS, output_type="pt", generator=generators(4), num_inference_steps=3, guidance_scale=2.0).images
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_distinct_prompt_is_encoded_once():
    model = Checkpoint(tiny_sd())
    rows = []
    model.text_encoders["text_encoder"].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    cond = model.encode_prompts(["a", "b", "a", "", "a"])
    assert sum(rows) == 3  # "a", "b" and the empty prompt, which is also the negative one
    assert torch.equal(cond.tokens[0], cond.tokens[2])
    assert torch.equal(cond.tokens[3], cond.negative["tokens"][0])


def test_scheduler_configured_for_another_class_is_understood():
    pipe = tiny_sd()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    model = Checkpoint(pipe)
    assert model.scheduler_config["clip_sample"] is False
    assert model.grid(5).timestep.tolist() == Checkpoint(tiny_sd()).grid(5).timestep.tolist()


def test_moments_are_the_vae_s_scaled_posterior():
    model = Checkpoint(tiny_sd())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = model.encode_moments(images)
    posterior = model.vae.encode(2 * images - 1).latent_dist
    assert torch.equal(mean, posterior.mean * model.vae.config.scaling_factor)
    assert torch.equal(std, posterior.std * model.vae.config.scaling_factor)


def test_networks_come_frozen_and_in_evaluation_mode():
    model = Checkpoint(tiny_sd())
    for network in (model.denoiser, model.vae, model.text_encoders["text_encoder"]):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_half_precision_computes_in_half_and_answers_in_float32():
    model = Checkpoint(tiny_sd(dtype=torch.bfloat16))
    x_t = torch.randn(2, *model.latent_shape())
    noise_pred = model.predict(x_t, torch.tensor([10, 500]), model.encode_prompts(["a", "b"]), 2.0)
    assert model.compute_dtype == torch.bfloat16
    assert noise_pred.dtype == torch.float32
    mixed = Checkpoint(tiny_sd(), compute_dtype=torch.bfloat16)
    close = mixed.predict(x_t, torch.tensor([10, 500]), mixed.encode_prompts(["a", "b"]), 2.0)
    assert (close - noise_pred).abs().max() < 0.1 * noise_pred.abs().max()


def test_fingerprints_change_with_what_determines_the_output_and_with_nothing_else():
    first, same, other = Checkpoint(tiny_sd()), Checkpoint(tiny_sd()), Checkpoint(tiny_sd(seed=1))
    for part in ("denoiser", "vae", "text"):
        assert first.fingerprint(part) == same.fingerprint(part)
        assert first.fingerprint(part) != other.fingerprint(part)
    same.vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    assert first.fingerprint("vae") != same.fingerprint("vae")
    same.pipe.tokenizer.model_max_length = 40
    assert first.fingerprint("text") != same.fingerprint("text")
    half = Checkpoint(tiny_sd(), compute_dtype=torch.bfloat16)
    assert first.fingerprint("denoiser") != half.fingerprint("denoiser")  # the same weights say something else


def test_a_folder_loads_without_its_safety_checker(tmp_path):
    folder = save_tiny_sd(tmp_path / "folder")
    model = Checkpoint.load(folder)
    assert model.fingerprint("denoiser") == Checkpoint(tiny_sd()).fingerprint("denoiser")
    assert model.pipe.safety_checker is None


def test_loading_passes_the_type_to_every_network(tmp_path):
    model = Checkpoint.load(save_tiny_sd(tmp_path), dtype=torch.bfloat16)
    assert {model.denoiser.dtype, model.vae.dtype, model.text_encoders["text_encoder"].dtype} == {torch.bfloat16}


def test_xformers_degrades_to_sdpa_with_one_clear_line(tmp_path):
    folder = save_tiny_sd(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Checkpoint.load(folder, attention="xformers")
    lines = [str(one.message) for one in caught if "xformers" in str(one.message)]
    assert len(lines) == 1
    assert "using torch's SDPA" in lines[0]
    assert model.predict(torch.zeros(1, 4, 8, 8), torch.tensor([5]), model.encode_prompts(["a"])).isfinite().all()


def test_compilation_keeps_names(tmp_path):
    folder = save_tiny_sd(tmp_path)
    plain, compiled = Checkpoint.load(folder), Checkpoint.load(folder, compile_denoiser=True)
    assert list(compiled.denoiser.state_dict()) == list(plain.denoiser.state_dict())


# What is refused at the door, each with one clear error naming the item.


@pytest.mark.parametrize(("in_channels", "kind"), [(9, "an inpainting UNet"), (8, "an instruct-pix2pix UNet")])
def test_other_unets_are_refused(in_channels, kind):
    with pytest.raises(ValueError, match=f"the UNet takes {in_channels} channels: {kind}.*takes 4"):
        Checkpoint(tiny_sd(in_channels=in_channels))


def test_a_unet_of_another_family_is_refused():
    pipe = tiny_sd()
    pipe.unet = tiny_sdxl().unet
    with pytest.raises(InputError, match="addition_embed_type='text_time'"):
        Checkpoint(pipe)


def test_a_missing_component_is_named(tmp_path):
    save_tiny_sd(tmp_path)
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="lacks its component vae/"):
        Checkpoint.load(tmp_path)
    pipe = tiny_sd()
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="the pipeline has no text_encoder"):
        Checkpoint(pipe)


def test_truncated_weights_are_named_with_both_sizes(tmp_path):
    save_tiny_sd(tmp_path)
    file = next((tmp_path / "unet").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(
        ValueError,
        match=rf"unet.*{len(whole) - 1000} bytes. is no whole safetensors file",
    ):
        Checkpoint.load(tmp_path)
    file.write_bytes(b"\x10")
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        Checkpoint.load(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="unet.*holds no weights"):
        Checkpoint.load(tmp_path)


def test_missing_tensors_are_an_error_not_random_weights(tmp_path):
    save_tiny_sd(tmp_path)
    file = next((tmp_path / "unet").glob("*.safetensors"))
    weights = load_file(file)
    weights.pop("conv_out.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unet.*lacks 1 tensor.*conv_out\.weight"):
        Checkpoint.load(tmp_path)


@pytest.mark.parametrize("source", ["no/such/folder", "nothing here"])
def test_a_source_that_is_nothing_is_refused(source):
    with pytest.raises(ValueError, match="is neither a folder, a file nor a hub id"):
        Checkpoint.load(source)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        Checkpoint.load(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(ValueError, match=r"is a \.txt file, but a checkpoint is \.safetensors or \.ckpt"):
        Checkpoint.load(tmp_path / "file.txt")


def test_an_unknown_prediction_type_is_refused():
    pipe = tiny_sd()
    pipe.scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="prediction_type='flow_prediction'"):
        Checkpoint(pipe)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 64, 64), 255.0), r"images span \[255, 255\], but \[0, 1\] is needed"),
        (torch.full((1, 3, 64, 64), -1.0), r"images span \[-1, -1\]"),
        (torch.full((1, 3, 64, 64), torch.nan), r"images span \[nan, nan\]"),
        (torch.zeros(1, 1, 64, 64), r"images have shape \(1, 1, 64, 64\)"),
        (torch.zeros(1, 3, 60, 64), "images are 60x64, but the sides must divide by 8"),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        Checkpoint(tiny_sd()).encode_moments(images)


@pytest.mark.parametrize("prompts", [[], "a string", ["a", None]])
def test_wrong_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="a non-empty list of strings is needed"):
        Checkpoint(tiny_sd()).encode_prompts(prompts)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_too_many_or_no_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}, but this checkpoint has 1000 timesteps"):
        Checkpoint(tiny_sd()).grid(num_steps)


def test_guidance_below_one_is_refused():
    model = Checkpoint(tiny_sd())
    with pytest.raises(ValueError, match="guidance_scale is 0.5, but it must be >= 1"):
        model.predict(torch.zeros(1, 4, 8, 8), torch.tensor([5]), model.encode_prompts(["a"]), 0.5)


@pytest.mark.parametrize(
    "name",
    [
        "PixArtAlphaPipeline",
        "KolorsPipeline",
        "CogView4Pipeline",
        "HunyuanDiTPipeline",
        "StableDiffusionInpaintPipeline",
    ],
)
def test_a_folder_of_another_family_is_named_before_its_components_are_missed(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(InputError, match=rf"is a {name}, but .*StableDiffusionXLPipeline"):
        Checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["sdxl-turbo", "SDXL-Lightning", "LCM_Dreamshaper_v7", "sd-3.5-large-turbo"])
def test_a_distilled_checkpoint_is_refused_by_its_name(tmp_path, name):
    with pytest.raises(InputError, match="distilled"):
        Checkpoint.load(save_tiny_sd(tmp_path / name))
    pipe = tiny_sd()
    pipe.register_to_config(_name_or_path=f"someone/{name}")
    with pytest.raises(InputError, match="distilled"):
        Checkpoint(pipe)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"unet": ["diffusers", "UNet2DConditionModel"]}'])
def test_an_index_that_names_no_class_is_refused(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match=r"no readable model_index\.json that names its class"):
        Checkpoint.load(tmp_path)
