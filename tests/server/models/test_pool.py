"""Which models are unloaded for which, with processes that only pretend to load."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import ClassVar

import pytest

from mlx_gptoss.errors import Busy, DoesNotFit, ModelUnavailable
from mlx_gptoss.server.models import pool as pools
from mlx_gptoss.server.models.pool import ModelPool

AVAILABLE = 100


class PretendModel:
    """The attributes that the pool uses of a RemoteModel."""

    def __init__(self, name, size):
        self.name, self.size = name, size
        self.state, self.process, self.plan, self.load_error = "unloaded", None, None, None
        self.waiting = self.in_use = self.crashes = self.loads = 0
        self.used_at = 0.0

    def planned(self, available_bytes):
        return self, available_bytes

    def attach(self, process, loaded):
        self.process, self.plan, self.state = process, loaded, "loaded"
        self.loads += 1


class PretendProcess:
    """load() waits for `gate`, if the test sets one, and raises `error`."""

    log: ClassVar[list[str]] = []
    gate: threading.Event | None = None
    error: Exception | None = None

    def __init__(self, name, on_exit, log):
        self.name, self.on_exit = name, on_exit

    def plan(self, request):
        model, available = request
        fits = model.size <= AVAILABLE
        self.memory = SimpleNamespace(needed_bytes=model.size, available_bytes=available or AVAILABLE, fits=fits)
        return self.memory

    def load(self, available_bytes):
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        if not self.memory.fits:
            raise DoesNotFit("too large")
        self.log.append(f"+{self.name}")
        return self.memory

    def close(self):
        self.log.append(f"-{self.name}")


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(pools, "ModelProcess", PretendProcess)
    monkeypatch.setattr(PretendProcess, "log", [])
    monkeypatch.setattr(PretendProcess, "gate", None)
    monkeypatch.setattr(PretendProcess, "error", None)
    return lambda: list(PretendProcess.log)


def made(*sizes):
    models = [PretendModel(name, size) for name, size in zip("abc", sizes, strict=False)]
    return ModelPool(models), models


async def use(pool, model):
    await pool.acquire(model)
    pool.release(model)


def test_the_model_unused_for_longest_makes_room(log):
    async def run():
        pool, (a, b, c) = made(40, 40, 40)
        for model in (a, b, a, c):
            await use(pool, model)
        assert log() == ["+a", "+b", "-b", "+c"] and [m.state for m in (a, b, c)] == ["loaded", "unloaded", "loaded"]

    asyncio.run(run())


def test_as_many_as_necessary_are_unloaded_and_no_more(log):
    async def run():
        pool, (a, b, c) = made(30, 30, 70)
        for model in (a, b, c):
            await use(pool, model)
        assert log() == ["+a", "+b", "-a", "+c"]

    asyncio.run(run())


def test_a_model_in_use_is_unloaded_only_when_its_requests_have_ended(log):
    async def run():
        pool, (a, b) = made(80, 80)
        await pool.acquire(a)
        waiting = asyncio.create_task(pool.acquire(b))
        await asyncio.sleep(0.05)
        late = asyncio.create_task(pool.acquire(a))  # comes after b, so it waits until b had its turn
        await asyncio.sleep(0.05)
        assert log() == ["+a"] and not waiting.done() and not late.done()
        pool.release(a)
        await waiting
        assert log()[:3] == ["+a", "-a", "+b"]
        pool.release(b)
        await late
        assert log()[-2:] == ["-b", "+a"]

    asyncio.run(run())


def test_an_idle_model_goes_before_one_in_use(log):
    async def run():
        pool, (a, b, c) = made(40, 40, 40)
        await pool.acquire(a)
        await use(pool, b)
        await use(pool, c)
        assert log() == ["+a", "+b", "-b", "+c"]

    asyncio.run(run())


def test_waiting_for_memory_ends(log, monkeypatch):
    monkeypatch.setattr(pools, "WAIT_FOR_MEMORY_S", 0.05)

    async def run():
        pool, (a, b) = made(80, 80)
        await pool.acquire(a)
        with pytest.raises(Busy, match="b cannot be loaded while a answers requests"):
            await pool.acquire(b)
        assert (a.state, b.state, b.waiting) == ("loaded", "unloaded", 0)
        await use(pool, a)  # it was not unloaded, and takes requests again
        pool.release(a)
        await use(pool, b)
        assert log()[-2:] == ["-a", "+b"]

    asyncio.run(run())


def test_a_model_too_large_unloads_nothing(log):
    async def run():
        pool, (a, b) = made(80, 101)
        await use(pool, a)
        with pytest.raises(ModelUnavailable, match="b could not be loaded: too large"):
            await pool.acquire(b)
        assert a.state == "loaded" and b.state == "failed"

    asyncio.run(run())


def test_requests_share_one_load_and_one_that_leaves_does_not_end_it(log, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(PretendProcess, "gate", gate)

    async def run():
        pool, (a,) = made(10)
        tasks = [asyncio.create_task(pool.acquire(a)) for _ in range(20)]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        await asyncio.sleep(0.02)
        assert a.state == "loading" and a.waiting == 19
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert log() == ["+a"] and a.in_use == 19 and a.waiting == 0

    asyncio.run(run())


def test_a_failed_load_is_remembered_for_a_while(log, monkeypatch):
    monkeypatch.setattr(PretendProcess, "error", OSError("the disk is gone"))

    async def run():
        pool, (a,) = made(10)
        for _ in range(3):
            with pytest.raises(ModelUnavailable, match="the disk is gone"):
                await pool.acquire(a)
        assert log() == ["-a"]  # one attempt
        monkeypatch.setattr(PretendProcess, "error", None)
        monkeypatch.setattr(pools, "RETRY_S", 0.0)
        await use(pool, a)
        assert a.state == "loaded"

    asyncio.run(run())


def test_a_crash_is_counted_and_the_next_request_loads_again(log):
    async def run():
        pool, (a,) = made(10)
        pool.start()
        await use(pool, a)
        await asyncio.to_thread(a.process.on_exit, a.process)
        await asyncio.sleep(0.02)
        assert (a.state, a.crashes, a.process) == ("unloaded", 1, None)
        await use(pool, a)
        assert a.state == "loaded" and a.loads == 2
        await pool.close()
        assert log()[-1] == "-a"

    asyncio.run(run())


def test_idle_models_are_unloaded_but_not_those_in_use(log):
    async def run():
        pool, (a, b) = made(10, 10)
        pool.idle_unload_s = 0.1
        pool.start()
        await use(pool, a)
        await pool.acquire(b)
        while a.state == "loaded":
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        assert b.state == "loaded"
        pool.release(b)
        while b.state == "loaded":
            await asyncio.sleep(0.02)
        await pool.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_closing_ends_a_load_in_progress(log, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(PretendProcess, "gate", gate)

    async def run():
        pool, (a,) = made(10)
        pool.start()
        while a.state != "loading":
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(pool.acquire(a))
        await asyncio.sleep(0.02)
        gate.set()
        await pool.close()
        await asyncio.gather(waiting, return_exceptions=True)
        assert a.process is None and "-a" in log()

    asyncio.run(run())
