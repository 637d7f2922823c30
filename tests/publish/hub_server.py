"""A small Hub: an HTTP server on this machine that answers the calls of a push and keeps the files.

POST /api/repos/create                       409 with the URL when the repo exists
GET  /api/models/{repo}[/revision/main]      its visibility and files
GET  /api/whoami-v2
POST /api/validate-yaml                      the card's front matter
POST /api/models/{repo}/preupload/main       .safetensors go through LFS or Xet, the rest inline; what is there already
POST /{repo}.git/info/lfs/objects/batch      where to PUT each object, and where to have it verified; nothing for what
                                             the storage has
PUT  /lfs/{oid}, POST /verify/{oid}
GET  /api/models/{repo}/xet-write-token/main
POST /cas/v1/xorbs/default/{hash}            Xet's blocks of chunks, accepted unchecked; any other call to /cas is not
POST /cas/v1/shards                          known here, which the client takes as an older server's answer
POST /api/models/{repo}/commit/main          one JSON object a line; inline files in base64
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

USER = "alice"
HUB_ID = "[^/]+/[^/]+"
XET_TOKEN = "xet-token"


@dataclass
class Hub:
    """The server's state; a test sets the first five fields and reads the others. There is one repo's content."""

    token: str = "dummy"
    visibility: dict[str, str] = field(default_factory=dict)  # repo -> public or private
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)  # part of a path -> status, message
    room: int | None = None  # objects that are stored before every connection that sends one breaks
    expires: tuple[int, str] | None = None  # objects that are stored before the token expires, for paths with this part
    url: str = ""
    calls: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    inline: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content
    verified: set[str] = field(default_factory=set)
    xorbs: dict[str, int] = field(default_factory=dict)  # hash -> bytes
    pointers: dict[str, str] = field(default_factory=dict)  # large file -> sha256
    commits: int = 0

    @property
    def stored(self) -> int:
        return len(self.verified) + len(self.xorbs)

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
        files = [{"rfilename": name} for name in (*self.inline, *self.pointers)]
        return 200, {"id": repo, "private": self.visibility[repo] == "private", "sha": "0" * 40, "siblings": files}

    def whoami(self, body: bytes) -> tuple[int, dict[str, Any]]:
        return 200, {"type": "user", "name": USER}

    def validate(self, body: bytes) -> tuple[int, dict[str, Any]]:
        front = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        if not isinstance(front, dict):
            return 400, {"errors": [{"message": "no metadata"}]}
        if front.get("license") == "unheard-of":
            return 400, {"errors": [{"message": '"license" must be one of [apache-2.0, mit, other]'}]}
        return 200, {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo: str) -> tuple[int, dict[str, Any]]:
        if not repo.startswith(f"{USER}/"):
            return 403, {"error": f"You don't have write access to {repo}"}
        names = [entry["path"] for entry in json.loads(body)["files"]]
        there = self.pointers | {name: git_hash(content) for name, content in self.inline.items()}
        files = [
            {
                "path": name,
                "uploadMode": "lfs" if name.endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": there.get(name),
            }
            for name in names
        ]
        return 200, {"files": files}

    def batch(self, body: bytes, repo: str) -> tuple[int, dict[str, Any]]:
        objects = json.loads(body)["objects"]
        for wanted in objects:
            oid = wanted["oid"]
            if oid not in self.verified:
                hrefs = {"upload": f"{self.url}/lfs/{oid}", "verify": f"{self.url}/verify/{oid}"}
                wanted["actions"] = {action: {"href": href} for action, href in hrefs.items()}
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

    def xet_token(self, body: bytes, repo: str) -> tuple[int, dict[str, Any]]:
        return 200, {"casUrl": f"{self.url}/cas", "accessToken": XET_TOKEN, "exp": int(time.time()) + 3600}

    def xorb(self, body: bytes, name: str) -> tuple[int, dict[str, Any]]:
        self.xorbs[name] = len(body)
        return 200, {"was_inserted": True}

    def xet_shard(self, body: bytes) -> tuple[int, dict[str, Any]]:
        return 200, {"result": 1}

    def commit(self, body: bytes, repo: str) -> tuple[int, dict[str, Any]]:
        entries = [json.loads(line) for line in body.splitlines()]
        values = {kind: [e["value"] for e in entries if e["key"] == kind] for kind in ("header", "file", "lfsFile")}
        if sum(map(len, values.values())) != len(entries):
            return 400, {"error": f"a push has only {', '.join(values)}"}
        for value in values["lfsFile"]:
            # what Xet brings cannot be put together again here
            if value["oid"] not in self.verified and not self.xorbs:
                return 400, {"error": f"{value['path']} is not in the storage"}
        for value in values["file"]:
            self.inline[value["path"]] = base64.b64decode(value["content"], validate=True)
        for value in values["lfsFile"]:
            self.pointers[value["path"]] = value["oid"]
            self.large[value["path"]] = self.objects.get(value["oid"], b"")
        self.commits += 1
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES = (
    ("POST", "/api/repos/create", Hub.create),
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("GET", f"/api/models/({HUB_ID})", Hub.info),
    ("GET", f"/api/models/({HUB_ID})/revision/main", Hub.info),
    ("POST", "/api/validate-yaml", Hub.validate),
    ("POST", f"/api/models/({HUB_ID})/preupload/main", Hub.preupload),
    ("POST", rf"/({HUB_ID})\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Hub.store),
    ("POST", "/verify/([0-9a-f]{64})", Hub.verify),
    ("GET", f"/api/models/({HUB_ID})/xet-write-token/main", Hub.xet_token),
    ("POST", "/cas/v1/xorbs/default/([0-9a-f]{64})", Hub.xorb),
    ("POST", "/cas/v1/shards", Hub.xet_shard),
    ("POST", f"/api/models/({HUB_ID})/commit/main", Hub.commit),
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: two would wait for an acknowledgement
    hub: Hub

    def handle_call(self) -> None:
        self.hub.calls.append(f"{self.command} {self.path}")
        if self.command == "PUT" and self.hub.room is not None and self.hub.stored >= self.hub.room:
            self.rfile.read(1000)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.read_body()
        if not self.allowed():
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

    def allowed(self) -> bool:
        """Storage has addresses and a token of its own, and must not get the user's; cards are checked for all."""
        credentials = self.headers.get("Authorization")
        if self.path.startswith(("/lfs/", "/cas/")):
            return credentials == (None if self.path.startswith("/lfs/") else f"Bearer {XET_TOKEN}")
        after, part = self.hub.expires or (self.hub.stored + 1, "")
        expired = self.hub.stored >= after and part in self.path
        return (credentials == f"Bearer {self.hub.token}" and not expired) or (
            credentials is None and "validate" in self.path
        )

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
