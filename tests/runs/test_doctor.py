"""The list that `rpo doctor` prints: everything in order, each fault a line with a remedy, and nothing left behind."""

import json
from collections import namedtuple

import pytest
import torch

from rpo.cli.main import main
from rpo.config.load import load_config
from rpo.data.writers import write_pairs
from rpo.models.checkpoint import Checkpoint
from rpo.runs.plan import plan
from rpo.runs.room import available_bytes, cache_bytes, memory_check
from rpo.runs.train_config import DPORunConfig
from tests.marks import slow_but
from tests.runs.test_train import ALGORITHMS, inputs, words  # noqa: F401
from tests.tiny import tiny_sd
from tests.tiny_editors import tiny_pix2pix
from tests.trainers.online_runs import small_value  # noqa: F401
from tests.trainers.pair_runs import toy_pairs, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:No LoRA keys")
UNTRAINED = {"VAE round trip", "denoiser denoises"}


def examined(capfd, algorithm, inputs, folder, *more, model="epsilon"):  # noqa: F811
    """The exit code, and the lines by name: whether each passed, and all that is said."""
    given = words(algorithm, inputs, model, folder / "out")
    given[0] = "doctor"
    code = main([*given, "learning.learning_rate=0.001", *more])
    lines = capfd.readouterr().out.splitlines()
    told = {line[8:].partition(":")[0]: line for line in lines if line.startswith(("  pass  ", "  FAIL  "))}
    return code, told, lines


def failed(told):
    return {name for name, line in told.items() if line.startswith("  FAIL")}


@pytest.mark.parametrize("algorithm", slow_but(("dpo",), ALGORITHMS))
def test_it_goes_through_everything_and_leaves_nothing_behind(algorithm, inputs, tmp_path, capfd):  # noqa: F811
    before = sorted(path for path in inputs.rglob("*"))
    code, told, lines = examined(capfd, algorithm, inputs, tmp_path)
    assert failed(told) == UNTRAINED and code == 1  # a network without training
    assert list(told)[:5] == ["settings", "memory plan", "checkpoint", "data", "trainer"]
    assert list(told)[-2:] == ["adapter file draws the same", "disk"]
    assert lines[-1].startswith("2 of ")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert sorted(path for path in inputs.rglob("*")) == before


def test_a_sound_run_of_the_embedded_checkpoint_passes_all(inputs, tmp_path, capfd):  # noqa: F811
    code, told, lines = examined(capfd, "grpo", inputs, tmp_path, "model.source=shapes")
    assert code == 0 and not failed(told)
    assert lines[-1].startswith(f"all {len(told)} passed, in ")


@pytest.mark.parametrize(
    ("algorithm", "word", "expected"),
    [
        ("grpo", "rewards={jpeg-compressibility: 0}", ("settings", "other than 0")),
        pytest.param(
            "grpo",
            "held_out={prompts: PROMPTS, reward: jpeg-compressibility}",
            ("held-out prompts", "are trained on"),
            marks=pytest.mark.slow,
        ),
        ("grpo", "rewards={no-such: 1}", ("data", "there is no reward")),
        ("dpo", "data.source=/nowhere", ("data", "/nowhere")),
        pytest.param(
            "dpo", "objective.margin_from=rewards", ("trainer", "has no chosen_score"), marks=pytest.mark.slow
        ),
        ("dpo", "model.source=/nowhere", ("checkpoint", "neither a folder")),
    ],
)
def test_what_is_refused_elsewhere_is_a_line_here(algorithm, word, expected, inputs, tmp_path, capfd):  # noqa: F811
    word = word.replace("PROMPTS", str(inputs / "prompts.txt"))
    (name, says), (code, told, _) = expected, examined(capfd, algorithm, inputs, tmp_path, word)
    assert code == 1 and says in told[name]
    assert failed(told) - UNTRAINED == {name}
    assert ("disk" in told) == (name not in ("settings", "checkpoint"))


