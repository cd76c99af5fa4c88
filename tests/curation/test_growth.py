"""What a run of any length costs: bytes held for a record, files opened, lines read, forwards made."""

import json
import os
import shutil
import tracemalloc
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rpo.curation import export as export_module
from rpo.curation.curate import curate
from rpo.curation.curate_config import SourceConfig
from rpo.curation.export import export, pairs_of
from rpo.curation.fates import Fate, select
from rpo.curation.page import render_page
from rpo.curation.records import histories
from rpo.curation.score import ImageSimilarity
from rpo.curation.sources import cut_to_shards, plan_import, planned
from rpo.curation.status import status_of
from rpo.curation.store import run as run_module
from rpo.curation.store.run import CurationRun
from tests.curation.fakes import config_of, fakes, finished, image_folder
from tests.opens import opened_images
from tests.rewards.clip_models import save_clip

COUNT = 20_000


def name_of(number):
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


# what an import reads


SOURCES = ["folder", "table", "pairs"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Makes a source of a kind in files that nobody has touched for long, with its first image."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "known"))
    monkeypatch.setattr("rpo.data.image_facts.SETTLED_SECONDS", -60.0)
    folder = image_folder(tmp_path / "source", 4)

    def make(kind):
        names = sorted(path.name for path in folder.glob("*.png"))
        rows = [{"image": {"path": name, "bytes": None}, "caption": name} for name in names]
        if kind == "table":
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "table.parquet")
        if kind == "pairs":
            pairs = [
                {"prompt": "p", "chosen_file_name": one, "rejected_file_name": other}
                for one, other in zip(names[::2], names[1::2], strict=True)
            ]
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        path = folder / "table.parquet" if kind == "table" else folder
        return SourceConfig(kind=kind, path=str(path), caption_column="caption"), folder / names[0]

    return make


def planned_by(config):
    """The images that planning opens, and the ids of the plan."""
    with opened_images(Path(config.path) if Path(config.path).is_dir() else Path(config.path).parent) as names:
        plan = plan_import(config)
    return names, [item.id for item in plan.items]


@pytest.mark.parametrize("kind", SOURCES)
def test_a_start_opens_only_images_that_are_new_or_changed(source, kind):
    config, image = source(kind)
    first = planned_by(config)
    assert len(first[0]) == 4
    assert planned_by(config) == ([], first[1])
    changed, before = bytearray(image.read_bytes()), image.stat()
    changed[-1] ^= 1
    image.write_bytes(changed)  # of the same size, and given the old time
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    names, ids = planned_by(config)
    assert names == [image.name] and ids != first[1]
    assert planned_by(config) == ([], ids)


def test_resuming_opens_no_image_of_the_source_and_another_share_its_own_once(source, tmp_path):
    source("folder")
    run = partial(config_of, tmp_path / "run", tmp_path / "source")
    found = []
    for shards, resume in (("0/2", False), ("0/2", True), ("1/2", False)):
        with opened_images(tmp_path / "source") as names:
            curate(run(shards=shards, shard=2), resume=resume, components=fakes())
        found.append(names)
    everything = sorted(path.name for path in (tmp_path / "source").glob("*.png"))
    assert found[1] == []
    assert sorted(found[0] + found[2]) == sorted(everything * 2), "hashed by the first, and each drawn by one"
    assert len(set(found[2])) == len(found[2]) < len(everything)


# what reads whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growth")
    return finished(config_of(folder / "run", image_folder(folder / "source", 30))).store.address


def test_status_reads_the_marks_alone(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for path in (copy / "shards").glob("*.parquet"):
        path.unlink()
    assert str(status_of(copy)).splitlines()[1:] == str(status_of(run)).splitlines()[1:]
    assert status_of(copy).stages[0].done == 30


def test_an_image_is_read_once_in_a_pass_over_all(run, monkeypatch):
    reads, real = Counter(), run_module.read_images
    monkeypatch.setattr(run_module, "read_images", lambda file, at: reads.update([(file, at)]) or real(file, at))
    assert len(list(pairs_of(CurationRun(run)))) > 5
    assert len(reads) == 4 and set(reads.values()) == {1}


def test_a_plan_takes_few_bytes_for_a_record():
    def many():
        for number in range(COUNT):
            yield planned(f"a photograph of number {number}", {"kind": "x", "prompt": number}, f"{number}", "prompt")

    def held(count):
        tracemalloc.start()
        shards = cut_to_shards(islice(many(), count), 128)
        found, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sum(one.records for one in shards) == count and len(shards) == -(-count // 128)
        return found

    assert held(COUNT) < 80 * COUNT
    shards = cut_to_shards(islice(many(), 300), 128)
    assert [item.caption for one in shards for item in one.items] == [item.caption for item in islice(many(), 300)]
    assert [one.start for one in shards] == [0, 128, 256]


def test_exports_take_pairs_one_by_one(run, monkeypatch, tmp_path):
    alive = []

    def watched(*args, **kwargs):
        for number, one in enumerate(real(*args, **kwargs), start=1):
            alive.append(number)
            yield one

    real = export_module._pairs

    def slow(folder, pairs):
        taken = 0
        for taken, _ in enumerate(pairs, start=1):
            assert alive[-1] == taken, "no pair is made before it is written"
        return taken

    monkeypatch.setattr(export_module, "_pairs", watched)
    monkeypatch.setattr(export_module, "write_pairs", slow)
    assert export(run, to=tmp_path / "native").num_pairs == len(alive) > 5


@pytest.mark.parametrize("form", ["parquet", "pickapic"])
def test_a_table_of_several_files_says_how_many_there_are(run, monkeypatch, tmp_path, form):
    from rpo.data.readers import read_pairs

    monkeypatch.setattr("rpo.curation.export.PAIRS_PER_FILE", 4)
    done = export(run, form, to=tmp_path / form)
    names = sorted(path.name for path in (done.path / "data").iterdir())
    count = -(-done.num_pairs // 4)
    assert count > 2 and names == [f"train-{index:05}-of-{count:05}.parquet" for index in range(count)]
    whole = [(pair.prompt, pair.key) for pair in pairs_of(CurationRun(run))]
    assert [(pair.prompt, pair.key) for pair in read_pairs(done.path)] == whole


def test_histories_come_in_the_order_of_the_plan(run):
    assert [one.source.order for one in histories(CurationRun(run))] == list(range(30))
    assert render_page(CurationRun(run), 5).count("data:image") > 5


def test_a_selection_holds_few_of_many():
    def many():
        for number in range(COUNT):
            yield Fate(name_of(number), "too_close" if number % 7 else "kept_edit", (), 5)

    everything = list(many())
    tracemalloc.start()
    chosen = select(many(), 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    for outcome in ("too_close", "kept_edit"):
        best = sorted(one.record for one in everything if one.outcome == outcome)[:5]
        assert sorted(one.record for one in chosen if one.outcome == outcome) == best


def test_similarities_take_one_forward_for_all_images_of_a_size(tmp_path, monkeypatch):
    similarity = ImageSimilarity(str(save_clip(tmp_path)))
    rng = np.random.default_rng(0)

    def image(size):
        return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))

    pairs = [(image(size), image(size)) for size in (32, 40, 32, 32, 40)]
    alone = [similarity([pair])[0] for pair in pairs]
    calls = []
    embed = similarity.reward.embed_images
    monkeypatch.setattr(similarity.reward, "embed_images", lambda images: calls.append(len(images)) or embed(images))
    assert similarity(pairs) == pytest.approx(alone, abs=1e-5)
    assert sorted(calls) == [2, 2, 3, 3]
