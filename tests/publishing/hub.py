"""A stand-in for the hub's HTTP interface, as far as publishing goes: repositories in memory, on this machine alone."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub:
    """What was made and uploaded; the next `failures` uploads of a large file fail."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.failures = 0
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, told: object, status: int = 200) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        _, _, _, owner, name = self.path.split("?")[0].split("/")[:5]
        repo = f"{owner}/{name}"
        known = repo in self.hub.repositories
        told = {"id": repo, "private": self.hub.private.get(repo), "sha": "0" * 40, "siblings": []}
        self._answer(told if known else {"error": "not found"}, 200 if known else 404)

    def do_PUT(self) -> None:
        body = self._body()
        if self.hub.failures:
            self.hub.failures -= 1
            self._answer({"error": "the stand-in fails as it was told"}, 403)
            return
        self.hub.blobs[hashlib.sha256(body).hexdigest()] = body
        self._answer({})

    def do_POST(self) -> None:
        hub, body = self.hub, self._body()
        hub.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo not in hub.repositories:
                hub.repositories[repo], hub.private[repo] = {}, asked["visibility"] == "private"
            self._answer({"url": f"{hub.url}/{repo}", "id": repo})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in files
            ]
            self._answer({"files": [{**one, "shouldIgnore": False} for one in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            upload = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/blob/{one['oid']}"}}}
                if one["oid"] not in hub.blobs
                else one
                for one in wanted
            ]
            self._answer({"transfer": "basic", "objects": upload})
        elif "/commit/" in self.path:
            self._commit(body)
        else:  # a look at the card
            self._answer({"errors": [], "warnings": []})

    def _commit(self, body: bytes) -> None:
        hub = self.hub
        repo = "/".join(self.path.split("/")[3:5])
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                hub.repositories[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                hub.repositories[repo][line["value"]["path"]] = hub.blobs[line["value"]["oid"]]
        self._answer({"commitUrl": f"{hub.url}/{repo}/commit/1", "commitOid": "1" * 40})


@contextmanager
def hub_on_this_machine() -> Iterator[Hub]:
    """Inside, it listens at `url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
