import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from rpo.cli.main import main
from rpo.data.check import check_pairs, format_report
from rpo.data.preference import pair_set
from rpo.data.writers import write_pairs
from rpo.errors import InputError
from tests.data.samples import pair, png, write_file

ROOT = Path(__file__).parents[2]


def test_a_sound_set(tmp_path):
    scores = [(0.9, 0.1), (0.5, 0.7), (1.0, 0.5)]
    prompts = ["a", "a b", "a b c"]
    write_pairs(
        tmp_path,
        [pair(i, prompt=prompts[i], chosen_score=high, rejected_score=low) for i, (high, low) in enumerate(scores)],
    )
    seen = []
    report = check_pairs(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert report.is_trainable
    assert (report.records, report.distinct_prompts, report.prompt_words) == (3, 3, (1, 2, 3))
    assert report.sizes == {(16, 16): 6}
    assert sorted(report.margins) == pytest.approx([-0.2, 0.5, 0.8])
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert format_report(report) == (
        f"{tmp_path}/metadata.jsonl\n"
        "  records    3\n"
        "  prompts    3 distinct, 1 to 3 words (median 2)\n"
        "  images     16x16 (6)\n"
        "  margins    -0.2 to 0.8 (median 0.5) over 3 records; 33.3% negative\n"
        "  can be trained on as it is"
    )


def faulty_folder(folder):
    cut = write_file(folder / "cut.png", png(0, (64, 64))[:-200])
    write_pairs(folder, [pair(0), pair(1), pair(2, rejected=png(5, (8, 12))), pair(3, chosen=png(7))])
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    swapped = first | {
        "chosen_file_name": first["rejected_file_name"],
        "rejected_file_name": first["chosen_file_name"],
    }
    lines += [
        '{"prompt": "p", "chosen": "gone.png", "rejected": "cut.png"}',
        "{torn",
        lines[1],
        json.dumps(swapped),
        lines[1].replace("prompt 1", ""),
        lines[1].replace('"key"', '"mood"'),
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return cut


def test_every_fault_is_found_in_one_pass(tmp_path):
    cut = faulty_folder(tmp_path)
    report = check_pairs(tmp_path)
    assert not report.is_trainable
    assert report.records == 9
    assert [fault.split(" (")[0] for fault in report.faults] == ["metadata.jsonl:6: not JSON"]
    missing, corrupt = report.unreadable
    assert missing.startswith(f"metadata.jsonl:5: the chosen image ({tmp_path}/gone.png) does not exist")
    assert corrupt.startswith(f"metadata.jsonl:5: the rejected image ({cut}) cannot be decoded")
    assert report.mismatched_sizes == ["metadata.jsonl:3 (16x16 and 8x12)"]
    assert report.same_image == ["metadata.jsonl:4"]
    assert report.duplicates == ["metadata.jsonl:7 (of metadata.jsonl:2)", "metadata.jsonl:10 (of metadata.jsonl:2)"]
    assert report.conflicts == ["metadata.jsonl:8 (against metadata.jsonl:1)"]
    assert report.empty_prompts == ["metadata.jsonl:9"]
    assert report.ignored_columns == ("mood",)
    assert not report.margins
    assert report.sizes == {(16, 16): 15, (8, 12): 1}
    text = format_report(report)
    for line in (
        "  margins    no record has both scores",
        "  not used   columns mood",
        "  unreadable images: 2",
        "  duplicates: 2",
        "    metadata.jsonl:8 (against metadata.jsonl:1)",
        "  cannot be trained on as it is",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("columns", "is_trainable"),
    [
        ({}, True),
        ({"prompt": ""}, False),
        ({"rejected": png(1, (8, 8))}, False),
        ({"rejected": png(1)[:-40]}, False),
        ({"rejected": "nowhere.png"}, False),
        ({"rejected": png(0)}, False),
        ({"seed": "x"}, False),
    ],
)
def test_one_broken_record_makes_a_set_untrainable(tmp_path, columns, is_trainable):
    given = {"prompt": "p", "chosen": png(0), "rejected": png(1)} | columns
    for side in ("chosen", "rejected"):
        if isinstance(given[side], bytes):
            given[side] = write_file(tmp_path / f"{side}.png", given[side]).name
    write_file(tmp_path / "metadata.jsonl", json.dumps(given).encode())
    assert check_pairs(tmp_path).is_trainable == is_trainable


def test_long_lists_are_cut_short():
    report = check_pairs(pair_set([pair(0) for _ in range(9)]))
    assert len(report.duplicates) == 8
    assert format_report(report).splitlines()[-7:-1] == [
        *[f"    memory:{i} (of memory:0)" for i in range(1, 6)],
        "    … and 3 more",
    ]


def test_an_empty_set_is_reported_and_not_trainable(tmp_path):
    write_file(tmp_path / "metadata.jsonl", b"")
    report = check_pairs(tmp_path)
    assert not report.is_trainable
    assert format_report(report).splitlines()[1:4] == [
        "  records    0",
        "  prompts    0 distinct, 0 to 0 words (median 0)",
        "  images     none",
    ]


def test_what_decoding_changed_is_counted(tmp_path):
    clear = Image.new("RGBA", (16, 16), (1, 2, 3, 0))
    stream = io.BytesIO()
    clear.save(stream, "PNG")
    exif = Image.Exif()
    exif[274] = 3
    write_pairs(tmp_path, [pair(0), pair(1, chosen=stream.getvalue()), pair(2, chosen=png(9, exif=exif))])
    report = check_pairs(tmp_path)
    assert report.changes == {"transparent, laid on white": 1, "turned upright": 1}
    assert "  decoded    1 transparent, laid on white, 1 turned upright" in format_report(report)
    assert report.is_trainable


def test_one_image_in_two_files_is_one_image(tmp_path):
    write_pairs(tmp_path, [pair(0), pair(1, chosen=png(3, compress_level=1), rejected=png(3))])
    report = check_pairs(tmp_path)
    assert report.same_image == ["metadata.jsonl:2"] and not report.is_trainable


def test_captions_that_are_cut_are_counted_by_words_and_by_a_checkpoint(tmp_path):
    long = "red circle above a blue square and a " * 4
    write_pairs(tmp_path, [pair(0, prompt=long + "green star"), pair(1, prompt=long + "cat"), pair(2)])
    assert check_pairs(tmp_path).long_captions == ""  # that many words may well fit
    said = check_pairs(tmp_path, model="shapes").long_captions
    assert said == (
        "2 of 3 captions are too long for the 16 tokens of shapes and are cut, and 2 of them became equal to another"
    )
    assert f"  captions   {said}" in format_report(check_pairs(tmp_path, model="shapes"))


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        ({}, 0),
        ({"prompt": ""}, 1),
        ({"rejected": png(0)}, 1),
        ({"rejected": png(1, (8, 8))}, 1),
        ({"rejected": b"x"}, 1),
    ],
)
def test_the_exit_code_says_whether_it_can_be_trained_on(tmp_path, capsys, columns, code):
    given = {"prompt": "p", "chosen": png(0), "rejected": png(1)} | columns
    for side in ("chosen", "rejected"):
        given[side] = write_file(tmp_path / f"{side}.png", given[side]).name
    write_file(tmp_path / "metadata.jsonl", json.dumps(given).encode())
    assert main(["data", "check", str(tmp_path)]) == code
    assert ("cannot be trained on" in capsys.readouterr().out) == (code == 1)
    assert main(["data", "check", str(tmp_path), "--split", "nope"]) == 2


