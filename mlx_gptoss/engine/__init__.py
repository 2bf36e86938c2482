"""Requests in, streams of tokens out: scheduling, double-buffered steps, stop strings. Plain Python, no arrays."""

from __future__ import annotations

from .engine import Engine, Stream
from .request import Finished, FinishReason, Guide, Request, Token
from .stop import StopStrings

__all__ = ["Engine", "FinishReason", "Finished", "Guide", "Request", "StopStrings", "Stream", "Token"]
