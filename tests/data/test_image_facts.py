"""An image that has not changed is not read again to be known; one that has is."""

import os

import datasets
import pytest

from rpo.data.image_facts import FactsFile
from rpo.data.preference import PreferencePair, pair_set, pairs_identity
from rpo.data.readers import read_pairs
from tests.trainers.test_dpo import toy_pairs

OLD = 1_700_000_000


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Pairs in files that nobody has touched for long."""
    monkeypatch.setattr("rpo.data.image_facts.time.time", lambda: os.stat(tmp_path).st_ctime + 3600)
    made = []
    for index, pair in enumerate(toy_pairs(3)):
        paths = [tmp_path / f"{index}-{side}.png" for side in ("chosen", "rejected")]
        for path, side in zip(paths, ("chosen", "rejected"), strict=True):
            path.write_bytes(pair.encoded(side))
        made.append((pair.prompt, *paths))
    return lambda: pair_set([PreferencePair(*one) for one in made], allow_size_mismatch=True)


def identity(pairs, file):
    facts = FactsFile(file)
    facts.recall(pairs)
    found = pairs_identity(pairs)
    facts.remember()
    return found


def test_the_second_start_reads_no_image(source, tmp_path, monkeypatch):
    first = identity(source(), tmp_path / "facts.sqlite")
    assert first == pairs_identity(source())
    before = (tmp_path / "facts.sqlite").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(PreferencePair, "encoded", lambda *_: pytest.fail("read"))
        assert identity(source(), tmp_path / "facts.sqlite") == first
    assert (tmp_path / "facts.sqlite").read_bytes() == before
    assert [pair.facts("chosen") for pair in source()] == [pair.facts("chosen") for pair in toy_pairs(3)]


def test_a_changed_image_is_read_again_though_size_and_date_are_the_same(source, tmp_path):
    first = identity(source(), tmp_path / "facts.sqlite")
    path = tmp_path / "1-rejected.png"
    content, times = path.read_bytes(), os.stat(path)
    path.write_bytes(content[:-1] + b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = identity(source(), tmp_path / "facts.sqlite")
    assert {name for name in first if first[name] != second[name]} == {"rejected images"}


def test_what_changed_just_now_is_not_kept(source, tmp_path, monkeypatch):
    monkeypatch.setattr("rpo.data.image_facts.time.time", lambda: os.stat(tmp_path / "0-chosen.png").st_ctime + 1)
    identity(source(), tmp_path / "facts.sqlite")
    assert not (tmp_path / "facts.sqlite").exists()


def test_bytes_in_memory_are_left_alone_and_cells_of_a_table_kept(tmp_path, monkeypatch):
    identity(toy_pairs(2), tmp_path / "facts.sqlite")
    assert not (tmp_path / "facts.sqlite").exists()
    rows = [
        {"prompt": p.prompt, "chosen": {"bytes": p.chosen}, "rejected": {"bytes": p.rejected}} for p in toy_pairs(3)
    ]
    images = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    )
    datasets.Dataset.from_list(rows, features=images).to_parquet(tmp_path / "pairs.parquet")

    def read():
        return read_pairs(tmp_path / "pairs.parquet", allow_size_mismatch=True, cache_dir=tmp_path / "cache")

    first = identity(read(), tmp_path / "facts.sqlite")
    with monkeypatch.context() as patched:
        patched.setattr(PreferencePair, "encoded", lambda *_: pytest.fail("read"))
        assert identity(read(), tmp_path / "facts.sqlite") == first
    rows[1]["chosen"] = {"bytes": toy_pairs(1)[0].rejected}
    datasets.Dataset.from_list(rows, features=images).to_parquet(tmp_path / "pairs.parquet")
    second = identity(read(), tmp_path / "facts.sqlite")
    assert {name for name in first if first[name] != second[name]} == {"chosen images"}


def test_a_damaged_file_is_named(source, tmp_path):
    (tmp_path / "facts.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match=r"facts\.sqlite is damaged .*; delete it: it will be made again"):
        FactsFile(tmp_path / "facts.sqlite").recall(source())
