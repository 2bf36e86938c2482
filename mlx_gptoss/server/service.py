"""What all endpoints share: the model, its name, the gate, and how a request becomes replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from ..chat.stream import Events
from ..model import Model
from .errors import ApiError
from .event_queue import EventQueue
from .guard import Gate
from .metrics import Metrics
from .store import ResponseStore

NANO_NAME = "mlx-gptoss-nano"


@dataclass
class Service:
    """One server. model_id: the name that it gives its model; aliases: others that it answers to.
    open: requests that are being answered. running: of those, responses by their id, as far as they are written."""

    model: Model
    gate: Gate
    model_id: str
    aliases: Sequence[str] = ()
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    open_queues: set[EventQueue] = field(default_factory=set)
    store: ResponseStore = field(default_factory=ResponseStore)
    running_responses: dict[str, tuple[dict[str, Any], EventQueue]] = field(default_factory=dict)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError unless it is the model that is loaded; None is."""
        if name is not None and name != self.model_id and name not in self.aliases:
            message = f"the model {name!r} is not loaded here: ask for {self.model_id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def start(self, *replies: Callable[[], Events]) -> EventQueue:
        """Call these, which submit one reply each, and listen to them. To be given to finish() in the end.

        They run on another thread: rendering and tokenizing a long conversation takes its time.
        """
        queue = EventQueue(await asyncio.to_thread(_start_all, replies))
        self.open_queues.add(queue)
        return queue

    def render_metrics(self) -> bytes:
        """The metrics, as of now."""
        status = self.model.status
        self.metrics.running.set(status.running)
        self.metrics.waiting.set(status.waiting)
        self.metrics.prefix_cache_bytes.set(status.prefix_bytes)
        return self.metrics.render()

    def finish(self, queue: EventQueue) -> None:
        """End what still runs of a request."""
        self.open_queues.discard(queue)
        queue.close()


def model_names(model: str | None) -> tuple[str, tuple[str, ...]]:
    """The name of a --model for the interface, and its other names. Where a folder lies is nobody's business."""
    if model is None:
        return NANO_NAME, ()
    folder = Path(model)
    if folder.exists():
        return folder.resolve().name, (model,)
    return model, (model.rpartition("/")[2],)


def _start_all(replies: Sequence[Callable[[], Events]]) -> list[Events]:
    started: list[Events] = []
    try:
        for reply in replies:
            started.append(reply())
    except BaseException:
        for events in started:
            events.close()
        raise
    return started


def _get_service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(_get_service)]
