"""What every test shares: no network, one thread, tiny pipelines."""

import gc
import os
import signal
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny import tiny_sd

torch.set_num_threads(1)
if threading.current_thread() is threading.main_thread():
    # A shell's background job, or `nohup`, ignores these, and so would every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_pipeline() -> Callable[..., StableDiffusionPipeline]:
    """Builds a fresh tiny Stable Diffusion pipeline at every call; see `tests.tiny.tiny_sd` for its options."""
    return tiny_sd


def pytest_collection_finish() -> None:
    """Look no more for garbage among what was imported: a tenth of the time of the tests went into that."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
