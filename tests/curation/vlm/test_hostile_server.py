"""Servers that never come to an end, that send the asker elsewhere, and that give away the key they were given."""

import gzip
import json
import re
import time
import traceback
from dataclasses import asdict

import pytest
from PIL import Image

from rpo.config.load import load_config
from rpo.curation.components import load_critic
from rpo.curation.curate_config import ChatConfig, CurateConfig
from rpo.curation.records import Critique, Fault, Unavailable
from rpo.curation.vlm.bounded_http import BODY_LIMIT, KEY_SHOWN, secret_pattern
from rpo.files.whole import append_line
from tests.curation.vlm.fake_server import SMALL_QUESTION, Response, completion, fake_server, kept_in, saying, text_of
from tests.curation.vlm.raw_server import HEAD, raw_server
from tests.marks import slow_but

IMAGE = Image.new("RGB", (8, 8))
GOOD = '{"problems": [], "keep": [], "overall": 6}'
KEY = "sk-very/secret+key"
SECONDS = 0.4


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def ask(server, tmp_path=None, **changes):
    settings = {"kind": "server", "model": "m", "base_url": server.url, "max_retries": 1, "timeout_seconds": SECONDS}
    critic = load_critic(ChatConfig(**settings | changes), kept_in(tmp_path))
    (answer,) = critic([IMAGE], ["a hat"])
    return answer


def for_ever(piece, every=0.05):
    while True:
        yield piece
        time.sleep(every)


def drips_body(server):
    yield HEAD + b"Content-Length: 100000\r\n\r\n"
    yield from for_ever(b" ")


def drips_headers(server):
    yield HEAD
    for number, piece in enumerate(for_ever(b"")):
        yield piece + b"X-%d: 1\r\n" % number


def drips_one_header(server):
    yield HEAD + b"X-Long: "
    yield from for_ever(b"a")


def drips_status(server):
    yield from (bytes([byte]) for byte in b"HTTP/1.1 ")
    yield from for_ever(b"")


def sends_chunks(server):
    yield HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    yield from for_ever(b"1\r\n \r\n")


def sends_events(server):
    yield b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    yield from for_ever(b": keep-alive\n\n")


def continues(server):
    yield from for_ever(b"HTTP/1.1 100 Continue\r\n\r\n", every=0.001)


def drips_an_error(server):
    yield b"HTTP/1.1 400 Bad Request\r\nContent-Length: 1000\r\n\r\n"
    yield from for_ever(b"x")


def says_nothing(server):
    server.closing.wait()
    yield b""


ENDLESS = [
    drips_body,
    drips_headers,
    drips_one_header,
    drips_status,
    sends_chunks,
    sends_events,
    continues,
    drips_an_error,
    says_nothing,
]


@pytest.mark.parametrize("pieces", slow_but((drips_headers, sends_chunks, says_nothing), ENDLESS))
def test_a_server_without_an_end_is_given_up(pieces):
    began = time.perf_counter()
    with raw_server(pieces) as server, pytest.raises(Unavailable, match="timed out"):
        ask(server)
    # Two tries of the question, and one of the small one that tells whether the server works.
    assert time.perf_counter() - began < 3 * SECONDS + 30  # these servers send for ever; a busy machine is slow
    assert len(server.requests) == 3


def test_a_question_on_which_a_working_server_drips_is_its_own_fault():
    def pieces(server):
        if SMALL_QUESTION.encode() in server.requests[-1].replace(b"\\", b""):
            body = completion(Response('{"ok": true}'), "m")
            yield HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        else:
            yield from drips_body(server)

    with raw_server(pieces) as server:
        fault = ask(server, max_retries=0)
    assert isinstance(fault, Fault) and fault.kind == "raised" and "APITimeoutError" in fault.message


