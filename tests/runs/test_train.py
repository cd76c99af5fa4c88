"""A run from a file, by every algorithm: from a checkpoint and data on disk to a LoRA that loads, and a report."""

from dataclasses import fields

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from rpo.adapters.loading import load_model
from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.cli.main import main
from rpo.config.load import load_config
from rpo.data.writers import write_pairs
from rpo.errors import InputError
from rpo.evaluation.held_out import HeldOutConfig
from rpo.models.config import ModelConfig
from rpo.runs.train import run
from rpo.runs.train_config import DataConfig, DPORunConfig, GRPORunConfig
from rpo.trainers.dpo import DPO
from rpo.trainers.trainer import Trainer
from rpo.training.log import read_metrics
from tests.marks import slow_but
from tests.tiny import save_tiny_sd
from tests.trainers.online_runs import settings
from tests.trainers.pair_runs import config, toy_pairs

ONLINE = {
    "rewards": "{jpeg-compressibility: 1.0}",
    "rollout": "{prompts: 2, images_per_prompt: 2, num_steps: 3, guidance_scale: 2.0}",
}
VALUE = {"value": "{pretrain_rollouts: 1, updates: 2}"}
ALGORITHMS = {
    "dpo": {"pairs_per_update": 4, "max_chosen_error_ratio": ".inf", "max_rejected_error_ratio": ".inf"},
    "grpo": ONLINE,
    "score-as-action": ONLINE | VALUE,
    "endpoint": ONLINE | VALUE,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    for prediction_type in ("epsilon", "v_prediction"):
        save_tiny_sd(root / prediction_type, prediction_type)
    write_pairs(root / "pairs", toy_pairs())
    (root / "prompts.txt").write_text("a red circle\n\n  two dogs \na house\n")
    return root


def words(algorithm, inputs, prediction_type, output):
    """The command, with a file that says how to train and the rest as words."""
    file = output.parent / "run.yaml"
    own = "".join(f"{key}: {value}\n" for key, value in ALGORITHMS[algorithm].items())
    file.write_text(
        f"model: {{device: cpu}}\nadapter: {{rank: 4}}\npreview_every: 1\n{own}"
        "learning: {updates: 3, learning_rate: 0.01, micro_batch: 4, progress: false}\n"
    )
    data = f"data.source={inputs / 'pairs'}" if algorithm == "dpo" else f"prompts={inputs / 'prompts.txt'}"
    return ["train", algorithm, str(file), data, f"model.source={inputs / prediction_type}", f"output={output}"]


def lora(folder):
    return load_file(folder / "lora" / WEIGHT_FILE)


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("prediction_type", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", slow_but(("dpo", "score-as-action"), ALGORITHMS))
def test_the_command_trains_resumes_and_reports(algorithm, prediction_type, inputs, tmp_path, capfd):
    given = words(algorithm, inputs, prediction_type, tmp_path / "out")
    assert main([*given, "learning.updates=2"]) == 0
    before, written = lora(tmp_path / "out"), (tmp_path / "out/run.yaml").read_text()
    capfd.readouterr()
    assert main([*given, "seed=7"]) == 2
    assert f"{tmp_path / 'out'} already holds a run" in capfd.readouterr().err
    assert (tmp_path / "out/run.yaml").read_text() == written  # of the run that is there
    assert main([*given, "--resume"]) == 0
    assert [line["update"] for line in read_metrics(tmp_path / "out")] == [1, 2, 3]
    page = (tmp_path / "out/report.html").read_text()
    for title in ("Images on the way", "Use the LoRA", "Settings and environment", "update 0", "update 3"):
        assert title in page
    assert ("Reward against KL" in page) == (algorithm != "dpo")
    assert ("Quality of the value" in page) == (algorithm == "score-as-action")
    assert "The result" not in page  # nobody judged
    # Whatever the number of sessions, the result is the same.
    whole = [word if not word.startswith("output=") else f"output={tmp_path / 'whole'}" for word in given]
    assert main([*whole, "report=false"]) == 0
    assert not (tmp_path / "whole/report.html").exists()
    assert equal(lora(tmp_path / "out"), lora(tmp_path / "whole"))
    assert not equal(before, lora(tmp_path / "whole"))


def test_stock_diffusers_loads_what_the_command_saved(inputs, tmp_path):
    assert main([*words("dpo", inputs, "epsilon", tmp_path / "out"), "preview_every=0"]) == 0
    pipe = StableDiffusionPipeline.from_pretrained(inputs / "epsilon", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    before = pipe("prompt 0", generator=torch.Generator().manual_seed(0), **arguments).images
    pipe.load_lora_weights(str(tmp_path / "out/lora"))
    after = pipe("prompt 0", generator=torch.Generator().manual_seed(0), **arguments).images
    assert (after - before).abs().max() > 1e-4


def test_the_settings_beside_a_run_are_those_of_the_same_run(inputs, tmp_path):
    given = GRPORunConfig(
        model=ModelConfig(str(inputs / "epsilon"), device="cpu"),
        prompts=str(inputs / "prompts.txt"),
        rewards={"jpeg-compressibility": 1.0, "tests.trainers.online_runs:lightness": -0.5},
        report=False,
        **settings(tmp_path / "out"),
    )
    result = run(given)
    assert (result.report, result.aligned) == (None, None)
    assert result.saved == tmp_path / "out/lora"
    again = load_config(GRPORunConfig, tmp_path / "out/run.yaml", [f"output={tmp_path / 'again'}"])
    run(again)
    assert equal(lora(tmp_path / "again"), lora(tmp_path / "out"))
    line = read_metrics(tmp_path / "out")[0]
    parts = line["reward/jpeg-compressibility"], line["reward/tests.trainers.online_runs:lightness"]
    assert line["reward/mean"] == pytest.approx(parts[0] - 0.5 * parts[1], rel=1e-5)


SMALL_HELD_OUT = "held_out={prompts: shapes, count: 4, num_steps: 3, guidance_scale: 2.0}"


@pytest.mark.parametrize("algorithm", slow_but(("grpo",), ("dpo", "grpo")))
def test_base_and_aligned_model_are_judged_on_held_out_prompts(algorithm, inputs, tmp_path, capfd):
    given = words(algorithm, inputs, "epsilon", tmp_path / "out")
    shapes = ["model.source=shapes", "learning.updates=1", "preflight=false", "preview_every=0", SMALL_HELD_OUT]
    assert main([*given, *shapes]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "In-domain prompts" in page and "Out-of-domain prompts" in page and "rpo shapes evaluate --lora" in page


def test_the_base_that_is_judged_is_what_was_loaded(inputs, tmp_path):
    own = config(tmp_path / "out", updates=2, learning={"learning_rate": 0.05})
    shown = {one.name: getattr(own, one.name) for one in fields(own)}
    held_out = HeldOutConfig(prompts="shapes", count=4, num_steps=3, guidance_scale=2.0)
    given = {"data": DataConfig(str(inputs / "pairs")), "model": ModelConfig(device="cpu"), "held_out": held_out}
    result = run(DPORunConfig(**given, **shown))
    assert result.base is not None and result.aligned is not None
    assert len(result.base.texts) == len(result.aligned.texts) == 8
    assert result.base.sampling == result.aligned.sampling
    assert (result.base.images != result.aligned.images).any()


MISTAKES = {
    "dpo": [
        (["learing.updates=3"], ["learing", "learning"]),
        (["learning.update=3"], ["learning.update", "learning.updates"]),
        (["objective.beta=-1"], ["objective.beta", "-1", "above 0"]),
        (["dpo.rank=3"], ["dpo.rank", "stands at the top"]),
        (["rank=3"], ["adapter.rank"]),
        (["loop.updates=3"], ["it is learning now"]),
        (['data.source=""'], ["data.source is empty", "data.source=PATH"]),
        (["data.source=/nowhere"], ["/nowhere"]),
        (["model.source=/nowhere"], ["'/nowhere' is neither a folder"]),
    ],
    "grpo": [
        (["roll=3"], ["roll", "rollout"]),
        (["learning.window=[0,1]"], ["it is steps.window now"]),
        (["evaluate_images=3"], ["held_out.count"]),
        (["objective.beta=3"], ["objective"]),  # of another algorithm
        (["rollout.eta=0"], ["rollout.solver is ddim with eta 0", "score-as-action with estimator: pathwise"]),
        (["prompts=/nowhere.txt"], ["nowhere.txt", "name such a file"]),
        (["prompts=shapes:test"], ["the splits of shapes are train, in_domain, out_of_domain"]),
        # Before a weight is read, let alone looked for.
        (
            ["rewards={jpeg-compresibility: 1.0}", "model.source=/nowhere"],
            ["there is no reward 'jpeg-compresibility'", "the nearest is 'jpeg-compressibility'"],
        ),
        (["monitor.held_out=[ocs]", "model.source=/nowhere"], ["there is no reward 'ocs'"]),
        (
            ["monitor.held_out=[jpeg-compressibility]", "model.source=/nowhere"],
            ["monitor.held_out names jpeg-compressibility, which is trained on"],
        ),
        (["rewards={jpeg-compressibility: .nan}"], ["rewards", "nan"]),
    ],
}


@pytest.mark.parametrize("algorithm", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(algorithm, inputs, tmp_path, capfd):
    given = words(algorithm, inputs, "epsilon", tmp_path / "out")
    for more, expected in MISTAKES[algorithm]:
        assert main([*given, *more]) == 2
        seen = capfd.readouterr()
        lines = [line for line in seen.err.splitlines() if line.startswith("rpo: ")]
        assert len(lines) == 1, seen.err
        assert "Traceback" not in seen.err
        for part in expected:
            assert part in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_refused_resume_leaves_the_settings_of_the_run(inputs, tmp_path, capfd):
    given = words("grpo", inputs, "epsilon", tmp_path / "out")
    assert main([*given, "learning.updates=1", "preflight=false"]) == 0
    before = (tmp_path / "out/run.yaml").read_bytes()
    assert main([*given, "--resume", "rollout.num_steps=4", "preflight=false"]) == 2
    assert "rollout.num_steps" in capfd.readouterr().err
    assert (tmp_path / "out/run.yaml").read_bytes() == before


def test_faulty_records_are_skipped_where_the_file_says_so(inputs, tmp_path, capfd):
    write_pairs(tmp_path / "pairs", toy_pairs(4))
    with (tmp_path / "pairs/metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write("{torn\n")
    given = [*words("dpo", inputs, "epsilon", tmp_path / "out"), f"data.source={tmp_path / 'pairs'}"]
    assert main(given) == 2
    assert "metadata.jsonl:5: not JSON" in capfd.readouterr().err
    assert main([*given, "data.skip_faulty=true", "learning.updates=1", "preflight=false"]) == 0


def test_held_out_prompts_must_not_be_trained_on(inputs, tmp_path, capfd):
    given = words("grpo", inputs, "epsilon", tmp_path / "out")
    assert main([*given, f"held_out={{prompts: {inputs / 'prompts.txt'}, reward: jpeg-compressibility}}"]) == 2
    assert "3 of the held-out prompts are trained on" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_before_anything_is_encoded(inputs, tmp_path):
    model = ModelConfig(str(inputs / "epsilon"), device="cpu")
    Trainer(load_model(model), DPO(toy_pairs(), config(tmp_path, updates=1))).train()
    trainer = Trainer(load_model(model), DPO(toy_pairs(3), config(tmp_path)))
    encoded = []
    trainer.algorithm.prepare = lambda: encoded.append(1)
    with pytest.raises(ValueError, match="already holds a run; expected a new folder"):
        trainer.train()
    assert encoded == []


@pytest.mark.parametrize("changes", [{"num_steps": 4}, {"guidance_scale": 1.0}, {}])
@pytest.mark.parametrize("model", [{"allow_distilled": True}, {"assistant": "undo.safetensors"}])
def test_a_distilled_checkpoint_is_judged_by_the_steps_of_its_deployment(model, changes, tmp_path):
    config = DPORunConfig(
        output=str(tmp_path / "run"),
        model=ModelConfig(**model),
        held_out=HeldOutConfig(**changes),
        data=DataConfig("x"),
    )
    with pytest.raises(InputError, match=r"held_out\.(num_steps|guidance_scale).* distilled"):
        run(config)
    assert not (tmp_path / "run").exists()
