"""An OpenAI-compatible server on loopback that misbehaves as told; it keeps every request that it got."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rpo.curation.store.address import Store
from rpo.curation.vlm.answers import AnswerCache

SMALL_QUESTION = 'Answer with {"ok": true}.'


@dataclass(frozen=True)
class Response:
    """What the server does with one request."""

    content: str | None = ""
    """What the model says."""
    status: int = 200
    body: bytes | None = None
    """The whole body instead of a completion."""
    content_type: str = "application/json"
    wait_seconds: float = 0.0
    is_cut_off: bool = False
    """Whether the connection closes in the middle of the body."""
    message: dict = field(default_factory=dict)
    finish_reason: str = "stop"
    logprobs: object = None
    """Of the tokens of the answer, where the server tells them."""


Behaviour = Callable[[dict], Response]


class FakeServer:
    """A server that asks `behave` what to do with each request."""

    def __init__(self, behave: Behaviour, port: int = 0) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._behave = behave
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def texts(self) -> list[str]:
        """The text of every question, those that only test the server left out."""
        return [text for text in map(text_of, self.requests) if text != SMALL_QUESTION]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append(request)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                try:
                    response = outer._behave(request)
                    time.sleep(response.wait_seconds)
                finally:
                    with outer._lock:  # before the reply: a client that has it may ask again at once
                        outer._now -= 1
                with suppress(BrokenPipeError, ConnectionResetError):  # the client has given up
                    self._reply(response, request)

            def _reply(self, response: Response, request: dict) -> None:
                body = completion(response, request["model"]) if response.body is None else response.body
                self.send_response(response.status)
                self.send_header("Content-Type", response.content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if response.is_cut_off else body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def completion(response: Response, model: str) -> bytes:
    message = {"role": "assistant", "content": response.content, **response.message}
    choice = {"index": 0, "finish_reason": response.finish_reason, "message": message, "logprobs": response.logprobs}
    if response.status != 200:
        return json.dumps({"error": {"message": response.content, "type": "error"}}).encode()
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}
    ).encode()


def text_of(request: dict) -> str:
    return next(part["text"] for part in request["messages"][0]["content"] if part["type"] == "text")


def in_turn(responses: Sequence[Response]) -> Behaviour:
    """One response after the other, the last one for ever."""
    left = list(responses)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def saying(content: str | None) -> Behaviour:
    return lambda _: Response(content)


@contextmanager
def fake_server(behave: Behaviour, port: int = 0) -> Iterator[FakeServer]:
    server = FakeServer(behave, port)
    try:
        yield server
    finally:
        server.close()


def kept_in(folder):
    """A cache of answers in a folder; None for nowhere."""
    return AnswerCache(folder and Store(folder))
