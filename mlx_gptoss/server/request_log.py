"""The request log: one line for every request, at its end, and the X-Request-Id header.

A line has the times, the token counts and how the request ended. It never has text of a prompt or an answer, and no
key. What a client chooses in it (path, model name, id) is bounded in length and cannot end a line or move a cursor.

The middleware keeps a RequestRecord for the request in hand. The rest of the server adds to it by add_reply(),
note_model() and note_error(), which do nothing where there is no request.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..chat.reply import Finished

HEADER: Final = "X-Request-Id"
CLIENT_CLOSED_REQUEST: Final = 499  # nginx's status for a client that leaves before its response is complete
DEBUG_PATHS: Final = frozenset({"/health", "/ready", "/metrics"})  # asked for every few seconds
MAX_CHARACTERS: Final = 200  # of a value that a client chooses
MAX_IGNORED: Final = 20  # names of ignored fields in one line
_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_PLAIN = re.compile(r"[\w.:/+@\[\],*{}%~-]+", re.ASCII)  # values that need no quotes

log: logging.Logger = logging.getLogger(__name__)


@dataclass(eq=False)
class RequestRecord:
    """What is known of one request. started: in perf_counter() seconds. status: None before the response has begun.

    replies: the ends of the generations made for it. closed: its line has been written.
    """

    request_id: str
    client: str
    method: str
    path: str
    started: float = field(default_factory=time.perf_counter)
    route: str | None = None
    status: int | None = None
    model: str | None = None
    error_code: str | None = None
    ignored: tuple[str, ...] = ()
    replies: list[Finished] = field(default_factory=list)
    closed: bool = False

    def fields(self) -> dict[str, Any]:
        """The values of the line in their order; None where one is not known. Times in seconds."""
        total_s = time.perf_counter() - self.started
        return {
            "request_id": self.request_id,
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "route": self.route,
            "status": self.status,
            "model": self.model,
            **_totals(self.replies, total_s),
            "total_s": round(total_s, 4),
            "ignored_fields": list(self.ignored[:MAX_IGNORED]) or None,
            "error_code": self.error_code,
        }


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def current() -> RequestRecord | None:
    """The record of the request in hand; None outside of one."""
    return _current.get()


def note_model(name: str) -> None:
    """Record the model that answers the request in hand."""
    if (record := _current.get()) is not None:
        record.model = name


def note_error(code: str | None, status: int) -> None:
    """Record the error that the client is told of, in a response or in the middle of a stream."""
    if (record := _current.get()) is not None and status != CLIENT_CLOSED_REQUEST:
        record.error_code = code or f"status_{status}"


def add_reply(record: RequestRecord | None, finished: Finished) -> None:
    """Record the end of a generation. One whose request has been answered before, in the background, gets a line of its
    own."""
    if record is None:
        return
    record.replies.append(finished)
    if record.closed:
        record.replies, record.started = [finished], time.perf_counter()
        _write(record, logging.INFO, record.fields() | {"total_s": None, "status": None, "background": True})


class RequestLog:
    """ASGI middleware that writes the line of each request when its response has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = _record_of(scope)
        complete = left = False

        async def watching_receive() -> Message:
            nonlocal left
            message = await receive()
            left = left or (message["type"] == "http.disconnect" and not complete)
            return message

        async def watching_send(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[HEADER] = record.request_id
            await send(message)
            complete = complete or (message["type"] == "http.response.body" and not message.get("more_body", False))

        token = _current.set(record)
        try:
            await self.app(scope, watching_receive, watching_send)
        finally:
            _current.reset(token)
            if left or not complete:
                record.status = CLIENT_CLOSED_REQUEST if left or record.status is None else record.status
            self._end(record, scope)

    @staticmethod
    def _end(record: RequestRecord, scope: Scope) -> None:
        record.route = getattr(scope.get("route"), "path", None)
        record.ignored = tuple(sorted(scope.get("ignored_fields", ())))
        server_error = record.status is not None and record.status >= 500
        quiet = record.path in DEBUG_PATHS
        _write(record, logging.DEBUG if quiet else logging.WARNING if server_error else logging.INFO, record.fields())
        record.closed = True


def text_line(values: dict[str, Any]) -> str:
    """The line for people: the request and its status, then name=value for all that is known."""
    values = dict(values)
    head = [_text(values.pop(name)) for name in ("client", "method", "path", "status")]
    values.pop("route")
    return " ".join((*head, *(f"{name}={_text(value)}" for name, value in values.items() if value is not None)))


def _write(record: RequestRecord, level: int, values: dict[str, Any]) -> None:
    if log.isEnabledFor(level):
        log.log(level, "%s", text_line(values), extra={"request": values})


def _record_of(scope: Scope) -> RequestRecord:
    given = Headers(scope=scope).get(HEADER, "")
    client = scope.get("client")
    return RequestRecord(
        request_id=given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}",
        client=str(client[0]) if client else "-",
        method=scope.get("original_method", scope["method"]),
        path=scope["path"],
    )


