"""ASGI middleware for requests that spell an endpoint differently: without /v1, with HEAD, without a Content-Type."""

from __future__ import annotations

import re
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

_MISSING_VERSION = re.compile(
    r"/(chat/completions|completions|responses|conversations|messages|models|embeddings)(/|$)"
)


class Rewrite:
    """Passes a request on in the spelling that the routes have.

    A client whose base URL lacks /v1, or has it twice, finds the endpoint all the same. HEAD is a GET whose body the
    HTTP server leaves out. A body without a JSON Content-Type, as `curl -d` sends it, is JSON unless a web page sent
    it: pages send an Origin, and other sites could send such a body without a CORS preflight.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            changes: dict[str, Any] = {"path": _route_path(scope["path"])}
            if scope["method"] == "HEAD":
                changes |= {"method": "GET", "original_method": "HEAD"}
            headers = Headers(scope=scope)
            if "origin" not in headers and not is_json(headers.get("content-type", "")):
                others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
                changes["headers"] = [*others, (b"content-type", b"application/json")]
            scope = {**scope, **changes}
        await self.app(scope, receive, send)


def _route_path(path: str) -> str:
    path = path.rstrip("/") or "/"
    while path.startswith("/v1/v1/"):
        path = path[3:]
    if path.startswith("/api/v0/") and not path.startswith("/api/v0/models"):  # LM Studio's spelling of OpenAI's paths
        return f"/v1{path[7:]}"
    return f"/v1{path}" if _MISSING_VERSION.match(path) else path


def is_json(content_type: str) -> bool:
    """Whether a Content-Type is JSON's, or that of a format written in JSON."""
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))
