"""A small hub on this machine: as much of its interface as its own library asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Answer = tuple[int, dict[str, str], bytes]

TOKEN = "hf_ATokenThatNobodyShouldEverRead"
# Whose data sets that token may write; others it may read.
ORGANIZATION = "lab"
# Larger files, and those that are no text, go to the store of large files.
REGULAR_BYTES = 1000


class Hub:
    """Repositories of models and data sets, each with commits and a branch ``main``.

    It counts what is asked. A data set's name begins with ``datasets/``.
    """

    def __init__(self) -> None:
        # Large files by SHA-256; how often each was sent; the data sets that are private.
        self.store: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.private: set[str] = set()
        # Requests that fail: the next one that a pattern finds is answered so.
        self.faults: list[tuple[str, int]] = []
        # A request that a pattern finds waits here until it is let go.
        self.held, self.release, self.hold = threading.Event(), threading.Event(), ""
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.main: dict[str, str] = {}
        self.requests: list[str] = []
        self.url = ""

    def commit(self, repository: str, folder: Path) -> str:
        """Take a folder's files as a new commit, which becomes ``main``; return its name."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self._commit(repository, files)

    def _commit(self, repository: str, files: dict[str, bytes]) -> str:
        content = b"".join(name.encode() + content for name, content in files.items())
        commit = hashlib.sha1(content).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        self.main[repository] = commit
        return commit

    def answer(self, method: str, path: str, token: str, body: bytes) -> Answer:
        """Answer a request: status, headers, body."""
        asked = f"{method} {path}"
        if self.hold and re.search(self.hold, asked):
            self.held.set()
            self.release.wait()
        for fault in self.faults:
            if re.search(fault[0], asked):
                self.faults.remove(fault)
                return fault[1], {}, b"<html>not now</html>"
        if method in ("POST", "PUT"):
            return self._written(path, token, body)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/tree/main)?", path):
            return self._described(f"datasets/{match[1]}", "main", bool(match[2]))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            repository, what, revision = match.groups()
            return self._described(repository, revision or "main", what == "tree")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups())
        return 404, {}, b""

    def _found(self, repository: str, revision: str) -> tuple[str, dict[str, bytes] | None]:
        commit = self.main.get(repository, "") if revision == "main" else revision
        return commit, self.commits.get(repository, {}).get(commit)

    def _written(self, path: str, token: str, body: bytes) -> Answer:
        """Answer what changes something: as (status, content)."""
        if match := re.fullmatch(r"/lfs/(\w+)", path):  # a signed address, which takes no token
            whole = hashlib.sha256(body).hexdigest() == match[1]
            self.store |= {match[1]: body} if whole else {}
            self.sent.append(match[1])
            return 200 if whole else 400, {}, b""
        content = [json.loads(line) for line in body.splitlines()]
        name = re.sub(r"^/(api/)?datasets/|(\.git/info|/preupload|/commit)/.*", "", path)
        if path == "/api/repos/create":
            name = f"{content[0]['organization']}/{content[0]['name']}"
        status, found = 200, dict[str, Any]()
        if token != TOKEN:
            status, found = 401, {"error": f"no such token: {token}"}
        elif path == "/api/repos/create" and f"datasets/{name}" in self.main:
            status, found = 409, {"error": "it is there", "url": f"{self.url}/datasets/{name}"}
        elif path != "/api/validate-yaml" and name.partition("/")[0] != ORGANIZATION:
            status, found = 403, {"error": f"no right to write there, {token}"}
        elif path != "/api/validate-yaml":
            found = self._changed(path, f"datasets/{name}", content)
        return status, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def _changed(self, path: str, repository: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        if path == "/api/repos/create":
            if "private" in (content[0].get("visibility"), content[0].get("private") and "private"):
                self.private.add(repository)
            self._commit(repository, {".gitattributes": b"*.h5 filter=lfs"})
            return {"url": f"{self.url}/{repository}"}
        if "/preupload/" in path:
            return {
                "files": [
                    {"path": one["path"], "uploadMode": _mode(one), "shouldIgnore": False}
                    for one in content[0]["files"]
                ]
            }
        if path.endswith("/objects/batch"):
            for one in content[0]["objects"]:
                if one["oid"] not in self.store:
                    one["actions"] = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}
            return {"transfer": "basic", "objects": content[0]["objects"]}
        files = dict(self.commits[repository][self.main[repository]])
        for kind, value in ((one["key"], one["value"]) for one in content):
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.store[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        commit = self._commit(repository, files)
        return {"commitUrl": f"{self.url}/{repository}/commit/{commit}", "commitOid": commit}

    def _described(self, repository: str, revision: str, tree: bool) -> Answer:
        commit, files = self._found(repository, revision)
        if files is None:
            known = repository in self.main
            return 404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, b""
        listed: Any
        if tree:
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in files.items()
            ]
            for one, content in zip(listed, files.values(), strict=True):
                if (large := hashlib.sha256(content).hexdigest()) in self.store:
                    one["lfs"] = {"oid": large, "size": len(content), "pointerSize": 100}
        else:
            siblings = [
                {"rfilename": name, "size": len(content)} for name, content in files.items()
            ]
            listed = {"id": repository, "sha": commit, "siblings": siblings}
            listed["private"] = repository in self.private
        return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()

    def _file(self, repository: str, revision: str, name: str) -> Answer:
        commit, files = self._found(repository, revision)
        if files is None or name not in files:
            what = "RepoNotFound" if repository not in self.main else "EntryNotFound"
            return 404, {"X-Error-Code": what, "X-Repo-Commit": commit}, b""
        return 200, {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": commit}, files[name]


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _mode(asked: dict[str, Any]) -> str:
    text = b"\0" not in base64.b64decode(asked["sample"])
    return "regular" if text and asked["size"] <= REGULAR_BYTES else "lfs"


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub on a free port."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            given = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, headers, body = hub.answer(self.command, path, token, given)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