def _totals(replies: list[Finished], total_s: float) -> dict[str, Any]:
    """Counts, times and the end of the generations of a request: one, or several for n choices or a server's tools.
    Tokens are added up; the times are those of the first one."""
    if not replies:
        names = ("prompt_tokens", "cached_tokens", "completion_tokens", "queue_s", "prefill_s", "ttft_s")
        return dict.fromkeys((*names, "tokens_per_s", "finish_reason"))
    first, made = replies[0].timings, sum(reply.usage.completion_tokens for reply in replies)
    rate = first.decode_tok_s if len(replies) == 1 else made / total_s if total_s else 0.0
    return {
        "prompt_tokens": sum(reply.usage.prompt_tokens for reply in replies),
        "cached_tokens": sum(reply.usage.cached_tokens for reply in replies),
        "completion_tokens": made,
        "queue_s": round(first.queue_s, 4),
        "prefill_s": round(first.ttft_s - first.queue_s, 4),
        "ttft_s": round(first.ttft_s, 4),
        "tokens_per_s": round(rate, 1),
        "finish_reason": replies[-1].finish_reason,
    }


def _text(value: Any) -> str:
    """A value as one word without control characters, in quotes where it needs them."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return _text(",".join(map(str, value)))
    if not isinstance(value, str):
        return str(value)
    text = escaped(value)
    return text if _PLAIN.fullmatch(text) else '"' + text.replace('"', r"\"") + '"'


def escaped(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text with everything that is not printable as an escape sequence, and at most `limit` characters of it."""
    kept = "".join(_escapes(text[:limit]))
    return kept if len(text) <= limit else f"{kept}..."


def _escapes(text: str) -> Iterator[str]:
    for character in text:
        if character == "\\" or not character.isprintable():
            yield character.encode("unicode_escape").decode("ascii")
        else:
            yield character


class TextFormatter(logging.Formatter):
    """Time, level and message on one line, which no text in the message can end. A traceback follows on its own
    lines."""

    def __init__(self) -> None:
        super().__init__("%(utc)s %(levelname)s %(source)s%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.utc = _utc(record.created)
        requests = record.name == log.name
        record.source = "" if requests else f"{record.name}: "
        if not requests:  # those of requests are escaped value by value
            record.message = escaped(record.message, limit=4000)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        head = {"time": _utc(record.created), "level": record.levelname.lower(), "logger": record.name}
        request: dict[str, Any] | None = getattr(record, "request", None)
        if request is None:
            body: dict[str, Any] = {"message": record.getMessage()}
        else:
            body = {name: escaped(v) if isinstance(v, str) else v for name, v in request.items()}
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return json.dumps(head | body)


def _utc(created: float) -> str:
    return datetime.fromtimestamp(created, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
