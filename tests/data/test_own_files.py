"""A set names regular files of its own folder, whatever form it has; nothing is fetched."""

import io
import json
import os
import socket
import zipfile
from pathlib import Path

import datasets
import pytest

from rpo.curation.curate_config import SourceConfig
from rpo.curation.sources import plan_import
from rpo.data.own_files import is_own, own_file, read_regular
from rpo.data.preference import PreferencePair
from rpo.data.readers import read_pairs
from rpo.data.tables import Home, encoded_bytes
from tests.data.samples import png, write_file


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A set's folder with one image, beside an image that is not the set's; nothing may be connected to."""

    def refuse(*_):
        raise AssertionError("something is fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path / "private.png", png(1))
    write_file(tmp_path / "set" / "img" / "a.png", png(0))
    return tmp_path / "set"


def names(home):
    (home / "link.png").symlink_to(home.parent / "private.png")
    (home / "out").symlink_to(home.parent)
    (home / "circle.png").symlink_to(home / "circle.png")
    return {
        "../private.png": "leads out",
        "img/../../private.png": "leads out",
        "img/../out/private.png": "leads out",
        "link.png": "leads out",
        str(home.parent / "private.png"): "is a path from the root",
        "/dev/zero": "is a path from the root",
        f"file://{home}/img/a.png": "is an address",
        "https://example.org/a.png": "is an address",
        "hf://datasets/a/b/a.png": "is an address",
        "a\0.png": "holds a NUL character",
    }


def test_names_that_are_not_the_sets_are_refused(home):
    for name, reason in names(home).items():
        with pytest.raises(ValueError, match=reason):
            own_file(home, name)
    assert not is_own(home, home / "circle.png") or not (home / "circle.png").exists()
    assert own_file(home, "img/../img/a.png").read_bytes() == png(0)


def test_links_inside_a_set_and_to_its_folder_are_its_own(home):
    (home / "b.png").symlink_to("img/a.png")
    (home.parent / "alias").symlink_to(home)
    assert own_file(home.parent / "alias", "b.png").read_bytes() == png(0)


def test_lines_and_cells_and_imports_obey_alike(home):
    for name, reason in names(home).items():
        row = {"prompt": "p", "chosen": "img/a.png", "rejected": name}
        (home / "metadata.jsonl").write_text(json.dumps(row), "utf-8")
        with pytest.raises(ValueError, match=rf"^metadata\.jsonl:1: rejected .*{reason}"):
            read_pairs(home)
        with pytest.raises(ValueError, match=reason):
            encoded_bytes({"bytes": None, "path": name}, Home(home, (home,)))
        (home / "metadata.jsonl").write_text(json.dumps({"file_name": name, "caption": "c"}), "utf-8")
        with pytest.raises(ValueError, match=rf"^metadata\.jsonl:1: file_name .*{reason}"):
            plan_import(SourceConfig(kind="folder", path=str(home), caption_column="caption"))


def test_a_link_beside_its_caption_that_leads_out_is_not_imported(home):
    (home / "b.png").symlink_to(home.parent / "private.png")
    for name in ("b.txt", "img/a.txt"):
        (home / name).write_text("c", "utf-8")
    with pytest.raises(ValueError, match=r"^b\.png is a link that leads out of"):
        plan_import(SourceConfig(kind="folder", path=str(home)))


def table(home, name, **features):
    columns = {"prompt": ["p"], "chosen": [png(0)], "rejected": [name]}
    datasets.Dataset.from_dict(columns).to_parquet(home / "part.parquet")
    return home / "part.parquet"


@pytest.mark.parametrize("form", ["file", "folder", "saved"])
@pytest.mark.parametrize("name", ["https://example.org/a.png", "../private.png", "private.png", "{}/private.png"])
def test_tables_name_files_of_their_own_folder(home, form, name):
    name = name.format(home.parent)
    path = table(home, name)
    if form == "saved":
        rows = datasets.Dataset.from_dict({"prompt": ["p"], "chosen": [png(0)], "rejected": [name]})
        rows.save_to_disk(home / "saved")
    source = {"file": path, "folder": home / "only", "saved": home / "saved"}[form]
    if form == "folder":
        source.mkdir()
        path.rename(source / path.name)
    with pytest.raises(ValueError, match=r"row 0: the rejected image .* (cannot be read|does not exist)"):
        read_pairs(source, cache_dir=home.parent / "cache")
    with pytest.raises(ValueError, match="the image (cannot be read|does not exist)"):
        config = SourceConfig(kind="table", path=str(source), image_column="rejected", caption_column="prompt")
        plan_import(config)


def test_a_pipe_or_device_is_never_opened(home):
    os.mkfifo(home / "pipe.png")
    (home / "zero.png").symlink_to("/dev/zero")
    row = {"prompt": "p", "chosen": "img/a.png", "rejected": "pipe.png"}
    (home / "metadata.jsonl").write_text(json.dumps(row), "utf-8")
    with pytest.raises(
        ValueError, match=r"^metadata\.jsonl:1: the rejected image .* a pipe, socket or device, not a reg"
    ):
        read_pairs(home)
    for place in (home / "pipe.png", "/dev/zero", home):
        with pytest.raises(ValueError, match="not a regular file"):
            read_regular(place)
        with pytest.raises(ValueError, match="not a regular file"):
            PreferencePair("p", place, png(0)).facts("chosen")


def snapshot(root):
    """A repository of the hub cache: files of the snapshot are links to its blobs."""
    repository = root / "datasets--owner--name"
    folder = repository / "snapshots" / "0123abc"
    for number in range(2):
        write_file(repository / "blobs" / f"{number}", png(number))
        (folder / "img").mkdir(parents=True, exist_ok=True)
        (folder / "img" / f"{number}.png").symlink_to(f"../../../blobs/{number}")
    row = {"prompt": "p", "chosen": "img/0.png", "rejected": "img/1.png"}
    write_file(repository / "blobs" / "2", json.dumps(row).encode())
    (folder / "metadata.jsonl").symlink_to("../../blobs/2")
    return folder


def test_a_snapshot_of_the_hub_cache_keeps_working_and_stays_in_its_repository(tmp_path):
    folder = snapshot(tmp_path)
    assert read_pairs(folder)[0].encoded("rejected") == png(1)
    other = snapshot(tmp_path / "other")
    (folder / "img" / "1.png").unlink()
    (folder / "img" / "1.png").symlink_to(other.parent.parent / "blobs" / "1")
    with pytest.raises(ValueError, match="leads out"):
        read_pairs(folder)


def test_blobs_that_are_themselves_a_link_open_no_way_out(tmp_path):
    folder = snapshot(tmp_path)
    blobs = folder.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out"):
        read_pairs(folder)


def test_a_stream_fetches_from_its_own_repository_only(monkeypatch):
    import fsspec

    opened = []
    monkeypatch.setattr(fsspec, "open", lambda address, _: opened.append(address) or io.BytesIO(png(0)))
    home = Home(None, (), "owner/name")
    for address in ("hf://datasets/owner/name@main/a.png", "zip://a.png::hf://datasets/owner/name@main/a.zip"):
        assert encoded_bytes(address, home) == png(0)
    assert len(opened) == 2
    for address in (
        "hf://datasets/owner/other@main/a.png",
        "hf://datasets/owner/name@main/../../other/a.png",
        "https://example.org/a.png",
        "http://x::hf://datasets/owner/name@main/a.png",
        "a.png",
    ):
        with pytest.raises(ValueError, match="is no file of this table; expected the image itself"):
            encoded_bytes(address, home)
    assert len(opened) == 2


def test_an_archive_of_images_is_read_from_where_it_was_unpacked(home):
    row = {"prompt": "p", "chosen_file_name": "0.png", "rejected_file_name": "1.png"}
    with zipfile.ZipFile(home / "train.zip", "w") as archive:
        archive.writestr("metadata.jsonl", json.dumps(row))
        for number in range(2):
            archive.writestr(f"{number}.png", png(number))
    (home / "img" / "a.png").unlink()
    assert read_pairs(home, cache_dir=home.parent / "cache")[0].encoded("rejected") == png(1)
    (home / "train.zip").rename(home.parent / "private.zip")
    with pytest.raises(ValueError, match="is an address, and nothing is fetched"):
        encoded_bytes(f"zip://1.png::{home.parent}/private.zip", Home(home, (home,)))


@pytest.mark.parametrize("form", ["jsonl", "file", "saved"])
def test_a_split_that_is_not_there_is_refused(home, form):
    path = table(home, png(1))
    source = {"file": path, "jsonl": home, "saved": home / "saved"}[form]
    datasets.Dataset.from_parquet(str(path), cache_dir=str(home.parent / "c")).save_to_disk(home / "saved")
    if form == "jsonl":
        (home / "metadata.jsonl").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r"there is no split 'test'; expected one of train; name one"):
        read_pairs(source, split="test", cache_dir=home.parent / "cache")


def test_two_forms_in_one_table_are_refused_and_either_can_be_asked_for(home):
    images = {"chosen": [png(0)], "rejected": [png(1)], "jpg_0": [png(1)], "jpg_1": [png(0)]}
    both = {"prompt": ["p"], "caption": ["q"], "label_0": [1.0], **images}
    datasets.Dataset.from_dict(both).to_parquet(home / "both.parquet")
    cache = {"cache_dir": home.parent / "cache"}
    with pytest.raises(ValueError, match="has the columns of 2 forms, native and pickapic, which may contradict each"):
        read_pairs(home / "both.parquet", **cache)
    assert read_pairs(home / "both.parquet", form="native", **cache)[0].prompt == "p"
    assert read_pairs(home / "both.parquet", form="pickapic", **cache)[0].prompt == "q"
    row = {"prompt": "p", "chosen": "img/a.png", "rejected": "x", "chosen_file_name": "x", "rejected_file_name": "y"}
    (home / "metadata.jsonl").write_text(json.dumps(row), "utf-8")
    with pytest.raises(ValueError, match=r"^metadata\.jsonl:1: has the columns of 2 forms, native and files"):
        read_pairs(home)


def test_a_relative_folder_is_that_of_the_folder_one_is_in(tmp_path, monkeypatch):
    for name in ("here", "there"):
        write_file(tmp_path / name / "set/a.png", png(1))
        monkeypatch.chdir(tmp_path / name)
        assert own_file(Path("set"), "a.png") == Path("set/a.png")
