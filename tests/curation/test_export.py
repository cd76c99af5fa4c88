"""Exports, their card, what an upload would send, and what a run has come to."""

import io
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rpo.cli.main import main
from rpo.curation.card import shown_model
from rpo.curation.curate import curate
from rpo.curation.curate_config import DecideConfig
from rpo.curation.export import export, pairs_of, push_to_hub
from rpo.curation.records import Critique, Unavailable
from rpo.curation.status import status_of
from rpo.data.preference import SIDES
from rpo.data.readers import read_pairs
from rpo.data.writers import side_order, write_pickapic
from tests.curation.fakes import FakeCritic, config_of, fakes, finished, image_folder, picture
from tests.data.samples import pair

REWARD = "tests.curation.fakes:brightness"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return finished(config_of(folder / "run", image_folder(folder / "source", 40)))


@pytest.fixture(scope="module")
def native(run):
    return export(run.store.address)


def pixels(one, side):
    return np.asarray(one.decode(side))


def test_the_native_form_round_trips(run, native):
    before, after = list(pairs_of(run)), read_pairs(native.path)
    assert native.num_pairs == len(before) == len(after) > 8
    for one, other in zip(before, after, strict=True):
        assert (one.prompt, one.chosen_score, one.rejected_score, dict(one.details)) == (
            other.prompt,
            other.chosen_score,
            other.rejected_score,
            dict(other.details),
        )
        assert all(one.encoded(side) == other.encoded(side) for side in SIDES)


def test_every_pair_says_how_it_came_to_be(native):
    for one in read_pairs(native.path):
        details = one.details
        assert {details["chosen_is"], details["rejected_is"]} == {"edit", "source"}
        assert details["label_source"] == f"reward:{REWARD}"
        assert one.margin is not None
        assert one.margin > 0
        critique = Critique.model_validate_json(details["critique"])
        assert details["edit_instruction"] == f"mend {critique.problems[0].what}"
        models = [details[f"{name}_model"] for name in ("critic", "instructor", "editor")]
        assert models == ["eye", "pen", "brush"]
        assert (details["critic_prompt_sha256"], details["instructor_prompt_sha256"]) == ("1", "2")
        assert details["editor_licence"] == "mit"
        scores = json.loads(details["scores"])
        assert scores["chosen"][REWARD] == one.chosen_score
        difference = np.abs(pixels(one, "chosen").astype(float) - pixels(one, "rejected"))
        assert details["distance"] == pytest.approx(difference.mean() / 255)


def test_parquet_round_trips_too(run, native):
    table, folder = read_pairs(export(run.store.address, "parquet").path), read_pairs(native.path)
    assert len(table) == len(folder) == native.num_pairs
    for one, other in zip(table, folder, strict=True):
        assert (one.key, one.prompt, one.chosen_score, one.rejected_score, dict(one.details)) == (
            other.key,
            other.prompt,
            other.chosen_score,
            other.rejected_score,
            dict(other.details),
        )
        assert all(one.encoded(side) == other.encoded(side) for side in SIDES)


def test_parquet_is_read_by_datasets_as_images_and_plain_columns(run, native, tmp_path):
    import datasets

    done = export(run.store.address, "parquet", to=tmp_path / "parquet")
    table = datasets.load_dataset(str(done.path), split="train", cache_dir=str(tmp_path / "cache"))
    types = {name: feature.dtype for name, feature in table.features.items()}
    assert isinstance(table.features["chosen"], datasets.Image) and isinstance(
        table.features["rejected"], datasets.Image
    )
    texts = ("prompt", "source", "critique", "edit_instruction", "editor_model", "critic_model", "label_source")
    assert {types[name] for name in texts} == {"string"}
    assert {types[name] for name in ("chosen_score", "rejected_score", "distance")} == {"float64"}
    for row, one in zip(table, read_pairs(native.path), strict=True):
        assert row["prompt"] == one.prompt and row["critique"] == one.details["critique"]
        assert np.array_equal(np.asarray(row["chosen"].convert("RGB")), pixels(one, "chosen"))
        assert np.array_equal(np.asarray(row["rejected"].convert("RGB")), pixels(one, "rejected"))


