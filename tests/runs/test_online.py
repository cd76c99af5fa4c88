"""Online runs from a file: `run` and `rpo train …`, from a checkpoint, prompts and rewards to a LoRA and a report."""

import pytest
import torch
from safetensors.torch import load_file

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.cli.main import main
from rpo.config import load_config
from rpo.models.config import ModelConfig
from rpo.runs import grpo as grpo_run
from rpo.runs import score_as_action as score_as_action_run
from rpo.runs.online import sampling_of
from rpo.shapes.evaluate import usual_sampling
from rpo.trainers.grpo_config import GRPOConfig
from rpo.training.log import read_metrics
from tests.tiny import save_tiny_sd
from tests.trainers.online_runs import grpo, settings

COMMANDS = {"grpo": "grpo", "score-as-action": "score_as_action"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    for prediction_type in ("epsilon", "v_prediction"):
        save_tiny_sd(root / prediction_type, prediction_type)
    (root / "prompts.txt").write_text("a red circle\n\n  two dogs \na house\n")
    return root


def words(command, inputs, prediction_type, output):
    key = COMMANDS[command]
    file = output.parent / "run.yaml"
    file.write_text(
        f"model: {{device: cpu}}\nrewards: {{jpeg-compressibility: 1.0}}\nprompts: {inputs / 'prompts.txt'}\n"
        f"{key}:\n  rollout: {{prompts: 2, images_per_prompt: 2, num_steps: 3, guidance_scale: 2.0}}\n"
        "  adapter: {rank: 4}\n  preview_every: 1\n  loop: {learning_rate: 0.01, progress: false, updates: 3}\n"
    )
    value = ["value.channels=8", "value.pretrain_rollouts=1", "value.pretrain_updates=2", "value.updates=2"]
    more = [f"{key}.{word}" for word in value] if command == "score-as-action" else []
    return ["train", command, str(file), f"model.source={inputs / prediction_type}", f"output={output}", *more]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_trains_resumes_and_reports(command, prediction_type, inputs, tmp_path, capfd):
    given = words(command, inputs, prediction_type, tmp_path / "out")
    assert main([*given, f"{COMMANDS[command]}.loop.updates=2"]) == 0
    assert main([*given]) == 2
    assert f"{tmp_path / 'out'} already holds a run" in capfd.readouterr().err
    assert main([*given, "--resume"]) == 0
    assert [line["update"] for line in read_metrics(tmp_path / "out")] == [1, 2, 3]
    page = (tmp_path / "out" / "report.html").read_text()
    for title in ("Reward against KL", "Images on the way", "Use the LoRA", "Settings and environment"):
        assert title in page
    assert ("Quality of the value" in page) == (command == "score-as-action")
    assert "In-domain prompts" not in page  # there is no verifier for what this model draws
    assert "update 0" in page and "update 3" in page
    # Whatever the number of sessions, the result is the same.
    whole = [word if not word.startswith("output=") else f"output={tmp_path / 'whole'}" for word in given]
    assert main([*whole, "report=false"]) == 0
    assert not (tmp_path / "whole" / "report.html").exists()
    parts, one = (load_file(tmp_path / name / "lora" / WEIGHT_FILE) for name in ("out", "whole"))
    assert parts.keys() == one.keys() and all(torch.equal(parts[name], one[name]) for name in one)


def test_the_settings_beside_a_run_are_those_of_the_same_run(inputs, tmp_path):
    config = grpo_run.RunConfig(
        model=ModelConfig(str(inputs / "epsilon"), device="cpu"),
        prompts=str(inputs / "prompts.txt"),
        rewards={"jpeg-compressibility": 1.0, "tests.trainers.online_runs:lightness": -0.5},
        grpo=GRPOConfig(**settings("unused")),
        report=False,
        output=str(tmp_path / "out"),
    )
    result = grpo_run.run(config)
    assert (result.report, result.measured) == (None, None)
    assert result.saved == tmp_path / "out" / "lora"
    assert load_config(grpo_run.RunConfig, tmp_path / "out" / "run.yaml") == config
    line = read_metrics(tmp_path / "out")[0]
    parts = line["reward/jpeg-compressibility"], line["reward/tests.trainers.online_runs:lightness"]
    assert line["reward/mean"] == pytest.approx(parts[0] - 0.5 * parts[1], rel=1e-5)


def test_a_run_of_shapes_reports_verified_accuracy(tmp_path):
    config = load_config(
        score_as_action_run.RunConfig,
        None,
        [
            f"output={tmp_path}",
            "model.device=cpu",
            "evaluate_images=4",
            "score_as_action.rollout={prompts: 2, images_per_prompt: 2, num_steps: 2, guidance_scale: 1.0}",
            "score_as_action.value={channels: 8, pretrain_rollouts: 0, updates: 1}",
            "score_as_action.preflight=false",
            "score_as_action.loop={updates: 1, progress: false}",
        ],
    )
    result = score_as_action_run.run(config)
    measured = result.measured
    assert measured is not None and measured.aligned is not None
    assert len(measured.base.prompts) == len(measured.aligned.prompts) == 8
    assert measured.base.sampling == usual_sampling(seed=0)
    # The base is what was loaded, and not what was trained.
    assert (measured.base.images != measured.aligned.images).any()
    page = (tmp_path / "report.html").read_text()
    assert "In-domain prompts" in page and "Out-of-domain prompts" in page and "rpo shapes evaluate --lora" in page


@pytest.mark.parametrize(("eta", "sampled"), [(1.0, 1.0), (0.5, 0.5)])
def test_what_was_learnt_below_noise_level_1_is_measured_with_its_own_noise(eta, sampled, tmp_path):
    trainer = grpo(tmp_path, rollout=load_config(GRPOConfig, None, [f"rollout.eta={eta}"]).rollout)
    assert sampling_of(trainer.run).eta == sampled


def test_mistakes_are_one_line_and_exit_2(inputs, tmp_path, capfd):
    given = words("grpo", inputs, "epsilon", tmp_path / "out")
    cases = [
        (["grpo.roll=3"], ["grpo.roll"]),
        (["grpo.rollout.eta=0"], ["rollout.solver is ddim with eta 0", "score-as-action with estimator: pathwise"]),
        ([f"prompts={tmp_path / 'nowhere.txt'}"], ["nowhere.txt", "give prompts=FILE"]),
        (["prompts=shapes:test"], ["the splits of shapes are train, in_domain, out_of_domain"]),
        (["rewards={jpeg-compresibility: 1.0}"], ["there is no reward 'jpeg-compresibility'"]),
        ([f"model.source={tmp_path / 'nowhere'}"], ["is neither a folder"]),
    ]
    for more, expected in cases:
        assert main([*given, *more]) == 2
        seen = capfd.readouterr()
        lines = [line for line in seen.err.splitlines() if line.startswith("rpo: ")]
        assert len(lines) == 1, seen.err
        assert "Traceback" not in seen.err
        for part in expected:
            assert part in lines[0]
    assert not (tmp_path / "out").exists()