def test_a_terminal_that_cannot_show_a_caption_ends_nothing(tmp_path):
    write_pairs(tmp_path, [pair(0, prompt="学習"), pair(0, prompt="学習")])
    home = tmp_path.rename(tmp_path.with_name("学習"))
    command = [sys.executable, "-m", "rpo.cli", "data", "check", str(home)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT, check=False)
    assert (done.returncode, b"\\u5b66" in done.stdout) == (0, True)


@pytest.mark.parametrize("step", [0, -8, 128])
def test_a_step_of_no_buckets_is_told(tmp_path, step):
    write_pairs(tmp_path, [pair(0)])
    with pytest.raises(InputError, match=f"bucket_step is {step}; expected 1 to 64"):
        check_pairs(tmp_path, buckets=(64, step))


def test_the_buckets_of_a_run_are_told(tmp_path, capsys):
    sizes = [(64, 64), (64, 64), (64, 32)]
    write_pairs(
        tmp_path, [pair(i, chosen=png(2 * i, one), rejected=png(2 * i + 1, one)) for i, one in enumerate(sizes)]
    )
    assert check_pairs(tmp_path, buckets=(64, 32)).buckets == (
        "2 buckets (height x width): 64x64 has most pairs (2), 32x64 fewest (1)"
    )
    assert main(["data", "check", str(tmp_path), "--buckets", "64", "32"]) == 0
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path), "--buckets", "64", "64"]) == 1
    told = capsys.readouterr().out
    assert "  buckets    1 bucket (height x width): 64x64 (2 pairs)" in told
    assert "  pairs smaller than every bucket: 1\n    metadata.jsonl:3 (64x32)" in told
    main(["data", "check", str(tmp_path)])
    assert "  buckets " not in capsys.readouterr().out
