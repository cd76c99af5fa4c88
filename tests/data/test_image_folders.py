"""Two folders of images, matched by name."""

import pytest

from rpo.data.readers import read_pairs, scan
from tests.data.samples import pair, png, write_file


def folders(root, sides=("chosen", "rejected"), count=2, inner=""):
    for index in range(count):
        for place, side in enumerate(sides):
            write_file(root / side / f"{inner}{index}.png", png(2 * index + place))
        write_file(root / sides[0] / f"{inner}{index}.txt", f"prompt {index}\n".encode())
    return root


@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("win", "lose"), ("Winner", "loser"), ("good", "bad")])
@pytest.mark.parametrize("inner", ["", "cats/"])
def test_images_of_one_name_are_a_pair(tmp_path, sides, inner):
    pairs = read_pairs(folders(tmp_path, sides, inner=inner))
    assert [record.key for record in pairs] == [pair(0).key, pair(1).key]
    assert [record.name for record in pairs] == [f"{sides[0]}/{inner}0", f"{sides[0]}/{inner}1"]


def test_suffixes_may_differ_and_the_caption_may_lie_on_either_side(tmp_path):
    folders(tmp_path)
    (tmp_path / "chosen/0.png").rename(tmp_path / "chosen/0.JPG")
    (tmp_path / "chosen/1.txt").rename(tmp_path / "rejected/1.txt")
    write_file(tmp_path / "rejected/0.txt", b"prompt 0")
    assert [record.key for record in read_pairs(tmp_path)] == [pair(0).key, pair(1).key]


def test_what_does_not_belong_together_is_named_and_can_be_skipped(tmp_path):
    folders(tmp_path, count=6)
    (tmp_path / "rejected/1.png").unlink()
    (tmp_path / "chosen/2.png").unlink()
    write_file(tmp_path / "rejected/3.jpg", png(9))
    (tmp_path / "chosen/4.txt").unlink()
    write_file(tmp_path / "rejected/5.txt", b"another")
    assert [fault.split(";")[0] for fault in scan(tmp_path).faults] == [
        "chosen/1: rejected/ has no image of this name",
        "rejected/2: chosen/ has no image of this name",
        "chosen/3: rejected/ has 2 images of this name",
        "chosen/4: has no caption chosen/4.txt",
        "chosen/5: has different captions on the two sides",
    ]
    assert [record.key for record in read_pairs(tmp_path, skip_faulty=True)] == [pair(0).key]


def test_what_a_system_left_behind_is_no_image(tmp_path):
    folders(tmp_path)
    for name in ("._0.png", ".ipynb_checkpoints/0.png", "__MACOSX/0.png"):
        write_file(tmp_path / "chosen" / name, b"\0\5")
    assert len(read_pairs(tmp_path)) == 2


def test_an_image_outside_the_folder_is_not_read(tmp_path):
    folders(tmp_path / "set")
    outside = write_file(tmp_path / "secret.png", png(8))
    (tmp_path / "set/chosen/0.png").unlink()
    (tmp_path / "set/chosen/0.png").symlink_to(outside)
    assert "leads out of the set's folder" in scan(tmp_path / "set").faults[0]


def test_two_couples_of_folders_are_refused(tmp_path):
    folders(folders(tmp_path), ("win", "lose"))
    with pytest.raises(ValueError, match="has chosen/ with rejected/ and win/ with lose/; expected one of them"):
        read_pairs(tmp_path)
