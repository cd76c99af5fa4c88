"""The quickstart in small: one round of `align` by its preset, and a LoRA that stock diffusers loads."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rpo.cli.main import main
from rpo.config.load import load_config
from rpo.evaluation.held_out import HeldOut
from rpo.runs.align_config import AlignConfig
from rpo.runs.align_report import in_words
from rpo.runs.train_config import DPORunConfig
from rpo.shapes.evaluate import held_out_prompts
from tests.run_state import assert_refused, result_of

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "curate.source.limit=8",
    "curate.source.images_per_prompt=4",
    "curate.progress=false",
    "held_out.count=4",
    "dpo.learning.updates=3",
    "dpo.learning.warmup_updates=0",
    "dpo.pairs_per_update=4",
    "dpo.learning.micro_batch=4",
    "dpo.learning.progress=false",
]


def quickstart(folder, *more):
    return main(["quickstart", *SMALL, f"output={folder}", *more])


def preset(*words):
    return load_config(AlignConfig, CONFIGS / "quickstart.yaml", list(words))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    assert quickstart(folder) == 0
    return folder


def test_it_leaves_pairs_numbers_a_lora_and_a_report(finished):
    base, first = (json.loads(line) for line in (finished / "rounds.jsonl").read_text().splitlines())
    assert set(base["scores"]) == set(first["gain"]) == {"in_domain", "out_of_domain"}
    assert first["updates"] == 3
    assert first["yield"]["sources"] == 32
    assert 0 < first["yield"]["edits"] < 32
    kinds = [json.loads(line)["chosen_is"] for line in (finished / "round-1/pairs/metadata.jsonl").open()]
    assert len(kinds) == first["trained_on"] > 0
    assert set(kinds) == {"edit", "source"}
    page = (finished / "report.html").read_text()
    assert f"{first['trained_on']} preference pairs, 3 updates" in page
    assert "In-domain prompts" in page and "Images and their edits" in page
    assert f'load_lora_weights("{finished / "lora"}")' in page.replace("&#34;", '"')
    assert (finished / "round-1/curate/pairs.html").is_file()
    card = (finished / "lora/README.md").read_text()
    assert "Rich Preference Optimization" in card
    assert "rpo.shapes.path()" in card


@pytest.mark.slow
def test_stock_diffusers_loads_the_lora_and_draws_the_images_of_the_report(finished, tmp_path):
    held_out = HeldOut(preset(*SMALL).held_out)
    assert held_out.prompts == held_out_prompts_as_text(4)
    judged = held_out.read(finished / "judged-1.npz")
    # Nothing of rpo but the path: the noise is made here as the sampler makes it.
    script = f"""
import hashlib, sys, torch
import rpo.shapes
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(rpo.shapes.path())
pipe.load_lora_weights({str(finished / "lora")!r})
pipe.set_progress_bar_config(disable=True)
for index, prompt in enumerate({judged.texts[:3]!r}):
    key = hashlib.sha256(f"0/{{index}}/0".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    image = pipe(prompt, num_inference_steps=20, eta=1.0, guidance_scale=2.0, generator=generator).images[0]
    image.save({str(tmp_path)!r} + f"/{{index}}.png")
loaded = sorted(name for name in sys.modules if name.split(".")[0] == "rpo")
assert loaded == ["rpo", "rpo.errors", "rpo.shapes"], loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    for index in range(3):
        stock = np.asarray(Image.open(tmp_path / f"{index}.png"), dtype=int)
        assert np.abs(stock - judged.images[index].astype(int)).max() <= 1


def held_out_prompts_as_text(count):
    found = held_out_prompts(count, seed=0)
    return {domain: [getattr(prompt, "text", prompt) for prompt in prompts] for domain, prompts in found.items()}


@pytest.mark.slow
def test_a_second_run_gives_the_same_numbers(finished, tmp_path):
    assert quickstart(tmp_path / "again") == 0
    first, second = (result_of(folder) for folder in (finished, tmp_path / "again"))
    assert {"lora/pytorch_lora_weights.safetensors", "rounds.jsonl", "round-1/pairs/metadata.jsonl"} <= first.keys()
    assert [name for name in first | second if first.get(name) != second.get(name)] == []


def test_a_finished_run_costs_nothing(finished, monkeypatch, capsys):
    before, judged = result_of(finished), (finished / "judged-0.npz").read_bytes()
    monkeypatch.setattr(HeldOut, "judge", lambda *_, **__: pytest.fail("a model was drawn with again"))
    assert quickstart(finished, "--resume") == 0
    assert result_of(finished) == before
    (finished / "judged-0.npz").write_bytes(b"half")
    assert quickstart(finished, "--resume") == 2
    (finished / "judged-0.npz").write_bytes(judged)
    assert "judged-0.npz is damaged" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(finished, capsys):
    assert quickstart(finished) == 2
    assert "holds a run already; give --resume to continue it" in capsys.readouterr().err
    cases = {
        "seed=1": "seed was 0 and is now 1;",
        "dpo.seed=1": "dpo.seed was 0 and is now 1;",  # a line that the file has elsewhere
        "curate.decide.rewards={critic: 0.0, shapes-clip: 1.0}": "curate.decide.rewards was ",
    }

    def attempt(word):
        assert quickstart(finished, "--resume", word) == 2
        raise ValueError(capsys.readouterr().err)

    for word, message in cases.items():
        assert_refused(finished, message, lambda word=word: attempt(word))


def test_another_seed_is_another_run_throughout(tmp_path):
    one, other = (AlignConfig(seed=seed) for seed in (0, 1))
    assert one != other
    settings = preset("seed=1", *SMALL, f"output={tmp_path}")
    assert settings.seed == 1 and settings.held_out.seed == settings.dpo.seed == 0  # the run's is added to them


def test_the_report_tells_the_rules_that_were_in_force():
    rules = preset().curate.decide
    said = in_words(rules)
    assert (
        "where critic by 1 or more and shapes-clip told them apart, and critic gave the better one at least 10" in said
    )
    assert "own images of a prompt were paired" in said
    other = in_words(replace(rules, agreement=False, min_chosen={}, orderings="own", policy="both_directions"))
    assert "critic by 1 or more (of critic by 1 or more and shapes-clip)" in other
    assert "both_directions" in other and "own images" not in other and "at least" not in other


def test_the_configuration_of_its_training_is_its_training():
    found = load_config(DPORunConfig, CONFIGS / "dpo_shapes.yaml", ["data.source=x"])
    own = preset().dpo
    names = [one.name for one in fields(own) if one.name not in ("output", "preview_every", "encode_batch")]
    assert {name: getattr(found, name) for name in names} == {name: getattr(own, name) for name in names}
