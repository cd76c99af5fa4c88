import hashlib
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from rpo.data.preference import PairSet, PreferencePair, encode_png, pair_set
from tests.data.samples import noise, pair, png, write_file


def test_a_file_bytes_and_a_function_are_the_same_image(tmp_path):
    data = png(0)
    path = write_file(tmp_path / "a.png", data)
    sources = [data, path, str(path), path.read_bytes]
    pairs = [PreferencePair("p", source, png(1)) for source in sources]
    assert {record.key for record in pairs} == {pairs[0].key}
    assert all(np.array_equal(np.asarray(record.decode("chosen")), np.asarray(noise(0))) for record in pairs)


def test_key_depends_on_prompt_and_both_images_and_their_order():
    base = PreferencePair("p", png(0), png(1))
    others = [
        PreferencePair("q", png(0), png(1)),
        PreferencePair("p", png(2), png(1)),
        PreferencePair("p", png(0), png(2)),
        PreferencePair("p", png(1), png(0)),
    ]
    assert len({record.key for record in [base, *others]}) == 5
    assert base.key == PreferencePair("p", png(0), png(1), chosen_score=1.0, name="other", seed=3).key


def test_key_is_stable():
    digests = [hashlib.sha256(text).hexdigest() for text in (b"p", b"chosen", b"rejected")]
    record = PreferencePair("p", png(0), png(1))
    images = [hashlib.sha256(png(0)).hexdigest(), hashlib.sha256(png(1)).hexdigest()]
    assert record.facts("chosen").digest == images[0]
    assert record.key == hashlib.sha256("".join([digests[0], *images]).encode()).hexdigest()


def test_margin_needs_both_scores():
    assert pair(0, chosen_score=0.75, rejected_score=0.25).margin == 0.5
    assert pair(0, chosen_score=0.75).margin is None


def test_images_become_upright_8_bit_rgb():
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    noise(0, (10, 20)).save(stream, format="JPEG", exif=exif)
    record = PreferencePair("p", stream.getvalue(), png(1, (20, 10)))
    assert record.facts("chosen").size == (20, 10) == record.decode("chosen").size
    palette = io.BytesIO()
    noise(0).convert("P").save(palette, format="PNG")
    assert PreferencePair("p", palette.getvalue(), png(1)).decode("chosen").mode == "RGB"


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_the_size_from_the_header_is_the_size_of_the_pixels(turn, form):
    exif = Image.Exif()
    exif[0x0112] = turn
    record = PreferencePair("p", png(0, (10, 20), form=form, exif=exif), png(1))
    assert record.facts("chosen").size == record.decode("chosen").size


def test_missing_image_names_record_and_file(tmp_path):
    record = PreferencePair("p", png(0), tmp_path / "gone.png", name="records.jsonl:17")
    with pytest.raises(ValueError) as error:
        record.decode("rejected")
    assert str(error.value) == (
        f"records.jsonl:17: the rejected image ({tmp_path}/gone.png) does not exist; expected a readable image file; "
        "restore it or remove the record"
    )


def test_unreadable_file_names_record_and_file(tmp_path):
    record = PreferencePair("p", tmp_path, png(0), name="records.jsonl:4")
    with pytest.raises(ValueError, match=rf"^records\.jsonl:4: the chosen image \({tmp_path}\) cannot be read"):
        record.facts("chosen")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_truncated_image_names_record_and_file(tmp_path, form):
    path = write_file(tmp_path / "cut", png(0, (64, 64), form=form)[:-500])
    record = PreferencePair("p", path, png(0), name="records.jsonl:2")
    with pytest.raises(ValueError) as error:
        record.decode("chosen")
    message = str(error.value)
    assert message.startswith(f"records.jsonl:2: the chosen image ({path}) cannot be decoded (")
    assert message.endswith(
        "; expected a whole PNG, JPEG or WebP image of 8 or 16 bits; replace it or remove the record"
    )


def test_what_is_no_image_names_record_and_file():
    record = PreferencePair("p", b"junk", png(0), name="records.jsonl:2")
    with pytest.raises(ValueError, match=r"^records\.jsonl:2: the chosen image \(stored in the record\) cannot be"):
        record.facts("chosen")


def test_an_image_that_changes_in_use_is_refused(tmp_path):
    path = write_file(tmp_path / "a.png", png(0))
    record = PreferencePair("p", path, png(1), name="first")
    record.facts("chosen")
    path.write_bytes(png(5))
    with pytest.raises(ValueError, match=r"^first: the chosen image .* was changed while it was in use"):
        record.decode("chosen")


def test_pair_set_is_a_sequence_with_names():
    pairs = pair_set([pair(i, prompt="same" if i < 2 else "other") for i in range(4)], origin="mine")
    assert len(pairs) == 4
    assert [record.name for record in pairs] == ["mine:0", "mine:1", "mine:2", "mine:3"]
    assert pairs[-1].name == "mine:3"
    assert isinstance(pairs[1:3], PairSet)
    assert [record.name for record in pairs[1:3]] == ["mine:1", "mine:2"]
    assert pairs.prompts == ("same", "other")
    assert pickle.loads(pickle.dumps(pairs)) == pairs


def test_empty_set_is_refused():
    with pytest.raises(ValueError) as error:
        pair_set([])
    assert str(error.value) == "memory: no preference pairs; expected at least one; give records"


def test_two_sizes_are_refused_by_default():
    record = pair(0, rejected=png(1, (8, 12)), name="metadata.jsonl:5")
    with pytest.raises(ValueError) as error:
        pair_set([record])
    assert str(error.value) == (
        "metadata.jsonl:5: the chosen image is 16x16, the rejected one 8x12; expected images of one size; "
        "resize them, or pass allow_size_mismatch=True to let the transform bring them to one size"
    )
    assert len(pair_set([record], allow_size_mismatch=True)) == 1


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_empty_prompt_is_refused_by_default(prompt):
    record = pair(0, prompt=prompt, name="metadata.jsonl:5")
    with pytest.raises(ValueError) as error:
        pair_set([record])
    assert str(error.value) == (
        "metadata.jsonl:5: the prompt is empty; expected a caption; "
        "write one, or pass allow_empty_prompts=True to train on it without a caption"
    )
    assert pair_set([record], allow_empty_prompts=True)[0].prompt == prompt


def test_encode_png_loses_nothing():
    pixels = np.asarray(noise(3, (5, 7)))
    with Image.open(io.BytesIO(encode_png(pixels))) as image:
        assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)])
def test_encode_png_refuses_other_arrays(pixels):
    with pytest.raises(ValueError, match=r"expected uint8 \[height, width, 3\]"):
        encode_png(pixels)
