"""A small model hub on loopback, which answers as the Hugging Face hub does to its client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The files that the server has, and the requests that it received."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    breaks: dict[str, int] = field(default_factory=dict)  # file -> bytes after which its connection breaks, once
    stalls: dict[str, int] = field(default_factory=dict)  # file -> bytes after which nothing more comes
    broken: set[str] = field(default_factory=set)  # files that answer 500
    down: bool = False
    log: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def fetched(self) -> list[str]:
        """Files whose content was requested, with the offset if it is not 0."""
        names = []
        for method, path, span in self.log:
            if method == "GET" and "/resolve/" in path:
                names.append(path.split("/", 5)[5] + (f" {span}" if span else ""))
        return sorted(names)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if self.hub.down:
            return self.send(503, b"maintenance")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo in self.hub.gated:
            return self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if repo not in self.hub.repos:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        files = self.hub.repos[repo]
        if parts[0] == "api":
            return self.api(repo, files, parts[4:])
        return self.content("/".join(parts[4:]), files)

    def api(self, repo: str, files: dict[str, bytes], rest: list[str]) -> None:
        if rest and rest[1] not in ("main", "v2", COMMIT):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        if rest and rest[0] == "tree":
            entries: Any = [
                {"type": "file", "path": name, "size": len(data), "oid": blob_id(data), **large(name, data)}
                for name, data in files.items()
                if "recursive=true" in self.path.lower() or "/" not in name
            ]
        else:
            entries = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        return self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def content(self, name: str, files: dict[str, bytes]) -> None:
        data = files[name]
        headers = {"ETag": f'"{digest(name, data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if name in self.hub.broken and self.command == "GET":
            return self.send(500, b"out of order")
        span = self.headers.get("Range")
        if span:
            start = int(span.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.send(206, data[start:], headers)
        cut = self.hub.breaks.pop(name, None) if self.command == "GET" else None
        return self.send(200, data, headers, cut)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        stall = self.hub.stalls.get(self.path.split("?")[0].rpartition("/")[2]) if self.command == "GET" else None
        if stall is not None:
            self.wfile.write(body[:stall])
            return self.hub.closing.wait(300) and None
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True


def digest(name: str, data: bytes) -> str:
    """What the hub names a file's content by: SHA-256 for large files, which are the weights here."""
    return hashlib.sha256(data).hexdigest() if name.endswith(".safetensors") else blob_id(data)


def blob_id(data: bytes) -> str:
    """git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def large(name: str, data: bytes) -> dict[str, Any]:
    """The entry of a large file that says so."""
    about = {"oid": digest(name, data), "size": len(data), "pointerSize": 134}
    return {"lfs": about} if name.endswith(".safetensors") else {}


@contextmanager
def small_hub(repos: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """A running hub with these repositories."""
    state = Hub(repos=repos)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    state.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()
