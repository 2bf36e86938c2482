"""State that all endpoints share: the model and its names, the access rules, open requests and stored responses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from ..chat.stream import Events
from ..engine import Status
from ..errors import GptOssError
from ..model import Model
from .errors import ApiError
from .event_queue import EventQueue
from .guard import Gate
from .hosted.sessions import HostedTools
from .metrics import Metrics
from .openai.running import RunningResponse
from .openai.store import ConversationStore, ResponseStore

NANO_NAME = "mlx-gptoss-nano"


@dataclass
class Service:
    """One server for one model.

    model_id: the model's name in responses. aliases: other names of it, which /v1/models lists, too.
    strict_model: requests may use only these names and other_names. Otherwise any name means this model.
    open_queues: the event queues of all requests in progress.
    store, conversations: what /v1/responses and /v1/conversations keep in memory.
    running_responses: /v1/responses in progress, by their ids. background_tasks: those that run without a client.
    hosted: the tools that the server runs itself; None if none is switched on.
    """

    model: Model
    gate: Gate
    model_id: str
    other_names: Sequence[str] = ()
    aliases: Sequence[str] = ()
    strict_model: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    open_queues: set[EventQueue] = field(default_factory=set)
    store: ResponseStore = field(default_factory=ResponseStore)
    conversations: ConversationStore = field(default_factory=ConversationStore)
    running_responses: dict[str, RunningResponse] = field(default_factory=dict)
    background_tasks: set[asyncio.Task[None]] = field(default_factory=set)
    hosted: HostedTools | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that /v1/models lists: the model's own, then the aliases."""
        return (self.model_id, *self.aliases)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 if the server is strict about names and does not know `name`. None is always known.

        Ollama's clients put ":latest" behind a name without a tag.
        """
        known = {*self.names, *self.other_names}
        if self.strict_model and name is not None and known.isdisjoint((name, name.removesuffix(":latest"))):
            message = f"the model {name!r} is not loaded: use {self.model_id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def start(self, *replies: Callable[[], Events]) -> EventQueue:
        """Submit one reply per callable and return the queue of their events. Pass it to finish() in the end.

        The callables run on a worker thread, since rendering and tokenizing a long conversation takes time.
        """
        queue = EventQueue(await asyncio.to_thread(_start_all, replies))
        self.open_queues.add(queue)
        return queue

    def render_metrics(self) -> bytes:
        """The current metrics in the text format of Prometheus."""
        try:
            status = self.model.status
        except GptOssError:  # the engine has failed or was closed
            status = Status(slots=0, running=0, waiting=0, prefix_bytes=0)
        self.metrics.up.set(status.slots > 0)
        self.metrics.running.set(status.running)
        self.metrics.waiting.set(status.waiting)
        self.metrics.prefix_cache_bytes.set(status.prefix_bytes)
        return self.metrics.render()

    def finish(self, queue: EventQueue) -> None:
        """Forget a request and cancel its replies that still run."""
        self.open_queues.discard(queue)
        queue.close()


def model_names(model: str | None) -> tuple[str, tuple[str, ...]]:
    """The API's name for a --model option, and other names for it. A local checkpoint's name does not show its path."""
    if model is None:
        return NANO_NAME, ("nano",)
    folder = Path(model)
    if folder.exists():
        return folder.resolve().name, (model,)
    return model, (model.rpartition("/")[2],)


def _start_all(replies: Sequence[Callable[[], Events]]) -> list[Events]:
    """Submit all replies, or none: if one cannot be submitted, the others are cancelled."""
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
