"""One request and its answer, within bounds: a deadline over the whole of it, and a limit on what comes back.

A client's own timeout bounds the silence between two bytes, so that a server that drips is never given up. Here a clock
runs from connecting to the last byte. What passes by itself (nobody listens yet, a broken connection, a server that is
busy) is asked again, with growing pauses, until the patience is at an end; a wrong answer never is. No proxy is used:
a reward server is a machine beside this one.
"""

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from rpo.rewards.answers import RewardError
from rpo.rewards.remote.form import WireError, beginning

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Seconds before a question is put again; doubled each time."""

MAY_PASS = (429, 502, 503, 504)
"""Too many requests, and what a proxy or a busy server answers."""

OK = 200
CHUNK = 2**16


class _PassingError(Exception):
    """What may be gone when the question is put again."""


@dataclass(frozen=True)
class Place:
    """Where a server listens."""

    host: str
    port: int | None
    is_encrypted: bool = False

    def __str__(self) -> str:
        """The address, without a path."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.is_encrypted}://{host}{f':{self.port}' if self.port else ''}"


@dataclass(frozen=True)
class Bounds:
    """How long it is waited, and for how much."""

    seconds: float
    """For one request, from connecting to its last byte."""
    patience: float
    """From the first try of a question; what does not pass until then is an error."""
    most: int
    """Bytes of an answer."""


@dataclass(frozen=True)
class HttpAnswer:
    """What came back."""

    status: int
    kind: str
    """Of the body, as its header says."""
    body: bytes


def asked(
    place: Place, path: str, body: bytes | None, headers: Mapping[str, str], bounds: Bounds, *, who: str
) -> HttpAnswer:
    """The answer to a question, which is put again while it may pass; its status is not judged.

    Args:
        body: What is posted; None to get what is there.
        who: The server and reward, for the error.

    Raises:
        RewardError: No answer came within the bounds.
        WireError: What comes is no answer that one could read.
    """
    end, pause = time.monotonic() + bounds.patience, FIRST_PAUSE
    while True:
        try:
            answer = _exchange(place, path, body, headers, bounds)
            if answer.status not in MAY_PASS:
                return answer
            problem = f"it answered {answer.status}: {beginning(answer.body)}"
        except _PassingError as error:
            problem = str(error)
        if time.monotonic() + pause > end:
            raise RewardError(
                f"{who} does not answer, after {bounds.patience:g} seconds of asking again: {problem}; see that the "
                "server runs, or give it more time (?seconds=… for one request, ?patience=… for all tries), then resume"
            )
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _exchange(place: Place, path: str, body: bytes | None, headers: Mapping[str, str], bounds: Bounds) -> HttpAnswer:
    kind = http.client.HTTPSConnection if place.is_encrypted else http.client.HTTPConnection
    connection = kind(place.host, place.port, timeout=bounds.seconds)
    late = threading.Event()

    def give_up() -> None:
        late.set()
        if connection.sock is not None:
            _shut(connection.sock)

    clock = threading.Timer(bounds.seconds, give_up)
    clock.daemon = True
    clock.start()
    try:
        connection.connect()
        _send(connection, path, body, headers)
        return _read(connection.getresponse(), bounds.most)
    except ssl.SSLCertVerificationError as error:
        raise WireError(f"shows a certificate that is not valid ({error}); expected one that is") from error
    except (OSError, http.client.HTTPException) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise _PassingError(f"no whole answer within {bounds.seconds:g} seconds") from error
        raise _PassingError(f"{type(error).__name__}: {error}") from error
    finally:
        clock.cancel()
        connection.close()


def _send(connection: http.client.HTTPConnection, path: str, body: bytes | None, headers: Mapping[str, str]) -> None:
    """Send all of it, as far as the server takes it: one that refuses answers before the end."""
    connection.putrequest("GET" if body is None else "POST", path, skip_accept_encoding=True)
    for name, value in {**headers, **({} if body is None else {"Content-Length": str(len(body))})}.items():
        connection.putheader(name, value)
    connection.endheaders()
    try:
        for start in range(0, len(body or b""), CHUNK):
            connection.send((body or b"")[start : start + CHUNK])
    except (BrokenPipeError, ConnectionResetError):
        return  # the answer says why, if there is one


def _read(response: http.client.HTTPResponse, most: int) -> HttpAnswer:
    body = bytearray()
    while chunk := response.read(CHUNK):
        body += chunk
        if len(body) > most:
            raise WireError(
                f"answered with more than {most:,} bytes: {beginning(bytes(body))}; expected a number for each image"
            )
    if response.length:  # read() tells of a body that was cut short only where all of it is read at once
        raise http.client.IncompleteRead(bytes(body[:CHUNK]), response.length)
    return HttpAnswer(response.status, response.headers.get_content_type(), bytes(body))


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was closed in the meantime
