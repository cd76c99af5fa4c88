"""What listens: rewards behind HTTP, a thread for each request, and no more requests at once than there is room for.

A request is read only when it is known to be wanted: who asks has the token, says that it is JSON, and how long it is.
Beyond the limit the answer is 413, beyond the number of requests at once 503, which a client takes as "later"; pickle
is refused with everything else that is no JSON, since it runs the code of whoever sends it. A client that has gone is
not computed for.
"""

import hmac
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast, final
from urllib.parse import unquote

from rpo.data.prompts import AnnotatedPrompt
from rpo.errors import InputError
from rpo.plugins import nearest
from rpo.rewards.remote import form, unirl
from rpo.rewards.remote.form import WireError
from rpo.rewards.remote.served import Served

BODY_SECONDS = 120.0
"""Within which a request has to have come."""

DRAINED_SECONDS = 5.0
"""For which the rest of a refused request is read and dropped, so that its sender sees the answer."""

CHUNK = 2**16


@dataclass(frozen=True)
class Limits:
    """What a server lets others do."""

    max_bytes: int = form.MAX_BYTES
    """Of a request."""
    concurrency: int = 8
    """Requests that are held at once, of which each reward works on one."""
    files: Path | None = None
    """The folder whose files may be named as images."""


@final
class RewardServer:
    """Serves rewards until it is stopped.

    Attributes:
        rewards: By the names that they are asked by.
    """

    def __init__(
        self,
        rewards: Mapping[str, Served],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        limits: Limits | None = None,
        tell: Callable[[str], object] = lambda told: None,
    ) -> None:
        """Begin to listen; questions wait until `serve`.

        Args:
            port: 0 is any that is free.
            token: What a client has to know; empty for nothing.
            tell: Called with a line for every question whose answer has failures.

        Raises:
            InputError: The address cannot be had.
        """
        self.rewards, self.limits, self.tell = dict(rewards), limits or Limits(), tell
        self.slots = threading.BoundedSemaphore(self.limits.concurrency)
        self._token = token.encode()
        try:
            self._http = _Http(host, port, self)
        except (OSError, OverflowError) as error:
            raise InputError(f"nothing can listen at {host}:{port} ({error}); give another --host or --port") from error

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = cast(tuple[str, int], self._http.server_address[:2])
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve(self) -> None:
        """Answer until `close`, or whatever ends this thread."""
        self._http.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Stop listening; what is being answered is left alone."""
        self._http.shutdown()
        self._http.server_close()

    def has_token(self, header: str) -> bool:
        """Whether a request may be answered."""
        return not self._token or hmac.compare_digest(header.encode(), b"Bearer " + self._token)

    def health(self) -> dict[str, Any]:
        """That it lives, and how often it was asked."""
        every = {name: {"asked": one.asked, "failed": one.failed} for name, one in self.rewards.items()}
        return {"status": "ok", "rewards": every}

    def listed(self) -> dict[str, Any]:
        """What it has."""
        details = {name: one.details for name, one in self.rewards.items()}
        files = str(self.limits.files) if self.limits.files else None
        own = form.Details(form=form.FORM, max_bytes=self.limits.max_bytes, files=files, details=details)
        return form.Listed(rewards=list(self.rewards), rpo=own).model_dump()

    def version(self, name: str) -> dict[str, Any]:
        """What one of them is."""
        return form.Version(version=self._named(name).version()).model_dump()

    def score(self, body: bytes, is_wanted: Callable[[], bool]) -> dict[str, Any]:
        """Answer a question of either form.

        Args:
            is_wanted: Whether somebody waits for the answer still.
        """
        value = form.read_json(body)
        if unirl.is_batch(value):
            return self._score_batch(unirl.read_batch(value), is_wanted)
        asked = form.read_as(form.Asked, value)
        images = form.images_of(asked, self.limits.files)
        prompts = [AnnotatedPrompt(text, known) for text, known in zip(asked.prompts, asked.metadata, strict=True)]
        return self._judge(asked.reward, images, prompts, is_wanted).model_dump()

    def _score_batch(self, batch: unirl.Batch, is_wanted: Callable[[], bool]) -> dict[str, Any]:
        images = unirl.images_of(batch)
        rows = dict[str, list[int]]()
        for number, one in enumerate(batch.requests):
            for name in one.required_rewards:
                self._named(name)
                rows.setdefault(name, []).append(number)
        scores: list[dict[str, float]] = [{} for _ in batch.requests]
        errors: list[dict[str, str]] = [{} for _ in batch.requests]
        for name, wanted in rows.items():
            every = [batch.requests[row] for row in wanted]
            prompts = [AnnotatedPrompt(one.history[-1].text, one.metadata) for one in every]
            said = self._judge(name, [images[row] for row in wanted], prompts, is_wanted)
            for row, score, why in zip(wanted, said.scores, said.failures, strict=True):
                if score is None:
                    errors[row][name] = str(why)
                else:
                    scores[row][name] = score
        return unirl.written(batch, scores, errors)

    def _named(self, name: str) -> Served:
        if name not in self.rewards:
            raise WireError(
                f"there is no reward {name!r} here; expected one of {', '.join(self.rewards)}; the nearest is "
                f"{nearest(name, self.rewards)!r}",
                status=404,
            )
        return self.rewards[name]

    def _judge(
        self, name: str, images: list[form.Pixels], prompts: list[AnnotatedPrompt], is_wanted: Callable[[], bool]
    ) -> form.Said:
        one = self._named(name)
        with one.lock:
            if not is_wanted():
                raise _GoneError
            said = one.judge(images, prompts)
        whys = [why for why in said.failures if why]
        if whys:
            self.tell(f"{name}: {len(whys)} of {len(images)} images without a score: {whys[0]}")
        return said


class _GoneError(Exception):
    """Nobody waits for the answer."""


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, rewards: RewardServer) -> None:
        self.rewards = rewards
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        ThreadingHTTPServer.__init__(self, (host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is the client's affair."""


