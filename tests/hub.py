"""A small model hub on this machine: as much of its interface as its own library asks for."""

from __future__ import annotations

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


class Hub:
    """Repositories of models, each with commits and a branch ``main``; counts what is asked."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.main: dict[str, str] = {}
        self.requests: list[str] = []
        # Bytes that a repository says each of its files has.
        self.claimed: dict[str, int] = {}
        self.url = ""

    def commit(self, repository: str, folder: Path) -> str:
        """Take a folder's files as a new commit, which becomes ``main``; return its name."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        content = b"".join(name.encode() + content for name, content in files.items())
        commit = hashlib.sha1(content).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        self.main[repository] = commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Answer a request: status, headers, body."""
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            repository, what, revision = match.groups()
            return self._described(repository, revision or "main", what == "tree")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups())
        return 404, {}, b""

    def _found(self, repository: str, revision: str) -> tuple[str, dict[str, bytes] | None]:
        commit = self.main.get(repository, "") if revision == "main" else revision
        return commit, self.commits.get(repository, {}).get(commit)

    def _described(
        self, repository: str, revision: str, tree: bool
    ) -> tuple[int, dict[str, str], bytes]:
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
        else:
            claimed = self.claimed.get(repository)
            siblings = [
                {"rfilename": name, "size": claimed or len(content)}
                for name, content in files.items()
            ]
            listed = {"id": repository, "sha": commit, "siblings": siblings}
        return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()

    def _file(self, repository: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        commit, files = self._found(repository, revision)
        if files is None or name not in files:
            what = "RepoNotFound" if repository not in self.main else "EntryNotFound"
            return 404, {"X-Error-Code": what, "X-Repo-Commit": commit}, b""
        return 200, {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": commit}, files[name]


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub on a free port."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
