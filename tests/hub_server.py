"""A model hub on this machine: as much of the two hubs' protocols as a download needs.

Both the Hugging Face Hub's and ModelScope's, at one address. Files are bytes in memory; connections
can be cut, repositories gated. Not for uploads, search or anything else a hub does.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, unquote_plus, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
Repositories = Mapping[str, Mapping[str, bytes]]


class Request(NamedTuple):
    """What a client asked for; `range` is its Range header."""

    method: str
    path: str
    range: str | None


class HubServer(ThreadingHTTPServer):
    """Serves `repositories` ({"ORG/NAME": {"path": bytes}}) on a free port of 127.0.0.1."""

    daemon_threads = True

    def __init__(self, repositories: Repositories) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = {name: dict(files) for name, files in repositories.items()}
        self.requests: list[Request] = []
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}  # file: bytes sent before its next connection breaks
        self.down: set[str] = set()  # files that answer 503
        self.down_after_cut = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the GET requests for file `path`, in order."""
        gets = [request for request in self.requests if request.method == "GET"]
        return [get.range for get in gets if path in unquote_plus(get.path)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are part of the tests."""


@contextmanager
def hub_server(repositories: Repositories) -> Iterator[HubServer]:
    """Serve `repositories` while the block runs."""
    server = HubServer(repositories)
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
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.requests.append(Request(self.command, self.path, self.headers["Range"]))
        url = urlsplit(self.path)
        path, query = unquote(url.path).strip("/"), parse_qs(url.query)
        if path.startswith("api/v1/models/"):
            self._modelscope(path.removeprefix("api/v1/models/"), query)
        else:
            self._huggingface(path)

    def _huggingface(self, path: str) -> None:
        parts = path.removeprefix("api/models/").split("/")
        name, verb, rest = "/".join(parts[:2]), parts[2:3], parts[3:]
        files = self.server.repositories.get(name)
        if files is None:
            return self._fail(404, "RepoNotFound")
        if name in self.server.gated:
            return self._fail(403, "GatedRepo")
        if rest[:1] not in ([], ["main"], [REVISION]):
            return self._fail(404, "RevisionNotFound")
        if verb == ["resolve"]:
            return self._file(files, "/".join(rest[1:]))
        if verb == ["tree"]:
            return self._json([_entry(*item) for item in files.items()])
        siblings = [{"rfilename": file} for file in files]
        return self._json({"id": name, "modelId": name, "sha": REVISION, "siblings": siblings})

    def _modelscope(self, path: str, query: dict[str, list[str]]) -> None:
        name, _, verb = ("/".join(path.split("/")[:2]), "", "/".join(path.split("/")[2:]))
        files = self.server.repositories.get(name)
        if files is None:
            return self._fail(404)
        if name in self.server.gated:
            return self._fail(403)
        if verb == "repo":
            return self._file(files, query["FilePath"][0])
        if verb == "repo/files":
            listed = [
                {"Path": file, "Name": file.split("/")[-1], "Type": "blob", "Size": len(content),
                 "Sha256": hashlib.sha256(content).hexdigest(), "Revision": REVISION}
                for file, content in files.items()
            ]  # fmt: skip
            return self._json({"Code": 200, "Success": True, "Data": {"Files": listed}})
        branches = [{"Revision": "master", "CreatedAt": 0}]
        data = {"RevisionMap": {"Branches": branches, "Tags": []}, "Name": name}
        return self._json({"Code": 200, "Success": True, "Data": data})

    def _file(self, files: Mapping[str, bytes], path: str) -> None:
        if path not in files:
            return self._fail(404, "EntryNotFound")
        if path in self.server.down:
            return self._fail(503)
        content = files[path]
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if self.headers["Range"] else 200)
        if self.headers["Range"]:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in self.server.cut:
            self.wfile.write(content[start : start + self.server.cut.pop(path)])
            self.close_connection = True
            if self.server.down_after_cut:
                self.server.down.add(path)
        else:
            self.wfile.write(content[start:])

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": digest[:40]}