def test_pickapic_is_read_by_datasets_with_its_columns_and_types(run, native, tmp_path):
    import datasets

    done = export(run.store.address, "pickapic", to=tmp_path / "pickapic")
    table = datasets.load_dataset(str(done.path), split="train", cache_dir=str(tmp_path / "cache"))
    types = {name: feature.dtype for name, feature in table.features.items()}
    assert types == {
        "are_different": "bool",
        "best_image_uid": "string",
        "caption": "string",
        "created_at": "timestamp[ns]",
        "has_label": "bool",
        "image_0_uid": "string",
        "image_0_url": "string",
        "image_1_uid": "string",
        "image_1_url": "string",
        "jpg_0": "binary",
        "jpg_1": "binary",
        "label_0": "float64",
        "label_1": "float64",
        "model_0": "string",
        "model_1": "string",
        "ranking_id": "int64",
        "user_id": "int64",
        "num_example_per_prompt": "int64",
    }
    for row, one in zip(table, read_pairs(native.path), strict=True):
        better = 0 if row["label_0"] == 1 else 1
        assert {row["label_0"], row["label_1"]} == {0.0, 1.0}
        assert row["has_label"]
        assert row["are_different"]
        assert row["best_image_uid"] == row[f"image_{better}_uid"]
        assert row["caption"] == one.prompt
        shown = [np.asarray(Image.open(io.BytesIO(row[f"jpg_{side}"])).convert("RGB")) for side in (0, 1)]
        assert np.array_equal(shown[better], pixels(one, "chosen"))
        assert np.array_equal(shown[1 - better], pixels(one, "rejected"))
        assert (row[f"model_{better}"] == "brush") == (one.details["chosen_is"] == "edit")
    cast = table.cast_column("jpg_0", datasets.Image())  # what trainers do that want images and no bytes
    assert cast[0]["jpg_0"].size == Image.open(io.BytesIO(table[0]["jpg_0"])).size == (12, 10)
    again = read_pairs(done.path)
    assert [one.key for one in again] == [one.key for one in read_pairs(native.path)]


def test_position_tells_nothing_and_stays(tmp_path):
    orders = [side_order(pair(index)) for index in range(200)]
    assert orders == [side_order(pair(index)) for index in range(200)]
    first = Counter(order[0] for order in orders)
    assert 70 < first["chosen"] < 130
    write_pickapic(tmp_path / "a.parquet", [pair(0), pair(1)])
    write_pickapic(tmp_path / "b.parquet", [pair(0), pair(1)])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_an_export_replaces_an_export_and_nothing_else(run, native, tmp_path):
    before = sorted(path.name for path in native.path.rglob("*"))
    assert export(run.store.address).path == native.path
    assert sorted(path.name for path in native.path.rglob("*")) == before
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than an export"):
        export(run.store.address, to=tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_damaged_image_is_named_and_leaves_the_last_export(tmp_path):
    folder = finished(config_of(tmp_path / "run", image_folder(tmp_path / "source", 12)))
    done = export(folder.store.address)
    shard = sorted((tmp_path / "run" / "shards").glob("*.parquet"))[-1]
    damaged = bytearray(shard.read_bytes())
    for image in re.finditer(rb"\x89PNG", bytes(damaged)):
        damaged[image.start() + 60] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"^record \w{16} \('caption \d+'\): the image \w{64} is not in .*0000001"):
        export(folder.store.address)
    assert len(read_pairs(done.path)) == done.num_pairs


def test_a_run_without_pairs_says_why(tmp_path):
    config = config_of(tmp_path / "run", image_folder(tmp_path / "source", 6))
    folder = finished(replace(config, decide=replace(config.decide, min_distance=0.9, max_distance=1.0)))
    with pytest.raises(ValueError, match=r"has no pairs \(dropped: .*too_close.*\); expected at least one"):
        export(folder.store.address)


