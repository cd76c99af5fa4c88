"""Servers within the tests: rpo's own in a thread, and one that answers whatever it is told."""

import json
import socket
import threading
from contextlib import contextmanager

import torch

from rpo.rewards import load_reward
from rpo.rewards.remote.served import Served
from rpo.rewards.remote.server import RewardServer

LISTED = {"rewards": ["mine"], "rpo": {"form": 1, "max_bytes": 10**9, "files": None, "details": {"mine": {}}}}


@contextmanager
def serving(rewards, *, batch_size=64, **more):
    served = {
        name: Served(name, load_reward(reward), device=torch.device("cpu"), batch_size=batch_size)
        for name, reward in rewards.items()
    }
    server = RewardServer(served, **more)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def response(body, *, status="200 OK", kind="application/json"):
    """The bytes of a whole answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


@contextmanager
def answering(*answers, listed=LISTED):
    """A server whose answers to POST are these, the last again and again.

    Each is bytes, or a function of the connection that may do what it likes. What it is asked is kept.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    asked, waiting = [], list(answers)

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    head, body = _request(connection)
                    if head.startswith(b"GET"):
                        connection.sendall(listed if isinstance(listed, bytes) else response(listed))
                        continue
                    asked.append((head, body))
                    answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
                    connection.sendall(answer) if isinstance(answer, bytes) else answer(connection)
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def _request(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            raise OSError("nothing came")
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    length = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    while length and len(body) < length[0]:
        body += connection.recv(65536)
    return head, body
