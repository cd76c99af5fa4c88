"""Shards of tar files: read by place, never unpacked."""

import io
import json
import pickle
import tarfile

import pytest

from rpo.data import image_facts
from rpo.data.image_facts import stamp_of
from rpo.data.preference import pairs_identity
from rpo.data.readers import read_pairs, scan
from rpo.data.tar_shards import TarMember
from tests.data.samples import pair, png


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def of_pair(index, key=None):
    key = key or f"dir/{index:06}"
    more = {"json": json.dumps({"prompt": f"prompt {index}", "seed": index, "mine": 1}).encode()}
    if index % 2:
        more = {"txt": f"prompt {index}\n".encode()}
    files = {"chosen.png": png(2 * index), "rejected.png": png(2 * index + 1), **more}
    return {f"{key}.{name}": data for name, data in files.items()}


def test_shards_are_one_set(tmp_path):
    shard(tmp_path / "set/00001.tar", of_pair(2))
    shard(tmp_path / "set/00000.tar", of_pair(0) | of_pair(1))
    pairs = read_pairs(tmp_path / "set")
    assert [record.key for record in pairs] == [pair(index).key for index in range(3)]
    assert [record.name for record in pairs] == ["00000.tar:dir/000000", "00000.tar:dir/000001", "00001.tar:dir/000002"]
    assert (pairs[2].seed, pairs.ignored_columns) == (2, ("mine",))
    assert [record.key for record in read_pairs(tmp_path / "set/00001.tar")] == [pair(2).key]
    assert read_pairs(tmp_path / "set", limit=1)[0].prompt == "prompt 0"
    assert pairs_identity(pickle.loads(pickle.dumps(pairs))) == pairs_identity(pairs)


def test_images_lie_where_they_are_until_they_are_asked_for(tmp_path, monkeypatch):
    path = shard(tmp_path / "a.tar", of_pair(0))
    pairs = read_pairs(path, allow_size_mismatch=True)
    assert isinstance(pairs[0].chosen, TarMember) and pairs[0].encoded("chosen") == png(0)
    assert stamp_of(pairs[0].chosen) == ""  # written just now
    monkeypatch.setattr(image_facts, "SETTLED_SECONDS", -1)
    stamps = [stamp_of(side) for side in (pairs[0].chosen, pairs[0].rejected, path)]
    assert len(set(stamps)) == 3 and all(stamp.startswith(stamps[2]) for stamp in stamps)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match="a.tar ends within dir/000000.chosen.png"):
        pairs[0].encoded("chosen")


def test_what_a_system_left_behind_is_no_member(tmp_path):
    hidden = {name: b"\0\5" for name in ("./._a.chosen.png", "__MACOSX/._a.chosen.png", "set/.DS_Store")}
    pairs = read_pairs(shard(tmp_path / "a.tar", hidden | of_pair(0, "./a") | of_pair(1, "../b")))
    assert [record.key for record in pairs] == [pair(0).key, pair(1).key]


def test_columns_of_other_forms_are_read_too(tmp_path):
    members = {"a.jpg_0.png": png(1), "a.jpg_1.jpg": png(0), "a.json": b'{"caption": "prompt 0", "label_0": 0}'}
    assert read_pairs(shard(tmp_path / "a.tar", members))[0].key == pair(0).key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.json": b"{"}, r"^s.tar:a \(json\): not JSON"),
        ({"a.json": b"[]"}, r"^s.tar:a \(json\): a JSON list"),
        ({"a.json": b'{"seed": 1}'}, "^s.tar:a: found the columns chosen, rejected, seed; expected"),
        ({"a.txt": b"twice"}, "^s.tar:a: has prompt twice"),
        ({"a.chosen.jpg": png(3)}, "^s.tar:a: has chosen twice"),
        ({"a.chosen.png": b"junk"}, "^s.tar:a: the chosen image .* cannot be decoded"),
    ],
)
def test_a_broken_key_is_named_and_can_be_skipped(tmp_path, change, message):
    path = shard(tmp_path / "s.tar", of_pair(0, "a") | change | of_pair(1))
    with pytest.raises(ValueError, match=message):
        read_pairs(path)
    assert [record.key for record in read_pairs(path, skip_faulty=True)] == [pair(1).key]


def test_a_shard_that_is_cut_or_damaged_is_named(tmp_path):
    data = shard(tmp_path / "s.tar", of_pair(0) | of_pair(1)).read_bytes()
    second = TarMember(tmp_path / "s.tar", "", 0, 0)
    assert second() == b""
    place = scan(tmp_path / "s.tar").pairs[1].chosen.start - 512
    damages = (
        data[:2000],
        data[: place + 100],
        data[:place],  # where the first pair ends
        data[:place] + b"x" * 512 + data[place + 512 :],
        data + data,
        b"junk" * 300,
        b"",
    )
    for number, damaged in enumerate(damages):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{number}.tar: no whole tar file"):
            read_pairs(path)


def test_links_lead_nowhere(tmp_path):
    path = shard(tmp_path / "s.tar", of_pair(0, "a"))
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("a.other.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    pairs = read_pairs(path)
    assert pairs[0].key == pair(0).key and pairs.ignored_columns == ("mine",)
