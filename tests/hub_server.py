"""A Hub in small: an HTTP server on this machine that speaks the calls of a push and keeps what it receives.

POST /api/repos/create                       409 with the URL when the repo exists
GET  /api/models/{repo}                      its visibility
GET  /api/whoami-v2
POST /api/validate-yaml                      the card's front matter
POST /api/models/{repo}/preupload/main       .safetensors go through LFS, the rest inline
POST /{repo}.git/info/lfs/objects/batch      where to PUT each object, and where to have it verified
PUT  /lfs/{oid}, POST /verify/{oid}
POST /api/models/{repo}/commit/main          one JSON object a line; inline files in base64
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

USER = "alice"
HUB_ID = "[^/]+/[^/]+"


@dataclass
class Hub:
    """The server's state; a test sets the first three fields and reads the others."""

    token: str = "dummy"
    visibility: dict[str, str] = field(default_factory=dict)  # repo -> public or private
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)  # part of a path -> status, message
    url: str = ""
    calls: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    inline: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content
    verified: set[str] = field(default_factory=set)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        for part, (status, message) in self.failures.items():
            if part in path:
                return status, {"error": message}
        for route_method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if method == route_method and match:
                return handler(self, body, *match.groups())
        return 404, {"error": f"no such call: {method} {path}"}

    def create(self, body: bytes) -> tuple[int, dict[str, Any]]:
        request = json.loads(body)
        self.created.append(request)
        owner = request["organization"] or USER
        repo = f"{owner}/{request['name']}"
        url = {"url": f"{self.url}/{repo}"}
        if owner != USER:
            return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}
        if repo in self.visibility:
            return 409, {"error": "You already created this model repo", **url}
        self.visibility[repo] = request.get("visibility", "public")
        return 200, url

    def info(self, body: bytes, repo: str) -> tuple[int, dict[str, Any]]:
        if repo not in self.visibility:
            return 404, {"error": "Repository not found"}
        return 200, {"id": repo, "private": self.visibility[repo] == "private", "sha": "0" * 40}

    def whoami(self, body: bytes) -> tuple[int, dict[str, Any]]:
        return 200, {"type": "user", "name": USER}

    def validate(self, body: bytes) -> tuple[int, dict[str, Any]]:
        front = json.loads(body)["content"].split("---\n")[1]
        if not isinstance(yaml.safe_load(front), dict):
            return 400, {"errors": [{"message": "no metadata"}]}
        return 200, {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo: str) -> tuple[int, dict[str, Any]]:
        if not repo.startswith(f"{USER}/"):
            return 403, {"error": f"You don't have write access to {repo}"}
        names = [entry["path"] for entry in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        return 200, {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}

    def batch(self, body: bytes, repo: str) -> tuple[int, dict[str, Any]]:
        objects = [
            {
                **wanted,
                "actions": {
                    "upload": {"href": f"{self.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.url}/verify/{wanted['oid']}"},
                },
            }
            for wanted in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def store(self, body: bytes, oid: str) -> tuple[int, dict[str, Any]]:
        self.objects[oid] = body
        return 200, {}

    def verify(self, body: bytes, oid: str) -> tuple[int, dict[str, Any]]:
        content = self.objects[oid]
        if hashlib.sha256(content).hexdigest() != oid or len(content) != json.loads(body)["size"]:
            return 422, {"error": "the object is not what was announced"}
        self.verified.add(oid)
        return 200, {}

    def commit(self, body: bytes, repo: str) -> tuple[int, dict[str, Any]]:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.inline[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif entry["key"] == "lfsFile":
                self.large[value["path"]] = self.objects[value["oid"]]
            elif entry["key"] != "header":
                return 400, {"error": f"a push has no {entry['key']}"}
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}


ROUTES = (
    ("POST", "/api/repos/create", Hub.create),
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("GET", f"/api/models/({HUB_ID})", Hub.info),
    ("POST", "/api/validate-yaml", Hub.validate),
    ("POST", f"/api/models/({HUB_ID})/preupload/main", Hub.preupload),
    ("POST", rf"/({HUB_ID})\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Hub.store),
    ("POST", "/verify/([0-9a-f]{64})", Hub.verify),
    ("POST", f"/api/models/({HUB_ID})/commit/main", Hub.commit),
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def handle_call(self) -> None:
        body = self.read_body()
        self.hub.calls.append(f"{self.command} {self.path}")
        # storage has signed addresses of its own, and must not be told the token
        allowed = None if self.path.startswith("/lfs/") else f"Bearer {self.hub.token}"
        if self.headers.get("Authorization") != allowed:
            status, reply = 401, {"error": f"Invalid credentials: {self.headers.get('Authorization')}"}
        else:
            status, reply = self.hub.answer(self.command, self.path.partition("?")[0], body)
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = handle_call  # noqa: N815

    def read_body(self) -> bytes:
        """The request's body, sent at once or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub on a free port, stopped at the end."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
