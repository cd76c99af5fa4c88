"""All text is UTF-8, or refused by name; and nothing in the package leaves an encoding to the machine."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from rpo.config.load import load_config
from rpo.curation.curate_config import SourceConfig
from rpo.curation.sources import plan_import
from rpo.data.prompts import read_prompts
from rpo.data.readers import read_pairs
from rpo.files.text import decode_text, lines, read_lines_of, read_text, text_fault, write_text
from rpo.trainers.dpo_config import DPOConfig

ROOT = Path(__file__).parent.parent
FOREIGN = [
    ("UTF-16", "a café\nb".encode("utf-16"), "line 1, byte", "iconv -f UTF-16 "),
    ("UTF-16 of the other order", b"\xfe\xff" + "a café\n".encode("utf-16-be"), "line 1, byte", "iconv -f UTF-16 "),
    ("UTF-16 without its mark", "a cafe\nb\n".encode("utf-16-le"), "line 1, byte 2", "iconv -f UTF-16LE "),
    ("UTF-32", "a café\n".encode("utf-32"), "line 1, byte", "iconv -f UTF-32 "),
    ("Windows-1252", "one\ntwo\na ’quoted’ café\n".encode("cp1252"), "line 3, byte 3", "iconv -f WINDOWS-1252 "),
    ("ISO-8859-1", "one\na café\n".encode("latin-1"), "line 2, byte 6", "iconv -f WINDOWS-1252 "),
    ("another script", "一个红色的圆圈\n".encode("gb18030"), "line 1, byte 3", "iconv -f ENCODING "),
    ("a NUL byte", b"a red\0 circle\n", "line 1, byte 6", "look at what wrote the file"),
]


@pytest.mark.parametrize(("what", "data", "place", "remedy"), FOREIGN)
def test_other_encodings_are_refused_with_place_name_and_remedy(tmp_path, what, data, place, remedy):
    file = tmp_path / "captions.txt"
    file.write_bytes(data)
    for read in (read_text, lambda path: list(read_lines_of(path)), lambda path: read_prompts(str(path), seed=0)):
        with pytest.raises(ValueError) as error:
            read(file)
        message = str(error.value)
        assert message.startswith(f"{file}, {place}") and what.split()[0] in message and remedy in message
        assert "UTF-8" in message


def test_what_is_read_is_what_was_written(tmp_path):
    text = "ein Käse\u2028mit Löchern\x85und \x0b\x0c\x1c\r Ähnlichem\n学習\n"
    write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_bytes() == text.encode()
    assert read_text(tmp_path / "a.txt") == text
    assert lines(text) == text.split("\n")[:2]
    assert list(read_lines_of(tmp_path / "a.txt")) == [(1, lines(text)[0]), (2, "学習")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_and_marks(tmp_path, end):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbf" + f"one{end}{end}two\u2028half".encode())
    assert lines(read_text(file)) == [text for _, text in read_lines_of(file)] == ["one", "", "two\u2028half"]
    file.write_bytes(file.read_bytes() + end.encode() + file.read_bytes())  # as `cat` joins them
    assert lines(read_text(file))[3] == "one" == list(read_lines_of(file))[3][1]
    assert lines("") == [] and decode_text(b"", "x") == ""
    file.write_bytes(f"one{end}".encode() + b"\xef\xbb\xbf")  # an empty file was joined to it
    assert lines(read_text(file)) == [text for _, text in read_lines_of(file)] == ["one", ""]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".tsv", ".yaml", ".parquet", ".CSV"])
def test_a_table_is_no_file_of_prompts(tmp_path, suffix):
    file = tmp_path / f"prompts{suffix}"
    file.write_text("a red circle\n", "utf-8")
    with pytest.raises(ValueError, match="whose lines are not prompts; expected a text file with one prompt per line"):
        read_prompts(str(file), seed=0)


@pytest.mark.parametrize(
    ("prompt", "fault"), [("", "is empty"), (" \n", "is empty"), ("a\0b", "NUL"), ("\ud800", "half")]
)
def test_prompts_that_are_no_text_are_named(tmp_path, prompt, fault):
    rows = [{"prompt": "good"}, {"prompt": prompt}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    with pytest.raises(ValueError, match=rf"p\.jsonl:2.*: .*{fault}"):
        read_prompts(str(tmp_path / "p.jsonl"), seed=0)


def test_captions_of_pairs_that_are_no_text_are_named(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    row = {"prompt": "a\0b", "chosen": "a.png", "rejected": "b.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row), "utf-8")
    with pytest.raises(ValueError, match=r"^metadata\.jsonl:1: prompt holds a NUL character; expected plain text"):
        read_pairs(tmp_path)
    assert text_fault("ä\u2028\U0001f600") == ""


def test_captions_beside_images_keep_their_separators_and_lose_their_mark(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("\ufeffa poster\u2028of a fox\r\n".encode())
    assert plan_import(SourceConfig(kind="folder", path=str(tmp_path))).items[0].caption == "a poster\u2028of a fox"
    (tmp_path / "a.txt").write_bytes("Käse".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.txt, line 1, byte 4: .* UTF-16; "):
        plan_import(SourceConfig(kind="folder", path=str(tmp_path)))


def test_a_configuration_is_utf_8_with_or_without_a_mark(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes("\ufeffoutput: Läufe/学習\r\n".encode())
    assert load_config(DPOConfig, file).output == "Läufe/学習"
    file.write_bytes("output: Läufe\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"run\.yaml, line 1, byte 10: .*Windows-1252"):
        load_config(DPOConfig, file)


SOURCES = [path for part in ("rpo", "examples", "pipelines", "benchmarks") for path in (ROOT / part).rglob("*.py")]
TEXT_METHODS = {"read_text": 0, "write_text": 1}
"""Method, and which positional argument is the encoding."""


def leaves_encoding_open(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if any(word.arg == "encoding" for word in call.keywords):
        return False
    if name in TEXT_METHODS:  # the functions of rpo.files.text are no methods
        return isinstance(call.func, ast.Attribute) and len(call.args) <= TEXT_METHODS[name]
    if name not in ("open", "fdopen", "NamedTemporaryFile"):
        return False
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if owner in ("Image", "os", "fsspec", "tarfile") and name == "open":
        return False
    place = 0 if owner and owner != "os" else 1
    modes = [*call.args[place : place + 1], *(word.value for word in call.keywords if word.arg == "mode")]
    return "b" not in str(modes[0].value if modes and isinstance(modes[0], ast.Constant) else "r")


@pytest.mark.parametrize(
    ("code", "is_open"),
    [
        ("open(p)", True),
        ("p.open('a')", True),
        ("open(p, 'w', encoding='utf-8')", False),
        ("p.open('rb')", False),
        ("p.read_text()", True),
        ("p.read_text('utf-8')", False),
        ("p.write_text(x)", True),
        ("write_text(p, x)", False),
        ("Image.open(p)", False),
        ("tarfile.open(p, 'w')", False),
    ],
)
def test_what_leaves_the_encoding_open_is_seen(code, is_open):
    assert leaves_encoding_open(ast.parse(code, mode="eval").body) == is_open


def test_no_file_is_opened_in_the_encoding_of_the_machine():
    calls = [
        f"{path}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and leaves_encoding_open(node)
    ]
    assert not calls


def test_the_package_reads_and_writes_text_by_its_own_functions():
    where = [path for path in SOURCES if path.is_relative_to(ROOT / "rpo")]
    assert not [path for path in where if re.search(r"\.(read|write)_text\(", path.read_text("utf-8"))]


def test_text_is_split_into_lines_by_one_function():
    where = [path for path in SOURCES if ".splitlines(" in path.read_text("utf-8")]
    allowed = {"rpo/runs/align.py", "rpo/models/loading.py", "rpo/models/captions.py", "rpo/data/tables.py"} | {
        "rpo/devices.py"
    }  # of messages
    assert {path.relative_to(ROOT).as_posix() for path in where} <= allowed


END_TO_END = """
import sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"rpo(\\.|$)")
from pathlib import Path
from rpo.cli.main import main
folder = Path(sys.argv[1])
assert main(["data", "check", str(folder / "Käse")]) == 0
words = ["model.source=shapes", f"data.source={folder / 'Käse'}", "pairs_per_update=1"]
words += ["learning={updates: 1, micro_batch: 1, progress: false}", f"output={folder / '学習'}"]
config = folder / "run.yaml"
config.write_text("{}", "utf-8")
assert main(["train", "dpo", str(config), *words]) == 0
"""


@pytest.mark.slow
def test_a_run_from_end_to_end_never_asks_for_the_machines_encoding(tmp_path):
    home = tmp_path / "Käse"
    home.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), colour).save(home / f"{name}.png")
    row = {"prompt": "a red circle — “rot”", "chosen": "a.png", "rejected": "b.png"}
    (home / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    command = [sys.executable, "-X", "warn_default_encoding", "-c", END_TO_END, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Käse" in (tmp_path / "学習" / "run.yaml").read_text("utf-8")
