"""Access checks before every request: host, origin, API key and size.

The headers are checked first. Nothing of a body is read before the host, the origin and the key are accepted.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .error_forms import error_response
from .errors import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOCAL_HOSTS = (*LOOPBACK, "host.docker.internal")  # the last is this machine's name in a container of Docker's
# Pages of this machine and of programs installed on it. "null" is not among them: a sandboxed frame of any site has it.
LOCAL_ORIGIN = re.compile(
    r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?|(app|tauri|vscode-webview|vscode-file)://[\w.-]+", re.ASCII
)
PUBLIC_PATHS = ("/", "/health", "/ready")  # need no API key; neither do the files under /page/
# json.loads holds the interpreter's lock to its end, and all streams wait: under 100 ms at both limits. No text of 16
# MiB fits into a context of 131,072 tokens, the longest of which has 128 bytes. A prompt has at most 131,072 token ids,
# and 10,000 messages have about 80,000 values.
MAX_BODY_BYTES = 16 << 20
MAX_JSON_VALUES = 250_000  # in one body, counted by commas and opening brackets, also those in texts
MAX_BUFFERED_BODIES = 8  # limit on the total size of bodies being received, in units of max_body_bytes


@dataclass
class Gate:
    """The access rules of one server, and whether it still accepts requests.

    api_key: the key that every request needs, except for PUBLIC_PATHS and the page; None for no key.
    allowed_hosts: accepted names in the Host header, against DNS rebinding: a page whose own name is made to resolve to
        this machine still sends that name. None accepts any, for a server with a key: such a page does not have it.
    allowed_origins: origins of other sites whose pages may use this server; "*" allows all of them. A server whose
        allowed_hosts are LOCAL_HOSTS, which listens to this machine alone, lets in LOCAL_ORIGIN as well.
    max_body_bytes: the largest body of one request.
    draining: POST requests are refused, since the server is shutting down.
    buffered_bytes: size of the bodies that are being received now, over all requests.
    """

    api_key: str | None = None
    allowed_hosts: Sequence[str] | None = LOCAL_HOSTS
    allowed_origins: Sequence[str] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    draining: bool = False
    buffered_bytes: int = field(default=0, init=False)

    @property
    def is_local(self) -> bool:
        """Whether the server listens to this machine alone."""
        return self.allowed_hosts == LOCAL_HOSTS

    def check(self, scope: Scope) -> None:
        """Raise ApiError if the request is not allowed. Looks at the path and the headers only."""
        headers = Headers(scope=scope)
        path: str = scope["path"]
        if scope["method"] == "GET" and (path == "/" or path.startswith("/page/")):
            return  # files of the program, the same for everyone; the page shows why its requests are refused
        host = headers.get("host", "")
        if not self._is_allowed_host(_host_name(host)):
            use = "http://127.0.0.1" if self.is_local else "this machine's address"
            raise ApiError(403, f"the Host {host!r} is not allowed: use {use}", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed_origin(origin, host):
            raise ApiError(403, f"the origin {origin!r} is not allowed: add it with --cors", code="origin")
        if self.api_key is not None and path not in PUBLIC_PATHS:
            self._check_key(headers)
        if self.draining and scope["method"] == "POST":
            raise ApiError(503, "the server is shutting down", code="draining", headers={"Retry-After": "10"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            raise self.too_large()

    def too_large(self) -> ApiError:
        """The error for a body over the limit."""
        return ApiError(413, f"the body is larger than {self.max_body_bytes} bytes", code="body_too_large")

    def _is_allowed_host(self, name: str) -> bool:
        """An address is allowed on a network: DNS rebinding needs a name."""
        if self.allowed_hosts is None or name in self.allowed_hosts:
            return True
        return not self.is_local and _is_address(name)

    def _is_allowed_origin(self, origin: str, host: str) -> bool:
        if "*" in self.allowed_origins or origin in self.allowed_origins:
            return True
        scheme, separator, netloc = origin.partition("://")
        own_page = bool(separator) and scheme in ("http", "https") and netloc == host
        return own_page or (self.is_local and LOCAL_ORIGIN.fullmatch(origin) is not None)

    def _check_key(self, headers: Headers) -> None:
        """Raise ApiError unless the key is in Authorization: Bearer or, as Anthropic's clients send it, X-Api-Key."""
        assert self.api_key is not None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        keys = [key if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
        expected = self.api_key.encode()
        matches = [hmac.compare_digest(key.strip().encode("latin-1"), expected) for key in keys]  # never only the first
        if not any(matches):
            challenge = {"WWW-Authenticate": "Bearer"}
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers=challenge)


class Guard:
    """ASGI middleware that applies a Gate.

    It reads the complete body of an allowed request and passes it on as one message. The message that follows it is
    the disconnect of the client.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        pieces: list[bytes] = []
        try:
            self.gate.check(scope)
            complete = await self._read(receive, pieces)
        except ApiError as error:
            await error_response(error, scope)(scope, receive, send)
            return
        finally:
            self.gate.buffered_bytes -= sum(map(len, pieces))
        if complete:
            # On a thread, join lets go of the interpreter's lock. A single piece is returned as it is.
            body = pieces[0] if len(pieces) == 1 else await asyncio.to_thread(b"".join, pieces)
            pieces.clear()
            await self.app(scope, _replay_body(body, receive), send)

    async def _read(self, receive: Receive, pieces: list[bytes]) -> bool:
        """Append the request's body to `pieces`. Returns False if the client disconnected before its end."""
        more, size, values = True, 0, 0
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            piece = message.get("body", b"")
            pieces.append(piece)
            size += len(piece)
            self.gate.buffered_bytes += len(piece)
            if size > self.gate.max_body_bytes:
                raise self.gate.too_large()
            if self.gate.buffered_bytes > MAX_BUFFERED_BODIES * self.gate.max_body_bytes:
                raise ApiError(
                    503, "too many large requests at once: try again later", code="busy", headers={"Retry-After": "5"}
                )
            values += piece.count(b",") + piece.count(b"[") + piece.count(b"{")
            if values > MAX_JSON_VALUES:
                raise ApiError(
                    413, f"the body holds more than {MAX_JSON_VALUES} commas and brackets", code="body_too_large"
                )
            more = message.get("more_body", False)
        return True


def _replay_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body first, then the original messages."""
    sent = False

    async def next_message() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


def _is_address(name: str) -> bool:
    """Whether a host is an IP address and not a name."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str:
    """The host name in a Host header, in lower case, without port and brackets."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower()
