"""A stand-in of the Hugging Face hub: as much of its HTTP interface as ``huggingface_hub`` asks of it to fetch models.

``GET /api/models/REPO[/revision/REVISION]`` tells a model's commit, ``…/tree/COMMIT`` its files, and
``/REPO/resolve/COMMIT/FILE`` gives them.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class FakeHub:
    """Models by name. ``branches``: (name, branch) → commit; ``commits``: (name, commit) → folder with the files."""

    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    commits: dict[tuple[str, str], Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)  # methods and paths of requests, in order
    url: str = ""

    def publish(self, name: str, folder: Path, branch: str = "main") -> str:
        """Make a commit of a folder's files, and put it at the end of a branch."""
        commit = hashlib.sha1(f"{name} {folder} {len(self.commits)}".encode()).hexdigest()
        self.commits[name, commit] = folder
        self.branches[name, branch] = commit
        return commit

    def fetched(self) -> list[str]:
        """Return the names of the files that were fetched, and forget all requests."""
        found = [path.rpartition("/")[2] for path in self.asked if path.startswith("GET") and "/resolve/" in path]
        self.asked.clear()
        return found

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body."""
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^?]+))?(?:\?.*)?", path):
            name, kind, revision = found[1], found[2], found[3] or "main"
            if name not in {known for known, _ in self.commits}:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            commit = self.branches.get((name, revision), revision)
            if (name, commit) not in self.commits:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            files = sorted(file for file in self.commits[name, commit].iterdir() if file.is_file())
            if kind == "tree":
                body: Any = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _oid(file)}
                    for file in files
                ]
            else:
                body = {"id": name, "sha": commit, "siblings": [{"rfilename": file.name} for file in files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/?]+)", path):
            name, commit, file = found[1], self.branches.get((found[1], found[2]), found[2]), found[3]
            if name in self.gated and token is None:
                return 403, {"X-Error-Code": "GatedRepo"}, b""
            place = self.commits.get((name, commit), Path("/nowhere")) / file
            if not place.is_file():
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            return 200, {"ETag": f'"{_oid(place)}"', "X-Repo-Commit": commit}, place.read_bytes()
        return 404, {}, b""


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve an empty hub on this host."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            status, headers, body = hub.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are in ``hub.asked``."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
