"""The community pipeline, loaded as a person loads it: by `custom_pipeline`."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline

import rpo.shapes
from rpo.curation.records import Critique, Fault, Instructions, Problem
from rpo.models.checkpoint import Checkpoint
from rpo.process.transition import Ddim
from rpo.sampling.sample import image_generator, sample
from rpo.shapes.evaluation import to_pixels

FILE = Path(__file__).parents[2] / "pipelines" / "rich_preference.py"
PROMPTS = ["a red circle", "two blue squares", "a green triangle"]


class Critic:
    """Finds fault with what its caption calls red or blue, and cannot look at what is blue."""

    identity, batch_size, concurrency = {"kind": "test"}, 2, 1

    def __call__(self, images, captions):
        if any("blue" in caption for caption in captions):
            raise RuntimeError("too blue")
        return [
            Critique(problems=(Problem(what="too red", severity=2),) if "red" in caption else (), overall=5)
            for caption in captions
        ]


class Instructor:
    identity, batch_size, concurrency = {"kind": "test"}, 4, 1

    def __call__(self, images, captions, critiques):
        return [Instructions(instructions=tuple(one.what for one in critique.problems)) for critique in critiques]


class Editor:
    """Turns images upside down."""

    identity, batch_size, concurrency, licence = {"kind": "test"}, 4, 1, "MIT"

    def __call__(self, images, instructions, seeds):
        self.heard = [*zip(instructions, seeds, strict=True)]
        return [image.rotate(180) for image in images]


@pytest.fixture(scope="module")
def pipe() -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(
        str(rpo.shapes.path()),
        custom_pipeline=str(FILE),
        trust_remote_code=True,
        critic=Critic(),
        instructor=Instructor(),
        editor=Editor(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_prompt_becomes_image_critique_instructions_and_edited_image(pipe):
    output = pipe(PROMPTS, num_inference_steps=2)
    assert [image.size for image in output.images] == [(64, 64)] * 3
    red, blue, green = output.critiques
    assert red.problems[0].what == "too red" and green.nothing_to_fix
    assert blue == Fault("raised", "RuntimeError: too blue")
    assert output.instructions == [Instructions(instructions=("too red",)), None, None]
    assert output.edited_images[1:] == [None, None]
    assert np.array_equal(np.asarray(output.edited_images[0]), np.asarray(output.images[0].rotate(180)))
    ((text, edit_seed),) = pipe.editor.heard
    again = pipe(PROMPTS[0], num_inference_steps=2, return_dict=False)
    assert text == "too red" and pipe.editor.heard == [(text, edit_seed)]
    assert np.abs(np.asarray(again[0][0], int) - np.asarray(output.images[0], int)).max() <= 1


def test_it_draws_what_the_sampler_draws(pipe):
    model = Checkpoint.load("shapes")
    generators = [image_generator(7, k, 0) for k in range(2)]
    cond, grid = model.encode_prompts(PROMPTS[:2]), model.grid(3)
    x_0 = sample(model, cond, grid, Ddim(0.0), guidance_scale=2.0, generators=generators).x_0
    images = pipe(PROMPTS[:2], num_inference_steps=3, guidance_scale=2.0, seed=7).images
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), to_pixels(model.decode(x_0).detach()))
