"""`rpo curate` against a server on loopback that says everything but what it is asked for, goes away and comes back."""

import json
import threading
from collections import Counter
from dataclasses import replace

import pytest

from rpo.cli.main import main
from rpo.config.load import to_yaml
from rpo.curation.curate import curate
from rpo.curation.curate_config import ChatConfig, EditorConfig
from rpo.curation.records import RAW_LIMIT, Critique, Fault, Instructions, histories
from rpo.curation.store.run import CurationRun
from rpo.curation.vlm.prompts import FOLDER, PromptFile
from tests.curation.fakes import FakeEditor, config_of, image_folder, lines_of
from tests.curation.vlm.fake_server import SMALL_QUESTION, Response, fake_server, text_of

COUNT = 12
SOUND = '{"problems": [], "keep": [], "overall": 10}'
LONG = "a hat " * 600_000
CRITIQUES = {
    0: Response(None),
    1: Response("What a lovely picture!"),
    2: Response('{"problems": "none", "keep": [], "overall": "six"}'),
    3: Response(LONG),
    4: Response(body=b"<html>Welcome</html>", content_type="text/html"),
    5: Response("cannot take this", status=400),
    6: Response(None, message={"refusal": "I will not look."}),
    7: Response('{"a":' * 3000),
}
"""What the critic's server says of some images; of the others it says something of use."""
INSTRUCTIONS = {9: "You might want to think about the light.", 10: '{"instructions": ["make it red"] * 9}'}
EXPECTED = {
    0: ("empty", ""),
    1: ("parse_error", "What a lovely picture!"),
    2: ("invalid", '{"problems": "none", "keep": [], "overall": "six"}'),
    3: ("parse_error", LONG),
    4: ("raised", "<html>Welcome</html>"),
    5: ("raised", "cannot take this"),
    6: ("invalid", "I will not look."),
    7: ("parse_error", '{"a":' * 3000),
}


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def own_editor(config):
    return FakeEditor()


def number_in(text):
    return int(text.partition('"caption ')[2].partition('"')[0])


def good_critique(number):
    return json.dumps({"problems": [{"what": f"fault {number}", "where": "", "severity": 2}], "keep": [], "overall": 4})


def babbling(request):
    text = text_of(request)
    if text == SMALL_QUESTION:
        return Response(SOUND)
    number = number_in(text)
    if request["response_format"]["json_schema"]["name"] == "Instructions":
        return Response(INSTRUCTIONS.get(number, '{"instructions": ["make it red"]}'))
    return CRITIQUES.get(number, Response(SOUND if number == 8 else good_critique(number)))  # noqa: PLR2004


def settings(tmp_path, server, **changes):
    asked = {"kind": "server", "model": "m", "base_url": server.url, "max_retries": 0, "concurrency": 3}
    return replace(
        config_of(tmp_path / "run", tmp_path / "source"),
        critic=ChatConfig(**asked),
        instructor=ChatConfig(**asked),
        editor=EditorConfig(kind=f"{__name__}:own_editor"),
        **changes,
    )


def as_file(tmp_path, config):
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    return str(tmp_path / "run.yaml")


def test_everything_that_a_server_may_say_is_counted_and_kept(tmp_path, capsys):
    image_folder(tmp_path / "source", COUNT)
    with fake_server(babbling) as server:
        assert main(["curate", as_file(tmp_path, settings(tmp_path, server))]) == 0
    capsys.readouterr()
    found = list(histories(CurationRun(tmp_path / "run")))
    assert [one.source.caption for one in found] == [f"caption {number}" for number in range(COUNT)]
    for number, one in enumerate(found):
        if number in EXPECTED:
            kind, raw = EXPECTED[number]
            assert isinstance(one.critique, Fault) and one.critique.kind == kind, one.critique
            assert one.critique.raw.startswith(raw[: RAW_LIMIT - 100]) or raw in one.critique.raw
            assert len(one.critique.raw) <= RAW_LIMIT and one.outcomes[0].reason == "critique_fault"
        else:
            assert isinstance(one.critique, Critique)
    assert found[8].outcomes[0].reason == "nothing_to_fix" and found[8].instructions is None
    assert isinstance(found[11].instructions, Instructions) and found[11].scores is not None
    for number in INSTRUCTIONS:
        fault = found[number].instructions
        assert (fault.kind, fault.raw) == ("parse_error", INSTRUCTIONS[number])
        assert found[number].outcomes[0].reason == "instruction_fault"
    assert main(["curate", "status", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    counted = Counter(kind for kind, _ in EXPECTED.values())
    line = next(line for line in shown.splitlines() if line.startswith("  critiques"))
    assert line.endswith(", ".join(f"{number} {kind}" for kind, number in sorted(counted.items())))
    assert "2 parse_error" in next(line for line in shown.splitlines() if line.startswith("  instructions"))


def test_a_server_that_goes_away_and_comes_back_costs_what_was_in_flight(tmp_path, capsys):
    image_folder(tmp_path / "source", COUNT)
    enough = threading.Semaphore(7)

    def dying(request):
        return babbling(request) if enough.acquire(blocking=False) else Response("shutting down", status=503)

    with fake_server(babbling) as server:
        config = settings(tmp_path, server)
        undisturbed = replace(config, output=str(tmp_path / "undisturbed"))
        curate(undisturbed)
        num_questions = len(server.texts())
    with fake_server(dying, server.port):
        assert main(["curate", as_file(tmp_path, config)]) == 2
    error = capsys.readouterr().err
    assert "does not answer for model 'm'" in error and "run the same command with --resume: what was" in error
    kept = len(list((tmp_path / "run" / "answers").rglob("*.json")))
    assert 3 <= kept <= 7, "what had come in is kept, whatever became of the rest"
    with fake_server(babbling, server.port) as restarted:
        assert main(["curate", as_file(tmp_path, config), "--resume"]) == 0
    assert len(restarted.texts()) == num_questions - kept
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("part", "stage", "variables"),
    [("critic", "critiques", ["caption"]), ("instructor", "instructions", ["caption", "critique"])],
)
def test_a_template_that_changed_is_refused_with_both_hashes(tmp_path, capsys, part, stage, variables):
    image_folder(tmp_path / "source", COUNT)
    name = {"critic": "critique", "instructor": "instruct"}[part]
    template = tmp_path / "mine.txt"
    template.write_text((FOLDER / f"{name}.txt").read_text())
    with fake_server(babbling) as server:
        base = settings(tmp_path, server)
        config = replace(base, **{part: replace(vars(base)[part], prompt=str(template))})
        path = as_file(tmp_path, config)
        assert main(["curate", path]) == 0
        asked, before = len(server.requests), lines_of(tmp_path / "run")
        old = PromptFile.load(name, str(template), variables=variables).sha256
        template.write_text(template.read_text() + "\nBe brief.\n")
        new = PromptFile.load(name, str(template), variables=variables).sha256
        capsys.readouterr()
        assert main(["curate", path, "--resume"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rpo: error")]
        assert f"the records of stage '{stage}' were made otherwise: prompt_sha256 was '{old}' and is '{new}'" in line
        assert len(server.requests) == asked and lines_of(tmp_path / "run") == before
        template.write_text((FOLDER / f"{name}.txt").read_text())
        assert main(["curate", path, "--resume"]) == 0, "the old words are welcome"
        assert len(server.requests) == asked