def test_the_card_says_who_made_what_under_which_licence(run, tmp_path):
    from huggingface_hub import DatasetCard

    done = export(run.store.address, "parquet", to=tmp_path / "set", licence="cc-by-4.0")
    card = DatasetCard.load(done.path / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.size_categories == ["n<1K"]
    for text in (
        "model: eye",
        "prompt_sha256: 1",
        "**mit**",
        "parse_error",
        "nothing_to_fix",
        f"{done.num_pairs} pairs",
    ):
        assert text in card.text
    assert str(tmp_path) not in card.text
    assert "{{" not in card.text


def test_folders_of_this_machine_are_called_by_their_last_name(tmp_path):
    assert shown_model("owner/name") == "owner/name"
    assert shown_model("shapes") == "shapes"
    assert shown_model(str(tmp_path / "secret" / "model-7")) == "model-7"


class Hub:
    """Takes uploads, and remembers them."""

    def __init__(self, *, is_private=True):
        self.is_private, self.sent = is_private, []

    def create_repo(self, repo_id, *, token, private, repo_type, exist_ok):
        assert (repo_type, exist_ok) == ("dataset", True)
        return f"https://hub/{repo_id}"

    def repo_info(self, repo_id, *, repo_type, token):
        assert repo_type == "dataset"
        return type("Info", (), {"private": self.is_private})

    def upload_folder(self, **given):
        self.sent.append(given)


def test_an_upload_is_a_plan_until_it_is_asked_for(run, tmp_path):
    done = export(run.store.address, "parquet", to=tmp_path / "set")
    hub = Hub()
    plan = push_to_hub(done.path, "me/pairs", api=hub)
    assert "dry run: nothing was sent; would go to me/pairs (private)" in str(plan)
    assert [file.path for file in plan.files] == ["README.md", "data/train-00000-of-00001.parquet"]
    assert plan.notes == ("the card names no license",)
    assert hub.sent == []
    sent = push_to_hub(done.path, "me/pairs", push=True, api=hub)
    assert sent.url == "https://hub/me/pairs"
    assert hub.sent[0]["repo_type"] == "dataset"
    assert hub.sent[0]["allow_patterns"] == ["README.md", "data/train-00000-of-00001.parquet"]
    assert 'load_dataset("me/pairs"' in (done.path / "README.md").read_text()


def test_uploads_that_are_refused(run, tmp_path):
    done = export(run.store.address, to=tmp_path / "set")
    with pytest.raises(ValueError, match="use owner/name"):
        push_to_hub(done.path, "pairs")
    with pytest.raises(ValueError, match="is no exported data set"):
        push_to_hub(tmp_path, "me/pairs")
    hub = Hub(is_private=False)
    with pytest.raises(ValueError, match="is public, but private=True was asked for; nothing was uploaded"):
        push_to_hub(done.path, "me/pairs", push=True, api=hub)
    assert hub.sent == []


def test_the_status_adds_up(run):
    status = status_of(run.store.address)
    stages = {stage.name: stage for stage in status.stages}
    assert stages["sources"].done == stages["critiques"].done == stages["decisions"].done == 40
    assert stages["critiques"].faults["parse_error"] == status.dropped["critique_fault"]
    assert stages["edits"].done == stages["instructions"].kept - status.dropped["no_instructions"]
    assert status.num_pairs + status.num_dropped == 40
    assert status.kept == {f"reward:{REWARD}": status.num_pairs}
    one = status.evaluation
    assert one.better + one.equal + one.worse == status.num_pairs
    assert one.worse == 0  # green rises and falls with brightness
    assert all(stage.rate is None or stage.rate > 0 for stage in status.stages)
    shown = str(status)
    for text in ("critiques", "parse_error", "nothing_to_fix", "a second", "finds the chosen image better in"):
        assert text in shown


def test_the_status_of_a_run_that_has_just_begun(tmp_path):
    config = config_of(tmp_path / "run", image_folder(tmp_path / "source", 3))
    curate(replace(config, stop_after="sources"), components=fakes(critic=FakeCritic()))
    status = status_of(config.output)
    assert [stage.done for stage in status.stages] == [3, 0, 0, 0, 0, 0]
    assert status.evaluation is None
    assert status.num_pairs == 0
    with pytest.raises(ValueError, match="no record has been decided yet"):
        export(config.output)


def test_the_commands(run, tmp_path, capsys):
    assert main(["curate", "status", run.store.address]) == 0
    assert "decisions" in capsys.readouterr().out
    words = [
        "curate",
        "export",
        run.store.address,
        "--form",
        "pickapic",
        "--to",
        str(tmp_path / "x"),
        "--repo",
        "me/pairs",
    ]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "pairs in" in shown
    assert "dry run: nothing was sent" in shown
    assert main(["curate", "status", str(tmp_path)]) == 2
    assert "holds no run of curation" in capsys.readouterr().err


@pytest.mark.parametrize("last", [["run.yaml"], []])
def test_curate_takes_its_words_in_any_order(tmp_path, capsys, last, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("shard: 7\n")
    words = ["curate", "--output", "out", "source.kind=folder", "decide.rewards={jpeg-compressibility: 0.0}", *last]
    assert main(words) == 2
    assert "source.path is empty; expected what to import as folder" in capsys.readouterr().err
    assert main(["curate", "a.yaml", "b.yaml"]) == 2
    assert "got a.yaml and b.yaml; expected one configuration" in capsys.readouterr().err
    assert main(["curate", "sauce.kind=folder"]) == 2
    assert "CurateConfig has no such key; the nearest is 'source.kind'" in capsys.readouterr().err


def test_a_server_that_is_gone_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    def gone(config, *, resume):
        raise Unavailable("no answer from http://gone")

    monkeypatch.setattr("rpo.curation.curate.curate", gone)
    assert main(["curate", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "rpo: error: no answer from http://gone; run the same command with --resume: what was found out is kept\n"
    )


# several runs, and images that look alike


def keys(path):
    return [(pair.prompt, pair.key) for pair in read_pairs(path)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of which no image is the same."""
    folder = tmp_path_factory.mktemp("mix")
    many, few = (image_folder(folder / f"source-{count}", count) for count in (40, 14))
    for path in few.glob("*.png"):
        Image.open(path).rotate(180).save(path)
    return [finished(config_of(folder / source.name / "run", source)).store.address for source in (many, few)]


def test_a_mix_has_the_shares_and_is_even_and_complete(runs, tmp_path):
    whole = [keys(export(run, to=tmp_path / f"{place}").path) for place, run in enumerate(runs)]
    done = export({runs[0]: 1, runs[1]: 1}, "parquet", to=tmp_path / "mix")
    count = min(map(len, whole))
    assert dict(done.sources) == dict.fromkeys(runs, count) and done.num_pairs == 2 * count
    assert done.left_out == {"share": sum(map(len, whole)) - 2 * count}
    found = keys(done.path)
    owners = [next(place for place, one in enumerate(whole) if key in one) for key in found]
    assert all(abs(owners[: 2 * k].count(0) - k) <= 1 for k in range(count + 1)), "everywhere as in the whole"
    for place, one in enumerate(whole):
        assert [key for key in found if key in one] == [key for key in one if key in found], "each in its own order"
        assert (place == 0) == (len(one) > count)
    assert keys(export({runs[0]: 1, runs[1]: 1}, to=tmp_path / "again").path) == found
    text = (done.path / "README.md").read_text()
    assert f"{2 * count} preference pairs" in text and f"{count} of the pairs." in text
    assert "beyond the share of their run" in text


def test_shares_are_ratios_and_the_scarcest_run_is_taken_whole(runs, tmp_path):
    found = [export({runs[0]: 0.2 * scale, runs[1]: 0.8 * scale}, to=tmp_path / f"{scale}") for scale in (1, 10)]
    assert (
        found[0].sources == found[1].sources and found[0].sources[runs[0]] == round(found[0].sources[runs[1]] / 4) > 0
    )
    with pytest.raises(ValueError, match=r"a share is .*: 0; expected a number above 0"):
        export({runs[0]: 1, runs[1]: 0}, to=tmp_path / "none")
    with pytest.raises(ValueError, match="but not where to"):
        export(dict.fromkeys(runs, 1))


def test_near_duplicates_are_left_out_and_counted(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(18):  # the last six are the first again: larger, as JPEG, with another caption
        image = picture(number % 12, (5, 4)).resize((48, 40), Image.Resampling.BICUBIC)
        if number >= 12:
            image.resize((60, 50)).save(source / f"{number:03}.jpg", quality=75)
        else:
            image.save(source / f"{number:03}.png")
        caption = f"caption {number}" if number < 12 else f"again {number - 12}"
        (source / f"{number:03}.txt").write_text(caption)
    run = finished(replace(config_of(tmp_path / "run", source), decide=ALWAYS)).store.address
    every, unlike = export(run, to=tmp_path / "every"), export(run, to=tmp_path / "unlike", near_duplicates=4)
    again = [pair.prompt for pair in read_pairs(every.path) if pair.prompt.startswith("again")]
    assert len(again) > 2 and every.left_out == {}
    assert unlike.left_out == {"near_duplicate": sum(first_of(one) in captions(every) for one in again)}
    assert unlike.num_pairs == every.num_pairs - unlike.left_out["near_duplicate"]
    assert "looks like an earlier one" in (unlike.path / "README.md").read_text()
    assert "looks like an earlier one" in str(unlike) and "left out" not in str(every)
    with pytest.raises(ValueError, match="at most 64 bits; expected 0 to 15"):
        export(run, to=tmp_path / "wrong", near_duplicates=64)


ALWAYS = DecideConfig(rewards={REWARD: 0.0}, policy="always_edit", max_distance=1.0)


def captions(done):
    return {pair.prompt for pair in read_pairs(done.path)}


def first_of(caption):
    return caption.replace("again", "caption")


def test_the_commands_of_a_mix(runs, tmp_path, capsys):
    words = ["curate", "export", *runs, "--to", str(tmp_path / "mix"), "--near-duplicates", "0"]
    assert main([*words, "--shares", "1", "1"]) == 0
    assert "pairs in" in capsys.readouterr().out
    assert main([*words, "--shares", "1"]) == 2
    assert "there are 2 runs and 1 shares; expected one for each" in capsys.readouterr().err
