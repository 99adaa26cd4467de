"""A model hub on this machine that takes uploads: as much of the protocol as one commit needs.

Keeps what it received, by repository. Not for downloads (tests/hub_server.py).
"""

import hashlib
import json
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"


class UploadServer(ThreadingHTTPServer):
    """Answers on a free port of 127.0.0.1; `token` may write, `reader` may not."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # by sha256, not yet in a commit
        self.commits: list[str] = []  # their messages
        self.broken = False  # answers every commit with 503

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def upload_server() -> Iterator[UploadServer]:
    """Serve while the block runs."""
    server = UploadServer()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: UploadServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        repository = "/".join(self.path.split("/")[3:5])
        files = self.server.repositories.get(repository)
        if files is None:
            return self._answer(404, {"error": "Repository not found"})
        siblings = [{"rfilename": name} for name in files]
        entries = [
            {"type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in files.items()
        ]
        info = {"id": repository, "sha": REVISION, "siblings": siblings}
        return self._answer(200, entries if "/tree/" in self.path else info)

    def do_PUT(self) -> None:
        content = self._body()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer(400, {"error": "another sha256"})
        self.server.large[oid] = content
        return self._answer(200, {})

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        status = {"Bearer hf_token": 200, "Bearer hf_reader": 403}.get(
            self.headers.get("Authorization", ""), 401
        )
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if status != 200:
            return self._answer(status, {"error": "not allowed"})
        if path.endswith("/info/lfs/objects/batch"):
            return self._answer(200, self._batch(json.loads(body)))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        repository = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if "/commit/" in path:
            if self.server.broken:
                return self._answer(503, {"error": "busy"})
            self._commit(repository, body)
            url = f"{self.server.url}/{repository}/commit/{REVISION}"
            return self._answer(200, {"commitUrl": url, "commitOid": REVISION})
        return self._answer(404, {"error": f"what is {path}?"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repositories:
            return self._answer(409, {**url, "error": "You already created this model repo"})
        self.server.repositories[name] = {}
        # said by its first name since version 2 of the hub's library, by the second before
        is_private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.private[name] = is_private
        return self._answer(200, url)

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.server.url}/large/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.server.repositories[repository]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise ValueError(line["key"])

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