class _Handler(BaseHTTPRequestHandler):
    server: _Http  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = 60  # of silence
    server_version, sys_version = "rpo", ""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that it has there
        """Say nothing."""

    def do_GET(self) -> None:  # noqa: N802 - the name that it has there
        """Health and list."""
        rewards = self.server.rewards
        if self.path == "/health":
            return self._answer(200, rewards.health())
        if not rewards.has_token(self.headers.get("Authorization", "")):
            return self._refuse(401, "a token is asked for")
        if self.path == "/rewards":
            return self._answer(200, rewards.listed())
        if self.path.startswith(form.VERSIONS):
            return self._say(lambda: rewards.version(unquote(self.path.removeprefix(form.VERSIONS))))
        return self._refuse(
            404, f"there is nothing at {self.path!r}; GET /health, /rewards and /version/NAME, POST /score"
        )

    def do_POST(self) -> None:  # noqa: N802
        """Scores."""
        if (refusal := self._refusal()) is not None:
            return self._refuse_unread(*refusal)
        rewards = self.server.rewards
        if not rewards.slots.acquire(blocking=False):
            return self._refuse_unread(503, f"{rewards.limits.concurrency} requests are held already; ask again later")
        try:
            length = int(self.headers["Content-Length"])
            return self._say(lambda: rewards.score(self._body(length), self._is_wanted))
        finally:
            rewards.slots.release()

    def _say(self, what: Callable[[], Mapping[str, Any]]) -> None:
        """Answer, or say why not."""
        try:
            return self._answer(200, what())
        except WireError as error:
            return self._refuse(error.status, str(error))
        except _GoneError:
            return None
        except Exception as error:  # a defect, which must not take the other requests with it
            self.server.rewards.tell(f"a question could not be answered: {type(error).__name__}: {error}")
            return self._refuse(500, f"{type(error).__name__}: {error}")

    def _refusal(self) -> tuple[int, str] | None:
        """Why the body is not read."""
        rewards, length = self.server.rewards, self.headers.get("Content-Length", "")
        if not rewards.has_token(self.headers.get("Authorization", "")):
            return 401, f"a token is asked for; give it in {form.TOKEN_VARIABLE}"
        if self.path != "/score":
            return 404, f"there is nothing at {self.path!r}; questions are posted to /score"
        if self.headers.get_content_type() != "application/json":
            return 415, (
                f"the body is of {self.headers.get('Content-Type', 'no type')!r}; expected application/json: pickle "
                "and the like run the code of whoever sends them, and are not read"
            )
        if not length.isdecimal():
            return 411, "the length of the body is not said; expected Content-Length"
        if int(length) > rewards.limits.max_bytes:
            return 413, (
                f"the request has {int(length):,} bytes; expected {rewards.limits.max_bytes:,} at most; ask about "
                "fewer images at once, or start the server with a larger --max-request"
            )
        return None

    def _body(self, length: int) -> bytes:
        body, end = bytearray(), time.monotonic() + BODY_SECONDS
        while len(body) < length:
            chunk = self.rfile.read1(min(CHUNK, length - len(body)))
            if not chunk or time.monotonic() > end:
                raise WireError(f"{len(body):,} of {length:,} bytes came in time; send the rest", status=408)
            body += chunk
        return bytes(body)

    def _is_wanted(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return not readable or self.connection.recv(1, socket.MSG_PEEK) != b""

    def _refuse(self, status: int, detail: str) -> None:
        self._answer(status, {"detail": detail})

    def _refuse_unread(self, status: int, detail: str) -> None:
        self._refuse(status, detail)
        end = time.monotonic() + DRAINED_SECONDS
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(DRAINED_SECONDS)
            while time.monotonic() < end and self.connection.recv(CHUNK):
                continue

    def _answer(self, status: int, value: Mapping[str, Any]) -> None:
        body = json.dumps(value, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:  # noqa: PLR2004
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)
