import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rpo.adapters.lora import adapter_layers, add_lora, load_lora, lora_parameters, save_lora
from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.data.pixels import to_pixels
from rpo.evaluation.held_out import Measurement, check_comparable, measure
from rpo.models.checkpoint import Checkpoint
from rpo.sampling.sample import generate
from rpo.shapes.evaluate import (
    accuracies,
    comparisons,
    evaluate,
    format_accuracies,
    held_out_prompts,
    judge_images,
    usual_sampling,
)
from rpo.shapes.prompts import HELD_OUT
from rpo.shapes.verifier import verify_all
from rpo.shapes.world import KINDS, draw_scene, prompts, render
from tests.tiny import tiny_sd

SAMPLING = usual_sampling(seed=0, images_per_prompt=2)


def right_images(prompts_by_domain, sampling, seed=0):
    """One image after the other that shows what is asked for."""
    rng = np.random.default_rng(seed)
    every = [prompt for some in prompts_by_domain.values() for prompt in some]
    return np.stack([render(draw_scene(p, rng)) for p in every for _ in range(sampling.images_per_prompt)])


def blank(images, wrong):
    """The same images, with nothing on those at the indices `wrong`."""
    changed = images.copy()
    changed[wrong] = 242
    return changed


@pytest.fixture(scope="module")
def asked():
    return held_out_prompts(8, seed=0)


@pytest.fixture(scope="module")
def images(asked):
    return right_images(asked, SAMPLING)


# prompts


def test_prompts_are_those_that_fine_tuning_never_sees(asked):
    trained = {prompt.text for prompt in prompts("train")}
    for split in HELD_OUT:
        assert {prompt.text for prompt in asked[split]} <= {prompt.text for prompt in prompts(split)} - trained
        assert sorted(prompt.kind for prompt in asked[split]) == sorted([*KINDS, *KINDS])


# judging


def test_images_that_show_what_is_asked_for_hold_and_others_do_not(asked, images):
    right = judge_images(images, asked, SAMPLING)
    assert right.holds.all() and (right.scores == 1).all() and len(right.verdicts) == 32
    wrong = judge_images(blank(images, slice(None)), asked, SAMPLING)
    assert not wrong.holds.any() and (wrong.scores == 0).all()


def test_every_image_is_judged_against_its_own_prompt_and_domain(asked, images):
    wrong = [0, 5, 17, 31]
    judged = judge_images(blank(images, wrong), asked, SAMPLING)
    assert np.flatnonzero(~judged.holds).tolist() == wrong
    assert judged.texts == tuple(p.text for split in HELD_OUT for p in asked[split] for _ in range(2))
    assert judged.domains == ("in_domain",) * 16 + ("out_of_domain",) * 16
    assert judged.where("out_of_domain").tolist() == list(range(16, 32))


