"""The messages between a server and the process of one of its models, pickled over a socket pair.

The server sends Load; the process answers with Planned. The server makes room and sends Proceed; the process answers
with Loaded. From then on each Start is answered with Started, or with Failed, and Arrived follows until the reply's
Finished. Any thread may send; the id of a reply tells which one a message belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...chat.reply import Event
from ...loading.memory import MemoryPlan
from ...loading.plan import LoadRequest


@dataclass(frozen=True)
class Load:
    """Plan this request, and load it after Proceed. log_level, log_format: as of log_output.configure_logging."""

    request: LoadRequest
    log_level: str
    log_format: str


@dataclass(frozen=True)
class Planned:
    """The memory that the model would take by itself."""

    memory: MemoryPlan


@dataclass(frozen=True)
class Proceed:
    """Load now. available_bytes: what the model may take."""

    available_bytes: int


@dataclass(frozen=True)
class Loaded:
    """The model is ready. The fields are those of Model."""

    backend: str
    format: str
    memory: MemoryPlan
    slots: int
    load_s: float


@dataclass(frozen=True)
class Start:
    """Start a reply: Model.stream(prompt, **options) or Model.stream_raw(prompt, **options)."""

    id: int
    kind: Literal["stream", "stream_raw"]
    prompt: Any
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Cancel:
    """End a reply. Nothing more of it arrives."""

    id: int


@dataclass(frozen=True)
class Started:
    """A reply has been submitted to the engine."""

    id: int
    prompt_tokens: int


@dataclass(frozen=True)
class Arrived:
    """Events of replies, and the size of the prefix cache now."""

    events: tuple[tuple[int, list[Event]], ...]
    prefix_bytes: int


@dataclass(frozen=True)
class Failed:
    """A reply failed; without an id, the model did."""

    id: int | None
    error: Exception


FromServer = Load | Proceed | Start | Cancel
FromModel = Planned | Loaded | Started | Arrived | Failed
