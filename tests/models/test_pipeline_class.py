import json

import pytest
import torch

from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.models.families.stable_diffusion import StableDiffusion
from rpo.models.unloaded import unloaded_pipeline
from tests.tiny import save_tiny_sd


def test_a_class_that_this_diffusers_lacks_is_said(tmp_path, monkeypatch):
    folder = save_tiny_sd(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FarAheadPipeline"}))
    monkeypatch.setattr(StableDiffusion, "pipelines", ("FarAheadPipeline",))
    for load in (Checkpoint.load, lambda place: unloaded_pipeline(place, dtype=torch.float32)):
        with pytest.raises(InputError, match=r"diffusers \d.* has no FarAheadPipeline.*install -U"):
            load(folder)
