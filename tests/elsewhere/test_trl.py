"""TRL's DDPOTrainer itself, where 0.23.1 is installed: the page's "before" runs, and its numbers are ours.

pip install --no-deps trl==0.23.1
"""

import importlib.metadata

import pytest
import torch
from accelerate import PartialState
from accelerate.tracking import GeneralTracker
from diffusers import StableDiffusionPipeline

import rpo.shapes
from rpo.models.checkpoint import Checkpoint
from rpo.process.prediction import to_x0_eps
from rpo.process.transition import Ddim
from tests.test_docs import PAGES, blocks, quick
from tests.trainers.online_runs import grpo

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LAST = "0.23.1"


@pytest.fixture(scope="module")
def trl():
    """The last release that has the trainer, if it is there."""
    found = pytest.importorskip("trl", reason=f"TRL {LAST} is not installed: pip install --no-deps trl=={LAST}")
    version = importlib.metadata.version("trl")
    if version != LAST:
        pytest.skip(f"TRL {version} has no DDPOTrainer; {LAST} is the last that has: pip install --no-deps trl=={LAST}")
    PartialState()  # without which it cannot warn that a base has no LoRA yet
    return found


class Silent(GeneralTracker):
    """TRL gives its hook a tracker, so that there has to be one."""

    name, requires_logging_directory, main_process_only, tracker = "silent", False, True, None

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **others):
        pass


def smaller(code):
    """TRL's block with less to do, on the embedded checkpoint."""
    changes = {"num_epochs=100": "num_epochs=1", "sample_num_steps=50": "sample_num_steps=3"}
    changes |= {"sample_batch_size=8": "sample_batch_size=2", "num_batches_per_epoch=4": "num_batches_per_epoch=2"}
    changes |= {"train_batch_size=4": "train_batch_size=2", '"CompVis/stable-diffusion-v1-4"': "checkpoint"}
    changes |= {'log_with="tensorboard"': 'log_with=silent, mixed_precision="no"'}
    for before, after in changes.items():
        assert before in code, before
        code = code.replace(before, after)
    return code


def test_the_before_of_the_page_runs_and_its_lora_is_a_start(trl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (before,) = blocks("from_trl.md", "py")
    (shared, *_) = [block for block in blocks("from_trl.md", "python") if block.marker == "run"]
    names: dict = {"checkpoint": str(rpo.shapes.path()), "silent": Silent()}
    exec(quick(shared.text), names)  # noqa: S102
    exec(smaller(before.text), names)  # noqa: S102
    assert (tmp_path / "ddpo/pytorch_lora_weights.safetensors").is_file()
    trainer = grpo(tmp_path / "further", pipe=names["pipeline"].sd_pipeline)
    assert "starts from the LoRA" in trainer.plan()


def test_its_log_probabilities_are_ours_per_dimension(trl):
    from trl.models.modeling_sd_base import scheduler_step

    model = Checkpoint(StableDiffusionPipeline.from_pretrained(rpo.shapes.path()))
    scheduler, steps = model.pipe.scheduler, 20
    scheduler.set_timesteps(steps)
    grid, kernel, generator = model.grid(steps), Ddim(1.0), torch.Generator().manual_seed(0)
    shape = (2, *model.latent_shape())
    for step in range(steps - 1):
        x_t, prediction = (torch.randn(shape, generator=generator) for _ in range(2))
        ours = kernel(*to_x0_eps(prediction, x_t, grid[step], model.prediction_type), grid[step], grid[step + 1])
        x_s = ours.sample(torch.randn(shape, generator=generator))
        timestep = scheduler.timesteps[step].expand(2)
        theirs = scheduler_step(scheduler, prediction, timestep, x_t, eta=1.0, prev_sample=x_s)
        torch.testing.assert_close(ours.log_prob(x_s) / ours.num_dims, theirs.log_probs, rtol=1e-4, atol=1e-4)


def test_every_argument_of_its_settings_is_in_the_table(trl):
    missing = [name for name in trl.DDPOConfig.__dataclass_fields__ if f"`{name}" not in PAGES["from_trl.md"]]
    assert sorted(missing) == [
        "accelerator_kwargs",
        "exp_name",
        "per_prompt_stat_tracking_buffer_size",
        "per_prompt_stat_tracking_min_count",
        "project_kwargs",
        "run_name",
        "tracker_kwargs",
        "tracker_project_name",
    ]
