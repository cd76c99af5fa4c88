"""A run from a file: `run` and `rpo train dpo`, from a checkpoint and pairs on disk to a LoRA that loads."""

import math

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.cli.main import main
from rpo.config import load_config
from rpo.data.writers import write_pairs
from rpo.models.config import ModelConfig, load_model
from rpo.runs.dpo import DataConfig, RunConfig, run
from rpo.trainers.dpo import DPOTrainer
from rpo.trainers.dpo_config import DPOConfig
from rpo.training.log import read_metrics
from rpo.training.loop import LoopConfig
from tests.tiny import save_tiny_sd
from tests.trainers.test_dpo import toy_pairs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    save_tiny_sd(root / "model", "v_prediction")
    write_pairs(root / "pairs", toy_pairs())
    return root


def lora(folder):
    return load_file(folder / WEIGHT_FILE)


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def run_config(inputs, output, updates):
    loop = LoopConfig(updates=updates, learning_rate=1e-2, progress=False)
    return RunConfig(
        model=ModelConfig(source=str(inputs / "model"), device="cpu"),
        data=DataConfig(source=str(inputs / "pairs"), limit=6),
        dpo=DPOConfig(pairs_per_update=4, micro_batch=2, rank=4, max_chosen_error_ratio=math.inf, loop=loop),
        output=str(output),
    )


def test_a_run_of_a_v_prediction_folder_resumes_and_can_be_read_back(inputs, tmp_path):
    whole = run(run_config(inputs, tmp_path / "whole", 3))
    assert whole.trained.updates == 3
    assert whole.saved == tmp_path / "whole" / "lora"
    assert read_metrics(tmp_path / "whole")[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    started = run(run_config(inputs, tmp_path / "parts", 2))
    before = lora(started.saved)
    resumed = run(run_config(inputs, tmp_path / "parts", 3), resume=True)
    assert resumed.trained.updates == 3
    assert equal(lora(resumed.saved), lora(whole.saved))
    assert not equal(before, lora(whole.saved))
    assert [line["update"] for line in read_metrics(tmp_path / "parts")] == [1, 2, 3]
    # The settings lie beside the result, and are those of the same run.
    again = load_config(RunConfig, tmp_path / "whole" / "run.yaml", [f"output={tmp_path / 'again'}"])
    assert again == run_config(inputs, tmp_path / "again", 3)
    assert equal(lora(run(again).saved), lora(whole.saved))


@pytest.fixture
def words(inputs, tmp_path):
    """`rpo train dpo` on a file that says how to train, with the rest on the command line."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {device: cpu}\n"
        "dpo:\n"
        "  {pairs_per_update: 4, micro_batch: 4, rank: 4, max_chosen_error_ratio: .inf,\n"
        "   loop: {updates: 3, learning_rate: 0.01, progress: false}}\n"
    )
    return ["train", "dpo", str(file), f"model.source={inputs / 'model'}", f"output={tmp_path / 'out'}"]


def test_the_command_trains_to_a_lora_that_stock_diffusers_loads(inputs, words, tmp_path, capfd):
    data = f"data.source={inputs / 'pairs'}"
    assert main([*words, data, "dpo.loop.updates=2"]) == 0
    settings = (tmp_path / "out" / "run.yaml").read_text()
    capfd.readouterr()
    assert main([*words, data, "data.limit=1"]) == 2
    assert f"{tmp_path / 'out'} already holds a run" in capfd.readouterr().err
    assert (tmp_path / "out" / "run.yaml").read_text() == settings  # of the run that is there
    assert main([*words, data, "--resume"]) == 0
    assert [line["update"] for line in read_metrics(tmp_path / "out")] == [1, 2, 3]
    pipe = StableDiffusionPipeline.from_pretrained(inputs / "model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    before = pipe("prompt 0", generator=torch.Generator().manual_seed(0), **arguments).images
    pipe.load_lora_weights(str(tmp_path / "out" / "lora"))
    after = pipe("prompt 0", generator=torch.Generator().manual_seed(0), **arguments).images
    assert (after - before).abs().max() > 1e-4


def test_mistakes_are_one_line_and_exit_2(inputs, words, tmp_path, capfd):
    data = f"data.source={inputs / 'pairs'}"
    cases = [
        ([data, "dpo.lop.updates=3"], ["dpo.lop", "dpo.loop"]),
        ([data, "dpo.loop.update=3"], ["dpo.loop.update", "dpo.loop.updates"]),
        ([data, "dpo.beta=-1"], ["sets 'dpo.beta' to -1", "a number above 0"]),
        ([], ["data.source is empty", "data.source=PATH"]),
        ([f"data.source={tmp_path / 'nowhere'}"], [str(tmp_path / "nowhere")]),
        ([data, f"model.source={tmp_path / 'nowhere'}"], [f"'{tmp_path / 'nowhere'}' is neither a folder"]),
    ]
    for more, expected in cases:
        assert main([*words, *more]) == 2
        seen = capfd.readouterr()
        lines = [line for line in seen.err.splitlines() if line.startswith("rpo: ")]
        assert len(lines) == 1, seen.err
        assert "Traceback" not in seen.err
        for part in expected:
            assert part in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_before_anything_is_encoded(inputs, tmp_path):
    run(run_config(inputs, tmp_path, 1))
    trainer = DPOTrainer(
        load_model(ModelConfig(str(inputs / "model"), device="cpu")), toy_pairs(3), DPOConfig(folder=str(tmp_path))
    )
    with pytest.raises(ValueError, match="already holds a run; expected a new folder"):
        trainer.train()
    assert trainer.batches.latents.encoded == 0
