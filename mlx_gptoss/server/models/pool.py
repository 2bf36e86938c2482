"""When the processes of models start and end: on request, when memory is short, after a time without requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from ...errors import Busy, ModelUnavailable
from .process import LogOptions, ModelProcess
from .remote import RemoteModel

WAIT_FOR_MEMORY_S = 120.0  # how long a request waits for the end of those that keep its model's memory
RETRY_S = 5.0  # for so long, a model that could not be loaded is not tried again

_log = logging.getLogger(__name__)


class ModelPool:
    """The models of one server. All methods are for its event loop.

    One model loads at a time. Before it does, those that have been without requests for longest are unloaded until the
    memory plans of all fit the memory that was there when none was loaded.

    idle_unload_s: a model is unloaded after this many seconds without a request; None keeps it. log: the level and the
    format of the processes' logs.
    """

    def __init__(
        self,
        models: Sequence[RemoteModel],
        *,
        idle_unload_s: float | None = None,
        log: LogOptions = ("warning", "text"),
    ) -> None:
        self.models: tuple[RemoteModel, ...] = tuple(models)
        self._log = log
        self.idle_unload_s = idle_unload_s
        self._loading = asyncio.Lock()
        self._tasks: dict[RemoteModel, asyncio.Task[None]] = {}  # loads in progress
        self._leaving: set[RemoteModel] = set()  # models that are to be unloaded when their requests have ended
        self._freed = asyncio.Event()  # set when a request has ended
        self._available_bytes: int | None = None  # without any model
        self._failed_at: dict[RemoteModel, float] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Load the first model, and begin to unload idle ones."""
        self._loop = asyncio.get_running_loop()
        self._load_task(self.models[0])
        if self.idle_unload_s is not None:
            self._watcher = asyncio.create_task(self._unload_idle(self.idle_unload_s))

    async def close(self) -> None:
        """End all processes. Replies that still run fail."""
        tasks = [task for task in (self._watcher, *self._tasks.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(model) for model in self.models))

    async def acquire(self, model: RemoteModel) -> None:
        """Load the model, if it is not loaded, and keep it until release().

        Raises as load() does.
        """
        model.waiting += 1
        try:
            while model.state != "loaded" or model in self._leaving:
                await self.load(model)
            model.in_use += 1
        finally:
            model.waiting -= 1

    def release(self, model: RemoteModel) -> None:
        """End a use of the model."""
        model.in_use -= 1
        model.used_at = time.monotonic()
        self._freed.set()

    async def load(self, model: RemoteModel) -> None:
        """Load the model, if it is not loaded. A caller that is cancelled does not cancel it for the others.

        Raises ModelUnavailable if it cannot be loaded, Busy if its memory is not free in time.
        """
        try:
            if model.state == "failed" and time.monotonic() - self._failed_at[model] < RETRY_S:
                assert model.load_error is not None
                raise model.load_error
            await asyncio.shield(self._load_task(model))
        except (Busy, ModelUnavailable):
            raise
        except Exception as error:
            raise ModelUnavailable(f"{model.name} could not be loaded: {error}") from error

    async def unload(self, model: RemoteModel) -> None:
        """Unload the model when its requests have ended. Requests that come meanwhile load it again.

        Raises Busy if they take too long.
        """
        async with self._loading:
            await self._drain(model, time.monotonic() + WAIT_FOR_MEMORY_S)

    def _load_task(self, model: RemoteModel) -> asyncio.Task[None]:
        task = self._tasks.get(model)
        if task is None:
            task = self._tasks[model] = asyncio.create_task(self._load(model))
            task.add_done_callback(lambda ended: self._load_ended(model, ended))
        return task

    def _load_ended(self, model: RemoteModel, task: asyncio.Task[None]) -> None:
        self._tasks.pop(model, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s was not loaded: %s", model.name, error)

    async def _load(self, model: RemoteModel) -> None:
        async with self._loading:
            if model.state == "loaded":
                return
            model.state, process = "loading", None
            try:
                process = await asyncio.to_thread(ModelProcess, model.name, self._process_exited, self._log)
                model.process = process
                await self._load_in(process, model)
            except BaseException as error:
                model.process, model.state = None, "unloaded"
                if isinstance(error, Exception) and not isinstance(error, Busy):
                    model.state, model.load_error, self._failed_at[model] = "failed", error, time.monotonic()
                if process is not None:
                    await asyncio.shield(asyncio.to_thread(process.close))
                raise

    async def _load_in(self, process: ModelProcess, model: RemoteModel) -> None:
        alone = not self._loaded()
        plan = await asyncio.to_thread(process.plan, model.planned(None if alone else self._available_bytes))
        if alone:
            self._available_bytes = plan.available_bytes
        assert self._available_bytes is not None
        if plan.fits:  # otherwise loading says why not
            await self._make_room(model, plan.needed_bytes)
        model.attach(process, await asyncio.to_thread(process.load, self._available_bytes))

    def _loaded(self) -> list[RemoteModel]:
        return [model for model in self.models if model.state == "loaded"]

    async def _make_room(self, model: RemoteModel, needed_bytes: int) -> None:
        """Unload models, those without requests first, until this one fits."""
        assert self._available_bytes is not None
        deadline = time.monotonic() + WAIT_FOR_MEMORY_S
        while loaded := self._loaded():
            taken = sum(other.plan.needed_bytes for other in loaded if other.plan is not None)
            if taken + needed_bytes <= self._available_bytes:
                return
            await self._drain(min(loaded, key=lambda other: (other.in_use > 0, other.used_at)), deadline, model)

    async def _drain(self, model: RemoteModel, deadline: float, wanted: RemoteModel | None = None) -> None:
        """Unload a model when its requests have ended; new ones wait. Raises Busy at the deadline."""
        self._leaving.add(model)
        try:
            while model.in_use:
                self._freed.clear()
                try:
                    await asyncio.wait_for(self._freed.wait(), deadline - time.monotonic())
                except asyncio.TimeoutError:
                    what = f"{wanted.name} cannot be loaded" if wanted else f"{model.name} cannot be unloaded"
                    raise Busy(
                        f"{what} while {model.name} answers requests; try again later", retry_after_s=10
                    ) from None
            await self._end(model)
        finally:
            self._leaving.discard(model)

    async def _end(self, model: RemoteModel) -> None:
        process, model.process = model.process, None
        model.state = "unloaded"
        if process is not None:
            await asyncio.to_thread(process.close)

    async def _unload_idle(self, seconds: float) -> None:
        """Body of the task that unloads models without requests."""
        while True:
            await asyncio.sleep(min(1.0, seconds / 4))
            now = time.monotonic()
            for model in self._loaded():
                if not model.in_use and now - model.used_at >= seconds and not self._loading.locked():
                    async with self._loading:
                        if not model.in_use:
                            await self._end(model)

    def lost(self, process: ModelProcess) -> None:
        """A process does not take requests any more: the next one starts another, unless that has happened."""
        for model in self.models:
            if model.process is process:
                model.process, model.state = None, "unloaded"
                model.crashes += 1
                _log.error("the process of %s ended by itself; the next request starts it again", model.name)

    def _process_exited(self, process: ModelProcess) -> None:
        """Called on another thread when a process has ended by itself."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.lost, process)
