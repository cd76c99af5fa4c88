"""Rounds of alignment in small: the second one starts from the first, a killed run ends where it would have ended."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rpo.adapters.lora_file import WEIGHT_FILE, inspect_lora
from rpo.config.load import load_config
from rpo.curation.curate import Components
from rpo.curation.store.run import CurationRun
from rpo.reports.rounds import format_rounds
from rpo.runs import align as module
from rpo.runs.align import align
from rpo.runs.align_config import AlignConfig
from tests.curation.fakes import image_folder
from tests.run_state import assert_refused, result_of

SMALL = [
    "rounds=2",
    "curate.source.limit=4",
    "curate.source.images_per_prompt=3",
    "curate.source.num_steps=4",
    "curate.source.guidance_scale=2",
    "curate.source.eta=1",
    "curate.decide.policy=always_edit",
    "curate.progress=false",
    "dpo.pairs_per_update=2",
    "dpo.learning.micro_batch=2",
    "dpo.adapter.rank=2",
    "dpo.learning.updates=2",
    "dpo.learning.learning_rate=0.01",
    "dpo.learning.warmup_updates=0",
    "dpo.learning.progress=false",
    "held_out.count=4",
    "held_out.num_steps=3",
    "held_out.guidance_scale=2",
    "held_out.eta=1",
]


class Negative:
    """An editor that turns every image into its negative."""

    identity = {"kind": "negative"}  # noqa: RUF012
    licence = "Apache-2.0"
    batch_size = 8
    concurrency = 1

    def __call__(self, images, instructions, seeds):
        """The negatives."""
        return [image.point(lambda value: 255 - value) for image in images]


OWN = Components(editor=Negative())


def small(folder, *changes):
    return load_config(AlignConfig, None, [*SMALL, "curate.decide.max_distance=1.0", *changes, f"output={folder}"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("align") / "run"
    return align(small(folder), components=OWN)


def lines(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_every_round_is_recorded_with_its_yield_and_its_scores(finished):
    base, first, second = lines(finished.folder)
    assert [one["round"] for one in (base, first, second)] == [0, 1, 2]
    assert list(finished.rounds) == [base, first, second]
    assert set(base["scores"]) == set(second["scores"]) == set(second["gain"]) == {"in_domain", "out_of_domain"}
    assert first["yield"]["sources"] == 12
    assert first["trained_on"] == first["yield"]["pairs"] > 0
    assert second["trained_on"] == first["yield"]["pairs"] + second["yield"]["pairs"]
    table = format_rounds(finished.rounds).splitlines()
    assert len(table) == 4
    assert f"{second['trained_on']:>12}" in table[3]
    assert "Yield of the curation" in (finished.folder / "rounds.svg").read_text()


def test_the_second_round_draws_with_the_lora_of_the_first_and_from_noise_of_its_own(finished):
    drawn = [CurationRun(finished.folder / f"round-{number}/curate").identity_of("sources") for number in (1, 2)]
    assert [one["lora"] for one in drawn] == ["", "lora"]
    assert [one["seed"] for one in drawn] == ["0", "1"]
    assert drawn[0]["fingerprint"] != drawn[1]["fingerprint"]


def test_the_lora_of_the_end_is_both_adapters_one_on_top_of_the_other(finished):
    first, both = (load_file(finished.folder / f"round-{number}/lora" / WEIGHT_FILE) for number in (1, 2))
    assert first.keys() == both.keys()
    for name, tensor in first.items():
        kept, new = both[name].split(2, dim=0 if tensor.shape[0] == 2 else 1)
        assert torch.equal(kept, tensor)
        assert new.any()
    assert inspect_lora(finished.lora).ranks == (4,)
    assert "Rich Preference Optimization" in (finished.lora / "README.md").read_text()


@pytest.mark.slow
def test_rounds_may_start_from_a_lora(finished, tmp_path):
    result = align(small(tmp_path / "run", f"curate.source.model.lora={finished.lora}", "rounds=1"), components=OWN)
    assert inspect_lora(result.lora).ranks == (6,)
    assert CurationRun(result.folder / "round-1/curate").identity_of("sources")["lora"] == "lora"
    assert lines(result.folder)[0]["scores"] == lines(finished.folder)[2]["scores"]


@pytest.mark.slow
def test_a_run_that_was_stopped_after_any_part_ends_as_if_it_had_not_been(finished, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stop

    for name in ("export", "Trainer", "write_model_card"):  # after curation, after the pairs, after training
        with monkeypatch.context() as patched, pytest.raises(Stop):
            patched.setattr(module, name, stop)
            align(small(tmp_path / "run", "rounds=1"), resume=True, components=OWN)
    align(small(tmp_path / "run", "rounds=1"), resume=True, components=OWN)
    again = align(small(tmp_path / "run"), resume=True, components=OWN)
    assert lines(again.folder) == lines(finished.folder)
    first, second = (result_of(one.folder) for one in (again, finished))
    assert f"lora/{WEIGHT_FILE}" in first
    assert [name for name in first | second if first.get(name) != second.get(name)] == []


def test_a_folder_is_not_taken_over_and_other_settings_are_named(finished):
    with pytest.raises(ValueError, match="holds a run already; give --resume"):
        align(small(finished.folder), components=OWN)
    cases = {
        "dpo.objective.beta=7": r"dpo\.objective\.beta was None and is now 7\.0;",
        "held_out.seed=2": r"held_out\.seed was 0 and is now 2;",
        "curate.decide.rewards={shapes-clip: 0.5}": r"curate\.decide\.rewards was .* and is now",
    }
    for word, message in cases.items():
        attempt = partial(align, small(finished.folder, word), resume=True, components=OWN)
        assert_refused(finished.folder, f"was started with other settings .*: {message}", attempt)


def test_other_prompts_or_another_base_are_named(tmp_path, monkeypatch):
    texts = tmp_path / "prompts.txt"
    texts.write_text("a red circle\n")
    config = small(tmp_path / "run", "rounds=1", f"curate.source.prompts={texts}")
    monkeypatch.setattr(module, "write_align_report", lambda *_: None)
    monkeypatch.setattr(module._Rounds, "_judged", lambda *_: SimpleNamespace(means={}))
    monkeypatch.setattr(module.RoundWatch, "after", lambda *_: {"watched": {}, "alarms": []})
    monkeypatch.setattr(module._Rounds, "_round", lambda *_: {"round": 1, "scores": {}})
    monkeypatch.setattr(module, "draw_rounds", lambda _: "")
    (tmp_path / "run/round-1/lora").mkdir(parents=True)
    align(config, components=OWN)
    texts.write_text("a red square\n")
    assert_refused(tmp_path / "run", "started with something else: prompts from", lambda: align(config, resume=True))
    texts.write_text("a red circle\n")
    load = module.load_model

    def other(settings):
        model = load(settings)
        model.text_encoders["text_encoder"].get_parameter("final_layer_norm.bias").data.add_(1)
        return model

    monkeypatch.setattr(module, "load_model", other)
    assert_refused(tmp_path / "run", r"base\.text_encoder from \w+ to \w+;", lambda: align(config, resume=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rounds=0", "sets 'rounds' to 0, but a whole number"),
        ("max_pairs=0", "sets 'max_pairs' to 0, but a whole number"),
        ("dpo.adapter.train=full", "dpo.adapter.train is full, but rounds are joined as LoRAs"),
        ("curate.stop_after=edits", "curate.stop_after is edits, but a round needs pairs"),
        ("curate.source.kind=folder", "only images that the model draws change from round to round"),
        ("held_out.reward=shapes-clip", "'shapes-clip' filters, and 'shapes-clip' evaluates"),
        ("held_out.count=0", "sets 'held_out.count' to 0, but a whole number"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_done(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        align(small(tmp_path / "run", change))
    assert not (tmp_path / "run").exists()


def test_held_out_prompts_must_not_be_trained_on(tmp_path):
    texts = tmp_path / "both.txt"
    texts.write_text("a red circle\na blue square\n")
    config = small(tmp_path / "run", f"curate.source.prompts={texts}")
    with pytest.raises(ValueError, match="2 of the held-out prompts are trained on, 'a blue square' for one"):
        align(replace(config, held_out=replace(config.held_out, prompts=str(texts))))


def test_held_out_prompts_must_not_be_among_imported_captions(tmp_path):
    texts = tmp_path / "held_out.txt"
    texts.write_text("caption 1\ncaption 5\n")
    source = image_folder(tmp_path / "source", 3)
    imports = ["rounds=1", "curate.source.kind=folder", f"curate.source.path={source}"]
    config = small(tmp_path / "run", *imports)
    with pytest.raises(ValueError, match="1 of the held-out prompts are trained on, 'caption 1' for one"):
        align(replace(config, held_out=replace(config.held_out, prompts=str(texts))))
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but rounds go on one"):
        align(small(tmp_path / "run"))
