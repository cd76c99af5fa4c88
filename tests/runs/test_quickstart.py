"""The quickstart in small: every stage, the same numbers twice, and a LoRA that stock diffusers loads."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rpo.config import load_config
from rpo.runs.dpo import RunConfig
from rpo.runs.quickstart import QuickstartConfig, Stages, make_pairs, run
from rpo.runs.quickstart_curation import in_words
from rpo.shapes.evaluate import evaluate
from tests.run_state import assert_refused, result_of

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "prompts=12",
    "images_per_prompt=4",
    "evaluation_prompts=8",
    "dpo.loop.updates=3",
    "dpo.loop.warmup_updates=0",
    "dpo.pairs_per_update=8",
    "dpo.micro_batch=8",
    "dpo.loop.progress=false",
]


def small(folder, *changes):
    return load_config(QuickstartConfig, None, [*SMALL, *changes, f"output={folder}"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, run(small(folder / "run"))


def test_it_leaves_pairs_numbers_a_lora_and_a_report(finished):
    folder, result = finished
    results = json.loads((folder / "run/results.json").read_text())
    assert results["pairs"] == result.num_pairs > 0
    assert results["updates"] == 3
    assert set(results["accuracy"]) == {"in_domain", "out_of_domain"}
    base = results["accuracy"]["in_domain"]["all"]["base"]
    assert base[0] == pytest.approx(result.measured.base.holds[:8].mean())
    page = result.report.read_text()
    assert f"{result.num_pairs} preference pairs, 3 updates" in page
    assert results["yield"]["sources"] == 48
    assert 0 < results["yield"]["edits"] < 48
    kinds = [json.loads(line)["chosen_is"] for line in (folder / "run/pairs/metadata.jsonl").open()]
    assert len(kinds) == result.num_pairs
    assert set(kinds) == {"edit", "source"}
    (told, *_) = (json.loads(line) for line in (folder / "run/curate/instructions/part-0.jsonl").open())
    assert told["instructions"]
    assert "Images and their edits" in page
    assert (folder / "run/curate/pairs.html").is_file()
    assert f'load_lora_weights("{result.lora}")' in page.replace("&#34;", '"')
    card = (result.lora / "README.md").read_text()
    assert "Rich Preference Optimization" in card
    assert "rpo.shapes.path()" in card


def test_stock_diffusers_loads_the_lora_and_draws_the_images_of_the_report(finished):
    folder, result = finished
    judged = result.measured.aligned
    # Nothing of rpo but the path: the noise is made here as the sampler makes it.
    script = f"""
import hashlib, sys, torch
import rpo.shapes
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(rpo.shapes.path())
pipe.load_lora_weights({str(result.lora)!r})
pipe.set_progress_bar_config(disable=True)
for index, prompt in enumerate({judged.texts[:3]!r}):
    key = hashlib.sha256(f"0/{{index}}/0".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    image = pipe(prompt, num_inference_steps=20, eta=1.0, guidance_scale=2.0, generator=generator).images[0]
    image.save({str(folder)!r} + f"/{{index}}.png")
loaded = sorted(name for name in sys.modules if name.split(".")[0] == "rpo")
assert loaded == ["rpo", "rpo.errors", "rpo.shapes"], loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    for index in range(3):
        stock = np.asarray(Image.open(folder / f"{index}.png"), dtype=int)
        assert np.abs(stock - judged.images[index].astype(int)).max() <= 1


def test_a_second_run_gives_the_same_numbers_and_a_resumed_one_too(finished, monkeypatch):
    folder, _ = finished
    results = (folder / "run/results.json").read_text()
    run(small(folder / "again"))
    assert (folder / "again/results.json").read_text() == results
    first, second = (result_of(folder / name) for name in ("run", "again"))
    assert {"lora/pytorch_lora_weights.safetensors", "dpo/metrics.jsonl", "pairs/metadata.jsonl"} <= first.keys()
    assert [name for name in first | second if first.get(name) != second.get(name)] == []
    (folder / "again/results.json").unlink()
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "rpo.runs.quickstart.evaluate", lambda *a, **options: drawn.append(options) or evaluate(*a, **options)
        )
        run(small(folder / "again"), resume=True)
    assert [options["progress"] for options in drawn] == ["aligned model"], "the base was drawn before"
    assert (folder / "again/results.json").read_text() == results
    (folder / "again/base.npy").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"base\.npy is damaged .*; delete it"):
        run(small(folder / "again"), resume=True)


def test_a_folder_that_holds_a_run_is_not_overwritten(finished):
    folder, _ = finished
    with pytest.raises(ValueError, match="holds a run already; give --resume to continue it"):
        run(small(folder / "run"))
    cases = {
        "seed=1": "seed was 0 and is now 1;",
        "dpo.seed=1": r"dpo\.seed was 0 and is now 1;",  # a line that the file has elsewhere
        "curate.decide.rewards={critic: 0.0, shapes-clip: 1.0}": r"curate\.decide\.rewards was .* and is now",
    }
    for word, message in cases.items():
        assert_refused(folder / "run", message, lambda word=word: run(small(folder / "run", word), resume=True))


def test_the_report_tells_the_rules_that_were_in_force():
    rules = QuickstartConfig().curate.decide
    said = in_words(rules)
    assert (
        "where critic by 1 or more and shapes-clip told them apart, and critic gave the better one at least 10" in said
    )
    assert "own images of a prompt were paired" in said
    other = in_words(replace(rules, agreement=False, min_chosen={}, orderings="own", policy="both_directions"))
    assert "critic by 1 or more (of critic by 1 or more and shapes-clip)" in other
    assert "both_directions" in other and "own images" not in other and "at least" not in other


def test_the_configuration_of_its_training_is_its_training():
    found = load_config(RunConfig, CONFIGS / "dpo_shapes.yaml", ["data.source=x"]).dpo
    own = QuickstartConfig().dpo
    assert replace(found, folder=own.folder) == own


def test_its_device_is_that_of_drawing_and_editing(monkeypatch, tmp_path):
    asked = []

    def note(settings, **_):
        asked.append(settings)
        raise InterruptedError

    monkeypatch.setattr("rpo.runs.quickstart.curate", note)
    with pytest.raises(InterruptedError):
        make_pairs(tmp_path, small(tmp_path, "device=cpu"))
    assert asked[0].source.model.device == asked[0].editor.device == "cpu"


def test_a_stage_line_cut_by_a_kill_is_left_out(tmp_path):
    file = tmp_path / "stages.jsonl"
    file.write_text('{"stage": "draw", "seconds": 2.0}\n{"stage": "tra')
    stages = Stages(file)
    assert stages.seconds == {"draw": 2.0}
    with stages.timed("draw"):
        pass
    assert Stages(file).seconds["draw"] >= 2.0
    assert list(Stages(file).seconds) == ["draw"]
