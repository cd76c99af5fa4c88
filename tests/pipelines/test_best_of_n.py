"""The community pipeline, loaded as a person loads it: it chooses among what `generate` draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import rpo.shapes
from rpo.data.pixels import to_pixels
from rpo.models.checkpoint import Checkpoint
from rpo.sampling.sample import generate

FILE = Path(__file__).parents[2] / "pipelines" / "best_of_n.py"
PROMPTS = ["a red circle", "two blue squares"]


def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def pipe() -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(
        str(rpo.shapes.path()), custom_pipeline=str(FILE), trust_remote_code=True, reward=redness
    )


def test_it_takes_the_best_of_what_is_drawn(pipe):
    output = pipe(PROMPTS, n=3, num_inference_steps=4, guidance_scale=2.0, seed=5)
    drawn = generate(Checkpoint.load("shapes"), PROMPTS, seed=5, images_per_prompt=3, num_steps=4, guidance_scale=2.0)
    scores = redness(drawn, []).view(2, 3)
    assert output.chosen == scores.argmax(dim=1).tolist()
    best = to_pixels(drawn.unflatten(0, (2, 3))[torch.arange(2), scores.argmax(dim=1)])
    for image, expected in zip(output.images, best, strict=True):
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    assert output.evaluations == 2 * 3 * 4 * 2


def test_drafts_cost_less_and_corrections_are_kept_where_better(pipe):
    edits = torch.zeros(2, 3, *Checkpoint.load("shapes").canvas)
    edits[0, 0] = edits[1, 1] = 1  # as red as can be, and as green
    pipe.correct = lambda images, prompts, number: edits
    try:
        output = pipe(PROMPTS, n=3, draft_steps=2, num_inference_steps=4, guidance_scale=1.0)
    finally:
        pipe.correct = None
    assert output.evaluations == 2 * (3 * 2 + 4)
    assert np.asarray(output.images[0])[0, 0].tolist() == [255, 0, 0] and output.scores[0] == pytest.approx(1)
    assert np.asarray(output.images[1])[0, 0].tolist() != [0, 255, 0]
