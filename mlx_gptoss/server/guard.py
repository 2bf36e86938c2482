"""What stands before every request: who may ask, from where, and how much a request may be.

Nothing of a body is read before the host, the origin and the key are right.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PUBLIC_PATHS = ("/", "/health")  # need no key, as the page under /page/ does not
MAX_JSON_VALUES = 2_000_000  # in one body: Python takes some 60 bytes for each
MAX_BUFFERED_BODIES = 8  # bodies of the full size that are held at once, over all requests


@dataclass
class Gate:
    """Who is let in.

    hosts: names by which a browser may call this server; None, where it listens to the network, takes any. A page that
        makes its own name point here (DNS rebinding) still sends that name.
    origins: of pages on other sites that may use it; "*" is all.
    """

    api_key: str | None = None
    allowed_hosts: Sequence[str] | None = LOOPBACK
    allowed_origins: Sequence[str] = ()
    max_body_bytes: int = 32 << 20
    draining: bool = False
    buffered_bytes: int = field(default=0, init=False)

    def check(self, scope: Scope) -> None:
        """Raises ApiError for a request that is not let in, from its head alone."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.allowed_hosts is not None and _host_name(host) not in self.allowed_hosts:
            raise ApiError(403, f"this server is not called {host!r}: use http://127.0.0.1", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed_origin(origin, host):
            raise ApiError(403, f"pages of {origin!r} may not use this server: start it with --cors", code="origin")
        path: str = scope["path"]
        if self.api_key is not None and path not in PUBLIC_PATHS and not path.startswith("/page/"):
            self._check_key(headers.get("authorization", ""))
        if self.draining and scope["method"] == "POST":
            raise ApiError(503, "the server is shutting down", code="draining", headers={"Retry-After": "10"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            raise self.too_large()

    def too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body_bytes} bytes", code="body_too_large")

    def _is_allowed_origin(self, origin: str, host: str) -> bool:
        return "*" in self.allowed_origins or origin in self.allowed_origins or urlsplit(origin).netloc == host

    def _check_key(self, authorization: str) -> None:
        assert self.api_key is not None
        scheme, _, key = authorization.partition(" ")
        same = hmac.compare_digest(key.strip().encode("latin-1"), self.api_key.encode())
        if not same or scheme.lower() != "bearer":
            headers = {"WWW-Authenticate": "Bearer"}
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers=headers)


class Guard:
    """The gate as ASGI middleware. Reads the whole body of a request that it lets in, and hands that on in one piece;
    what `receive` gives after it is that the client has gone."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        try:
            self.gate.check(scope)
            whole = await self._read(receive, body)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        finally:
            self.gate.buffered_bytes -= len(body)
        if whole:
            await self.app(scope, _replay_body(bytes(body), receive), send)

    async def _read(self, receive: Receive, body: bytearray) -> bool:
        """Add the body to `body`; False if the client left in the middle of it."""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            piece = message.get("body", b"")
            body += piece
            self.gate.buffered_bytes += len(piece)
            if len(body) > self.gate.max_body_bytes:
                raise self.gate.too_large()
            if self.gate.buffered_bytes > MAX_BUFFERED_BODIES * self.gate.max_body_bytes:
                raise ApiError(503, "too many large requests at once", code="busy", headers={"Retry-After": "5"})
            more = message.get("more_body", False)
        if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_JSON_VALUES:
            raise ApiError(413, f"the body holds more than {MAX_JSON_VALUES} values", code="body_too_large")
        return True


def _replay_body(body: bytes, receive: Receive) -> Receive:
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower()
