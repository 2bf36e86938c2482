"""Requests in, streams of tokens out: scheduling, double-buffered steps, stop strings. Plain Python, no arrays."""

from __future__ import annotations

from .engine import Engine, Stream
from .prefix_files import PrefixFiles
from .request import Finished, FinishReason, Guide, Request, Status, Token
from .stop import StopStrings

__all__ = [
    "Engine",
    "FinishReason",
    "Finished",
    "Guide",
    "PrefixFiles",
    "Request",
    "Status",
    "StopStrings",
    "Stream",
    "Token",
]
