"""Streams of Ollama's API: one JSON object per line, under the type application/x-ndjson."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Any

from ..errors import dump_json
from ..sse import EventStream

MEDIA_TYPE = "application/x-ndjson"
STREAMING_RESPONSES: dict[int | str, dict[str, Any]] = {  # OpenAPI: lines, or JSON with "stream": false
    200: {"content": {"application/json": {}, MEDIA_TYPE: {}}}
}


class LineStream(EventStream):
    """A response that sends lines of JSON as they arrive. There is no keep-alive: clients parse every line."""

    media_type = MEDIA_TYPE
    keep_alive = None


def encode_line(value: Any) -> bytes:
    """Encode one line. The JSON has no line break."""
    return dump_json(value) + b"\n"


def timestamp(nanoseconds: int | None = None) -> str:
    """A time since 1970 in RFC 3339 with nanoseconds, as Go writes it. Default: now."""
    seconds, rest = divmod(time.time_ns() if nanoseconds is None else nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