def test_what_an_editor_and_a_distilled_checkpoint_are_refused_for_is_a_line(inputs, tmp_path, capfd):  # noqa: F811
    tiny_pix2pix().save_pretrained(tmp_path / "editor")
    held_out = "held_out={prompts: shapes, reward: jpeg-compressibility}"
    editor = [f"model.source={tmp_path / 'editor'}", "data.source=/nowhere", held_out]
    _, told, _ = examined(capfd, "dpo", inputs, tmp_path, *editor)
    assert failed(told) - UNTRAINED == {"data", "held-out prompts"}
    assert "InstructPix2Pix edits images" in told["held-out prompts"] and "off by" in told["VAE round trip"]
    _, told, _ = examined(
        capfd, "dpo", inputs, tmp_path, "data.source=/nowhere", held_out, "model.allow_distilled=true"
    )
    assert "held_out.num_steps and held_out.guidance_scale is not given" in told["held-out prompts"]


def with_overflow(pipe):
    pipe.vae.decoder.conv_in.weight.data *= 3e4


@pytest.mark.parametrize(
    ("alter", "more", "says"),
    [(with_overflow, ["model.dtype=float16"], "it overflows"), (lambda pipe: None, [], "is called 'turbo'")],
    ids=["overflow", "distilled"],
)
def test_a_checkpoint_that_does_not_load_ends_the_list(alter, more, says, inputs, tmp_path, capfd):  # noqa: F811
    name = "half" if more else "tiny-turbo"
    pipe = tiny_sd()
    alter(pipe)
    pipe.save_pretrained(tmp_path / name)
    code, told, _ = examined(capfd, "grpo", inputs, tmp_path, f"model.source={tmp_path / name}", *more)
    assert code == 1 and says in told["checkpoint"]
    assert list(told) == ["settings", "memory plan", "checkpoint"]


def test_empty_captions_and_a_full_disk_are_both_told(inputs, tmp_path, capfd, monkeypatch):  # noqa: F811
    write_pairs(tmp_path / "pairs", toy_pairs(4))
    file = tmp_path / "pairs/metadata.jsonl"
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | {"prompt": " "}), *rest]) + "\n")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(2**30, 2**30 - 1024, 1024))
    code, told, lines = examined(capfd, "dpo", inputs, tmp_path, f"data.source={tmp_path / 'pairs'}")
    assert code == 1 and failed(told) - UNTRAINED == {"data", "disk"}
    assert "the prompt is empty" in told["data"] and "1 KiB are free" in told["disk"]
    assert "make room" in lines[lines.index(told["disk"]) + 1]


def lightless(images, prompts):
    """A reward that is out of order."""
    raise RuntimeError("no light")


def test_a_broken_reward_hides_nothing_else(inputs, tmp_path, capfd, monkeypatch):  # noqa: F811
    monkeypatch.setattr("rpo.runs.room.available_bytes", lambda device: 1024.0)
    words = ["rewards={'tests.runs.test_doctor:lightless': 1.0}"]
    code, told, _ = examined(capfd, "grpo", inputs, tmp_path, *words)
    assert code == 1 and failed(told) - UNTRAINED == {"preflight", "first step", "memory plan"}
    for name in ("preflight", "first step"):
        assert "raised RuntimeError: no light" in told[name] and "are in /" not in told[name]
    assert "1 KiB are free" in told["memory plan"] and "disk" in told
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_memory_is_what_is_planned_against_what_is_there(inputs):  # noqa: F811
    config = load_config(DPORunConfig, None, [f"model.source={inputs / 'epsilon'}", "model.device=cpu"])
    check, planned = memory_check(config)
    assert planned == plan(config) and check.passed
    free = available_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_what_is_told_of_caches_is_what_is_encoded(tmp_path):
    trainer = trainer_of(tmp_path, updates=2, pipe=Checkpoint(tiny_sd()))
    told = cache_bytes(trainer.run.config, trainer.run.model, trainer.algorithm)
    data = trainer.algorithm.data
    trainer.algorithm.prepare()
    embeddings = data.embeddings.embed(trainer.algorithm.pairs.prompts)["tokens"]
    assert told == data.latents.encoded * 2 * 4 * trainer.algorithm.sizes.num_dims + embeddings.nbytes