def test_accuracies_are_by_domain_and_kind_in_their_usual_order(asked, images):
    wrong = [i for i in range(16) if asked["in_domain"][i // 2].kind == "relation"]
    table = accuracies(judge_images(blank(images, wrong), asked, SAMPLING))
    assert list(table) == list(HELD_OUT)
    assert [row.name for row in table["in_domain"]] == ["all", *KINDS]
    assert [row.share.value for row in table["in_domain"]] == [0.75, 1, 1, 1, 0]
    assert [row.share.value for row in table["out_of_domain"]] == [1, 1, 1, 1, 1]
    assert [row.num_images for row in table["in_domain"]] == [16, 4, 4, 4, 4]
    assert [row.num_prompts for row in table["in_domain"]] == [8, 2, 2, 2, 2]


def test_a_prompt_that_was_drawn_twice_counts_once():
    asked = {"out_of_domain": [p for p in held_out_prompts(32, 0)["out_of_domain"] if p.kind == "single"]}
    judged = judge_images(right_images(asked, SAMPLING), asked, SAMPLING)
    (row, _) = accuracies(judged)["out_of_domain"]
    assert (row.num_images, row.num_prompts) == (16, 3)  # the world has three such prompts


def test_bytes_are_those_of_a_png():
    image = torch.tensor([0.0, 0.5, 1.0, 1.2]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_pixels(image)[0, :, :, 0].tolist() == [[0, 128], [255, 255]]
    assert to_pixels(image).dtype == np.uint8


# comparing


def test_the_gain_is_paired_image_by_image(asked, images):
    before = judge_images(blank(images, [0, 1, 2, 3, 16]), asked, SAMPLING)
    after = judge_images(blank(images, [0, 8, 17]), asked, SAMPLING)
    table = comparisons(before, after)
    total = table["in_domain"][0]
    assert total.gain.value == pytest.approx(2 / 16)
    assert total.before.value == 12 / 16 and total.after.value == 14 / 16
    assert total.outcomes == (3, 1, 11, 1)  # fixed 1 2 3, broken 8, still failing 0
    assert table["out_of_domain"][0].outcomes == (1, 1, 14, 0)
    assert sum(row.num_images for row in table["in_domain"][1:]) == total.num_images == 16


def test_a_model_compared_with_itself_gains_exactly_nothing(asked, images):
    judged = judge_images(blank(images, [0, 7, 20]), asked, SAMPLING)
    for rows in comparisons(judged, judged).values():
        assert all((row.gain.value, row.gain.low, row.gain.high) == (0, 0, 0) for row in rows)


def test_only_the_same_prompts_and_noise_are_compared(asked, images):
    judged = judge_images(images, asked, SAMPLING)
    elsewhere = judge_images(images, asked, usual_sampling(seed=1, images_per_prompt=2))
    with pytest.raises(ValueError, match=r"seed=0.*seed=1.*same noise for both; evaluate both with one Sampling"):
        check_comparable(judged, elsewhere)
    other = held_out_prompts(8, seed=1)
    with pytest.raises(ValueError, match=r"their prompts differ, but a paired gain compares image by image; evaluate"):
        comparisons(judged, judge_images(right_images(other, SAMPLING), other, SAMPLING))


# drawing


@pytest.fixture(scope="module")
def model():
    return Checkpoint(tiny_sd())


FAST = usual_sampling(seed=3, images_per_prompt=2, num_steps=2, guidance_scale=2.0, eta=1.0)


def test_evaluate_judges_what_generate_draws(model):
    asked = held_out_prompts(2, seed=0)
    judged = evaluate(model, asked, FAST)
    texts = [prompt.text for split in HELD_OUT for prompt in asked[split]]
    drawn = generate(model, texts, seed=3, images_per_prompt=2, num_steps=2, guidance_scale=2.0, eta=1.0)
    assert (judged.images == to_pixels(drawn)).all()
    assert list(judged.verdicts) == verify_all(drawn, [text for text in texts for _ in range(2)])
    assert judged.texts == tuple(text for text in texts for _ in range(2))


def test_evaluation_is_repeatable_and_does_not_depend_on_the_batch(model):
    asked = held_out_prompts(2, seed=0)
    first = evaluate(model, asked, FAST)
    assert (evaluate(model, asked, FAST).images == first.images).all()
    small = evaluate(model, asked, FAST, batch_size=3).images
    assert np.abs(small.astype(int) - first.images.astype(int)).max() <= 1


def test_no_prompts(model):
    message = "prompts_by_domain has no prompts (domains: in_domain), but an accuracy needs at least one image; take"
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(model, {"in_domain": []}, FAST)


def test_wrong_number_of_images(asked, images):
    message = (
        "got 31 images for 16 prompts with 2 images each, which makes 32; give the images of exactly these prompts"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        judge_images(images[:-1], asked, SAMPLING)


# with a LoRA


def of(asked):
    """A judge of images of these prompts."""
    return lambda model, name: evaluate(model, asked, FAST)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    model = Checkpoint(tiny_sd())
    add_lora(model.denoiser, rank=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(model.denoiser):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    folder = tmp_path_factory.mktemp("lora")
    save_lora(model, folder)
    return folder, model


def test_a_lora_is_measured_beside_its_base_and_leaves_no_trace(lora):
    folder, trained = lora
    model, asked = Checkpoint(tiny_sd()), held_out_prompts(2, seed=0)
    measured = measure(model, of(asked), lora=folder)
    assert (measured.base.images == evaluate(Checkpoint(tiny_sd()), asked, FAST).images).all()
    assert (measured.aligned.images == evaluate(trained, asked, FAST).images).all()
    assert (measured.aligned.images != measured.base.images).any()
    assert (measure(model, of(asked)).base.images == measured.base.images).all()


def test_a_lora_of_another_model_is_refused_before_anything_is_drawn(lora):
    other = Checkpoint(tiny_sd(channels=(32, 64)))
    with pytest.raises(
        ValueError, match=r"adapts 32 layers of unet, of which this checkpoint has 0 in that size; expe"
    ):
        measure(other, of(held_out_prompts(2, seed=0)), lora=lora[0])


def test_a_lora_half_of_whose_layers_are_another_network_s_is_refused(lora, tmp_path):
    file = next(lora[0].glob("*.safetensors"))
    renamed = {name.replace("mid_block.", "down_blocks.7."): tensor for name, tensor in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(renamed, tmp_path / WEIGHT_FILE, metadata=metadata)
    model = Checkpoint(tiny_sd())
    with pytest.raises(ValueError, match=r"adapts 32 layers of unet, of which this checkpoint has 24 in that size"):
        load_lora(model, tmp_path)
    assert not adapter_layers(model.denoiser)


def test_a_lora_that_is_not_there(model, tmp_path):
    with pytest.raises(ValueError, match="there is no LoRA at"):
        measure(model, of(held_out_prompts(2, seed=0)), lora=tmp_path / "nowhere")


# the terminal


def test_the_table_of_one_model(asked, images):
    judged = judge_images(blank(images, [0, 1]), asked, SAMPLING)
    lines = format_accuracies(Measurement(judged)).splitlines()
    assert lines[0].split() == ["images", "prompts", "verified", "accuracy", "[95", "%", "interval]"]
    assert lines[2] == "in-domain"
    assert re.fullmatch(r"  all +16 +8   87\.5 % \[\d\d\.\d, \d\d\.\d\]", lines[3])
    assert [line.split()[0] for line in lines[4:8]] == list(KINDS)
    assert lines[9] == "out-of-domain"
    assert re.fullmatch(r"  all +16 +8   100\.0 % \[\d\d\.\d, 100\.0\]", lines[10])
    assert len(lines) == 15


def test_the_table_of_two_models_marks_what_is_clear(asked, images):
    before = judge_images(blank(images, range(16)), asked, SAMPLING)
    after = judge_images(blank(images, [16]), asked, SAMPLING)
    text = format_accuracies(Measurement(before, after))
    (gained,) = [line for line in text.split("\n") if line.startswith("  all") and "+100.0 points" in line]
    assert gained.endswith("+100.0 points [+100.0, +100.0] *")
    (unclear,) = [line for line in text.split("\n") if line.startswith("  all") and "-6.2 points" in line]
    assert not unclear.endswith("*")
    assert text.endswith("* clear of zero")
