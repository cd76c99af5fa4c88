"""The model that images are chosen of, and all its candidates."""

import pytest

from rpo.models.checkpoint import Checkpoint
from rpo.sampling.sample import generate
from tests.sampling.choices import PROMPTS, N
from tests.tiny import tiny_sd


@pytest.fixture(scope="package")
def model():
    return Checkpoint(tiny_sd())


@pytest.fixture(scope="package")
def every(model):
    """All candidates as `generate` draws them, [prompts, N, …]."""
    images = generate(model, PROMPTS, seed=3, images_per_prompt=N, num_steps=5, guidance_scale=2.0, eta=1.0)
    return images.unflatten(0, (len(PROMPTS), N))
