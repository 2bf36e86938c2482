"""State that all endpoints share: the models, the access rules, open requests and stored responses."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from ..chat.event_queue import start_replies
from ..chat.stream import Events
from ..engine import Status
from ..errors import GptOssError, ModelUnavailable
from . import request_log
from .errors import ApiError
from .event_queue import EventQueue
from .guard import Gate
from .hosted.sessions import HostedTools
from .metrics import Metrics
from .models.collector import ModelsCollector
from .models.named import NamedModel, ServedModel
from .models.pool import ModelPool
from .models.remote import RemoteModel
from .responses.running import RunningResponse
from .responses.store import ConversationStore, ResponseStore

MAX_ATTEMPTS = 3  # to submit a request to a model whose process may end at any time


@dataclass
class Service:
    """One server, for one model or several.

    models: the first one answers requests that name none, or one that is not known. strict_model: a request for an
    unknown name is refused. pool: loads and unloads models that have processes of their own; None for a Model in this
    one.
    open_queues: the event queues of all requests in progress. leases: those whose models must stay loaded for them.
    store, conversations: what /v1/responses and /v1/conversations keep in memory.
    running_responses: /v1/responses in progress, by their ids. background_tasks: those that run without a client.
    hosted: the tools that the server runs itself; None if none is switched on.
    """

    models: Sequence[NamedModel]
    gate: Gate
    strict_model: bool = False
    pool: ModelPool | None = None
    hosted: HostedTools | None = None
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    open_queues: set[EventQueue] = field(default_factory=set)
    leases: dict[EventQueue, RemoteModel] = field(default_factory=dict)
    store: ResponseStore = field(default_factory=ResponseStore)
    conversations: ConversationStore = field(default_factory=ConversationStore)
    running_responses: dict[str, RunningResponse] = field(default_factory=dict)
    background_tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _selected: NamedModel | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.metrics.registry.register(ModelsCollector(self.models))

    @property
    def selected(self) -> NamedModel:
        """The model of the request in hand; the first one where none was selected."""
        return self._selected or self.models[0]

    @property
    def model(self) -> ServedModel:
        """The selected model."""
        return self.selected.model

    @property
    def model_id(self) -> str:
        """Its name in responses."""
        return self.selected.id

    @property
    def names(self) -> tuple[str, ...]:
        """All of its names that are listed."""
        return self.selected.names

    async def select(self, name: str | None) -> Service:
        """This server for a request's model. None is the first one.

        Raises ApiError 404 for an unknown name if the server is strict about them; otherwise it means the first model.
        MODEL:NAME of a model with adapters is 404 in any case if it has no adapter of that name.
        """
        found = self.find(name)
        request_log.note_model(found.id)
        if isinstance(found.model, RemoteModel):
            await found.model.read_tokenizer()
        return self.having(found)

    def find(self, name: str | None) -> NamedModel:
        """The model of a name, as select() chooses it."""
        named = None if name is None else self._named(name)
        if named is None and name is not None and self.strict_model:
            known = ", ".join(repr(each.id) for each in self.models[:10])
            raise ApiError(404, f"the model {name!r} is not here: use {known}", param="model", code="model_not_found")
        return named or self.models[0]

    def known(self, name: str) -> NamedModel:
        """The model of a name. Raises ApiError 404 for an unknown name, strict or not."""
        named = self._named(name)
        if named is None:
            raise ApiError(404, f"there is no model {name!r:.200} here", param="model", code="model_not_found")
        return named

    def _named(self, name: str) -> NamedModel | None:
        """The model or the adapter of a name; None if there is none. Raises ApiError 404 for an unknown adapter of a
        model that has others: without it, the answer is not the one that was asked for."""
        found = next((each for each in self.models if each.has_name(name)), None)
        base, _, adapter = name.removesuffix(":latest").rpartition(":")
        if found is not None or not base:
            return found
        owner = next((each for each in self.models if each.adapter is None and each.has_name(base)), None)
        adapters = {each.adapter: each for each in self.models if owner and each.base == owner.id}
        if not adapters or adapter in adapters:
            return adapters.get(adapter)
        known = ", ".join(map(repr, list(adapters)[:10]))
        raise ApiError(
            404, f"{base:.200} has no adapter {adapter!r:.200}: use {known}", param="model", code="model_not_found"
        )

    def answers_to(self, name: str) -> bool:
        """Whether a request for a name selects the model that is selected now."""
        try:
            return self.find(name) is self.selected
        except ApiError:
            return False

    def having(self, model: NamedModel) -> Service:
        """This server with another model selected. All else is shared."""
        view = copy.copy(self)
        view._selected = model
        return view

    def each_model(self) -> list[Service]:
        """This server once for each model."""
        return [self.having(model) for model in self.models]

    def stream(self, prompt: Any, **options: Any) -> Events:
        """stream() of the selected model, with its adapter."""
        return self.model.stream(prompt, **options, **self._adapter)

    def stream_raw(self, ids: Any, **options: Any) -> Events:
        """stream_raw() of the selected model, with its adapter."""
        return self.model.stream_raw(ids, **options, **self._adapter)

    @property
    def _adapter(self) -> dict[str, Any]:
        return {} if self.selected.adapter is None else {"adapter": self.selected.adapter}

    async def start(self, *replies: Callable[[], Events]) -> EventQueue:
        """Load the selected model if necessary, submit one reply per callable, and return the queue of their events.
        Pass it to finish() in the end.

        The callables run on a worker thread, since rendering and tokenizing a long conversation takes time. If the
        model's process ends before it has the replies, they are submitted to a new one.
        """
        for attempt in range(MAX_ATTEMPTS):
            held = await self._acquire()
            process = None if held is None else held.process
            try:
                queue = EventQueue(await start_replies(replies))
            except BaseException as error:
                self._release(held)
                if not isinstance(error, ModelUnavailable) or attempt + 1 == MAX_ATTEMPTS:
                    raise
                if self.pool is not None and process is not None:
                    self.pool.lost(process)
                continue
            self.open_queues.add(queue)
            if held is not None:
                self.leases[queue] = held
            return queue
        raise AssertionError("the last attempt returns or raises")

    def finish(self, queue: EventQueue) -> None:
        """Forget a request and cancel its replies that still run."""
        self.open_queues.discard(queue)
        queue.close()
        self._release(self.leases.pop(queue, None))

    async def load(self) -> None:
        """Load the selected model, if it is not loaded. Raises ModelUnavailable and Busy."""
        if self.pool is not None and isinstance(self.model, RemoteModel):
            await self.pool.load(self.model)

    async def unload(self) -> None:
        """Unload the selected model. Raises ApiError if it has no process of its own, Busy if it is in use for long."""
        if self.pool is None or not isinstance(self.model, RemoteModel):
            message = f"{self.model_id} stays loaded: start the server with --idle-unload, or with several --model"
            raise ApiError(400, message, code="unsupported")
        await self.pool.unload(self.model)

    async def _acquire(self) -> RemoteModel | None:
        """Load the selected model and keep it loaded. Returns what to release; None if it has no process of its own."""
        if self.pool is None or not isinstance(self.model, RemoteModel):
            return None
        await self.pool.acquire(self.model)
        return self.model

    def _release(self, held: RemoteModel | None) -> None:
        if self.pool is not None and held is not None:
            self.pool.release(held)

    def render_metrics(self) -> bytes:
        """The current metrics in the text format of Prometheus."""
        models = [named.model for named in self.models if named.adapter is None]
        statuses = [status for model in models if (status := _status(model)) is not None]
        self.metrics.up.set(len(statuses) > 0)
        self.metrics.running.set(sum(status.running for status in statuses))
        self.metrics.waiting.set(sum(status.waiting for status in statuses))
        self.metrics.prefix_cache_bytes.set(sum(status.prefix_bytes for status in statuses))
        return self.metrics.render()


def _status(model: ServedModel) -> Status | None:
    """The model's load; None if its engine has failed or was closed."""
    try:
        return model.status
    except GptOssError:
        return None


def _get_service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(_get_service)]
