"""What every test shares: no network, one thread, tiny pipelines."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny import tiny_sd

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pipeline() -> Callable[..., StableDiffusionPipeline]:
    """Builds a fresh tiny Stable Diffusion pipeline at every call; see `tests.tiny.tiny_sd` for its options."""
    return tiny_sd