@pytest.mark.parametrize(
    "head", [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", HEAD + b"\r\n", b"HTTP/1.1 500 No\r\n\r\n"]
)
def test_a_body_without_an_end_is_not_kept(head):
    sent = []

    def pieces(server):
        yield head
        piece = b"lovely! " * 8192
        while True:
            sent.append(len(piece))
            yield b"%x\r\n%s\r\n" % (len(piece), piece) if b"chunked" in head else piece

    with raw_server(pieces) as server:
        fault = ask(server, timeout_seconds=30)
    assert isinstance(fault, Fault) and fault.raw.startswith("lovely!") and str(BODY_LIMIT) in fault.message
    assert len(server.requests) == 1, "what is too long is too long the next time, too"
    assert sum(sent) < 8 * BODY_LIMIT


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"choices": ' * 50_000,
        b'{"choices": [{"message": ' + b'{"content": ' * 30_000 + b"1" + b"}" * 30_000 + b"}]}",
        b'{"x": ' * 700 + b"[]" + b"}" * 700,
    ],
)
def test_an_answer_nested_beyond_reason_is_a_fault(body):
    with fake_server(lambda _: Response(body=body)) as server:
        assert isinstance(ask(server, timeout_seconds=20), Fault)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"problems": ' * 50_000, '{"a":' * 900 + "1" + "}" * 900])
def test_a_model_that_nests_beyond_reason_makes_a_fault(content):
    with fake_server(saying(content)) as server:
        assert isinstance(ask(server, timeout_seconds=20), Fault)


def test_a_compressed_body_is_refused_and_not_unfolded():
    bomb = gzip.compress(b" " * (1 << 25))

    def pieces(server):
        yield HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb

    with raw_server(pieces) as server, pytest.raises(Unavailable, match="compressed by 'gzip'"):
        ask(server, timeout_seconds=20)
    assert b"accept-encoding: identity" in server.requests[0].lower()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nothing_is_sent_to_where_a_server_redirects(status):
    with fake_server(saying(GOOD)) as other:

        def pieces(server):
            place = other.url.replace("//", "//joe:word@") if status != 308 else server.url
            yield b"HTTP/1.1 %d Go\r\nLocation: %s/x\r\nContent-Length: 0\r\n\r\n" % (status, place.encode())

        with raw_server(pieces) as server, pytest.raises(Unavailable, match="redirects to .*as base_url") as caught:
            ask(server)
    assert not other.requests and len(server.requests) == 1
    assert "joe" not in str(caught.value)


# the key


def forms_of_the_key():
    escaped = "".join(f"\\u{ord(one):04x}" for one in KEY)
    return [
        KEY,
        f"Authorization: Bearer {KEY}",
        KEY.replace("/", "%2F").replace("+", "%2b"),
        KEY.replace("/", r"\/"),
        escaped,
    ]


def echoes(text):
    said = f'"You sent {text}."'.encode()
    choice = b'{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": %s}}' % said
    refusal = b'{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "refusal": %s}}' % said
    start = b'{"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [%s]}'
    return {
        "answer": Response(body=start % choice),
        "refusal": Response(body=start % refusal),
        "error": Response(body=b'{"error": {"message": %s}}' % said, status=400),
        "denied": Response(body=b'{"error": {"message": %s}}' % said, status=401),
        "busy": Response(body=said, status=500),
        "page": Response(body=b"<html>" + text.encode(), content_type="text/html"),
        "long": Response(body=(text.encode() + b" ") * (BODY_LIMIT // max(len(text), 1) + 10)),
    }


@pytest.mark.parametrize("form", forms_of_the_key())
@pytest.mark.parametrize("where", list(echoes("")))
def test_a_key_that_a_server_repeats_is_shown_and_kept_nowhere(form, where, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    response = echoes(form)[where]

    def behave(request):
        return Response('{"ok": true}') if text_of(request) == SMALL_QUESTION and where == "error" else response

    with fake_server(behave) as server:
        try:
            said = repr(ask(server, tmp_path, timeout_seconds=20))
            assert KEY_SHOWN in said, "the test looks where the server's words are"
        except Unavailable:
            said = traceback.format_exc()  # with all its causes, as --debug shows it
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for text in (said, kept):
        plain = re.sub(r"\\+u00(..)", lambda found: chr(int(found[1], 16)), text.replace("\\/", "/"))
        assert KEY not in plain and KEY not in plain.replace("%2F", "/").replace("%2b", "+")


def test_a_key_in_a_header_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def pieces(server):
        yield b"HTTP/1.1 307 Go\r\nLocation: http://there/?key=%s\r\nContent-Length: 0\r\n\r\n" % KEY.encode()

    with raw_server(pieces) as server, pytest.raises(Unavailable) as caught:
        ask(server)
    assert KEY not in str(caught.value) and KEY_SHOWN in str(caught.value)


@pytest.mark.parametrize("key", ["", "none", "EMPTY", "cat"])
def test_a_word_that_is_no_secret_stays_in_answers(key):
    assert secret_pattern(key).sub("!", "none of the cat is EMPTY") == "none of the cat is EMPTY"


# addresses

ADDRESSES = [
    ("http://joe:pass-word@host/v1", "a user or password"),
    ("https://pass-word@host/v1", "a user or password"),
    ("http://host/v1?api_key=pass-word", "a query"),
    ("http://host/v1#pass-word", "a fragment"),
    ("joe:pass-word@host/v1", "no http:// or https:// at its start"),
    ("file:///pass-word", "no http:// or https:// at its start"),
    ("http://[pass-word/v1", "no host"),
    ("http:///pass-word", "no host"),
]


@pytest.mark.parametrize(("address", "what"), ADDRESSES)
@pytest.mark.parametrize("cls", [ChatConfig, ChatConfig, ChatConfig])
def test_an_address_with_a_secret_is_refused_without_showing_it(cls, address, what):
    with pytest.raises(ValueError, match=rf"base_url \(not shown here\) has .*{what}.*OPENAI_API_KEY") as caught:
        cls(base_url=address)
    assert "pass-word" not in "".join(traceback.format_exception(caught.value))


def test_an_address_in_a_file_or_the_environment_is_refused_as_well(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("critic:\n  base_url: http://joe:pass-word@host/v1\n")
    with pytest.raises(ValueError, match="a user or password") as caught:
        load_config(CurateConfig, tmp_path / "a.yaml")
    assert "pass-word" not in str(caught.value)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://joe:pass-word@host/v1")
    with pytest.raises(ValueError, match="a user or password") as caught:
        load_critic(ChatConfig(kind="server", model="m"))
    assert "pass-word" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "pass-word")
    with pytest.raises(ValueError, match="has the key") as caught:
        load_critic(ChatConfig(kind="server", model="m", base_url="http://host/pass-word/v1"))
    assert "pass-word" not in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        "critic.base_ulr=http://joe:pass-word@host/v1",
        "critic.base_url=[http://joe:pass-word@host/v1",
        "http://joe:pass-word@host/v1",
    ],
)
def test_a_slip_beside_an_address_does_not_show_its_password(word):
    with pytest.raises(ValueError, match="the override") as caught:
        load_config(CurateConfig, None, [word])
    assert "pass-word" not in str(caught.value)


def test_plain_addresses_are_taken():
    for address in ("", "http://localhost:8000/v1", "https://api.example.org/v1/", "http://[::1]:8000"):
        assert ChatConfig(base_url=address).base_url == address


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    def pieces(server):
        body = completion(Response(GOOD), "m")
        yield HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    with raw_server(pieces) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        critic = load_critic(ChatConfig(kind="server", model="m", base_url="http://there.invalid/v1", max_retries=0))
        (answer,) = critic([IMAGE], ["a hat"])
    assert not isinstance(answer, Fault)
    assert proxy.requests[0].startswith(b"POST http://there.invalid/v1/chat/completions")


HALF = "a \ud800 hat"  # half of a surrogate pair, which JSON can say and no file can hold


@pytest.mark.parametrize(
    "response",
    [
        Response('{"problems": [], "keep": ["' + HALF + '"], "overall": 6}'),
        Response('{"problems": [], "keep": ["' + HALF.encode("unicode-escape").decode() + '"], "overall": 6}'),
        Response(HALF),
        Response("", message={"refusal": HALF}),
        Response(HALF, status=400),
        Response(body=json.dumps(HALF).encode()),
        Response(body=json.dumps({"choices": [], "id": HALF}).encode()),
    ],
    ids=["value", "escaped", "prose", "refusal", "error", "no-completion", "no-message"],
)
def test_half_of_a_character_is_no_answer_and_can_be_kept(response, tmp_path):
    with fake_server(lambda asked: response if "hat" in text_of(asked) else Response(GOOD)) as server:
        answer = ask(server, tmp_path)
        assert isinstance(answer, Fault)
        append_line(tmp_path / "faults.jsonl", asdict(answer))
        assert ask(server, tmp_path) == answer
    assert r"\ud800" in answer.message + answer.raw


def test_half_of_a_character_beside_an_answer_is_kept_with_it(tmp_path):
    with fake_server(saying(HALF + GOOD)) as server:
        assert ask(server, tmp_path) == ask(server, tmp_path) == Critique(problems=(), keep=(), overall=6)
        assert len(server.texts()) == 1
