"""The generation engine: requests in, streams of tokens out. Scheduling, prefix cache, drafts and stop strings.

Plain Python over ints; no arrays. A runner (backends/base.py) does the computing.
"""

from __future__ import annotations

from .engine import Engine, Stream
from .prefix_files import PrefixFiles
from .request import Finished, FinishReason, Guide, LoadedAdapter, Request, Status, Token
from .stop import StopStrings

__all__ = [
    "Engine",
    "FinishReason",
    "Finished",
    "Guide",
    "LoadedAdapter",
    "PrefixFiles",
    "Request",
    "Status",
    "StopStrings",
    "Stream",
    "Token",
]
