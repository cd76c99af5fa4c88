"""How a pipeline is told, in the words of its own call, to draw as rpo does."""

import pytest

from rpo.models.checkpoint import Checkpoint
from rpo.models.usual import call_of
from tests.tiny import tiny_sd
from tests.tiny_flux1 import tiny_flux1
from tests.tiny_qwen_image import tiny_qwen_image


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tiny_sd, {"num_inference_steps": 3, "eta": 1.0, "guidance_scale": 2.0}),
        (tiny_flux1, {"num_inference_steps": 3, "guidance_scale": 2.0}),
        (tiny_qwen_image, {"num_inference_steps": 3, "true_cfg_scale": 2.0, "negative_prompt": ""}),
    ],
)
def test_a_card_calls_a_pipeline_in_its_own_words(make, words):
    model = Checkpoint(make())
    assert call_of(model, num_steps=3, guidance_scale=2.0, eta=1.0) == words
    assert call_of(model, num_steps=None, guidance_scale=None, eta=None) == {}
