"""The API for coroutines: the same replies, an event loop that stays free, generations that end with their reader."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import mlx_gptoss
import mlx_gptoss.model
from mlx_gptoss import Finished, TextDelta
from mlx_gptoss.engine import Finished as EngineFinished
from mlx_gptoss.errors import GptOssError, InvalidRequest

ENDLESS = {"temperature": 1.0, "seed": 1, "max_tokens": 6000}
WAIT_S = 60


@pytest.fixture(scope="module")
def model(request):
    with mlx_gptoss.load(request.getfixturevalue("mini") / "mxfp4", max_context=8192, slots=3) as loaded:
        stops = dict.fromkeys(loaded._stop_ids, -100.0)  # so that it never ends by itself
        ENDLESS["logit_bias"] = stops
        yield loaded


@pytest.fixture
def handles(model, monkeypatch):
    """The requests submitted to the engine. They do not keep the caller's iterator alive."""
    kept, submit = [], model._engine.submit

    def recorded(request):
        stream = submit(request)
        kept.append(stream._handle)
        return stream

    monkeypatch.setattr(model._engine, "submit", recorded)
    return kept


def end_of(handle):
    """How a request ended: waits for the last item of its queue."""
    while not isinstance(item := handle.queue.get(timeout=WAIT_S), EngineFinished):
        pass
    return item


def same(event):
    """An event without what differs between two runs."""
    return event if not isinstance(event, Finished) else (event.finish_reason, event.tokens, event.messages)


def test_coroutines_give_what_the_other_methods_give(model):
    options = {"temperature": 0, "max_tokens": 50}

    async def run():
        reply = await model.agenerate("Hi", **options)
        events = [event async for event in model.astream("Hi", **options)]
        done = await model.acomplete((1, 2, 3), **options)
        raw = [event async for event in model.astream_raw((1, 2, 3), **options)]
        return reply, events, done, raw

    reply, events, done, raw = asyncio.run(run())
    wanted = model.generate("Hi", **options)
    assert (reply.ids, reply.text, reply.conversation) == (wanted.ids, wanted.text, wanted.conversation)
    assert [same(event) for event in events] == [same(event) for event in model.stream("Hi", **options)]
    assert events[-1].conversation == reply.conversation
    assert done.ids == model.complete((1, 2, 3), **options).ids
    assert [same(event) for event in raw] == [same(event) for event in model.stream_raw((1, 2, 3), **options)]


def test_rendering_does_not_hold_the_event_loop(model, monkeypatch):
    """Rendering waits for what only the event loop does."""
    rendering, go_on, render = threading.Event(), threading.Event(), mlx_gptoss.model.stream_chat

    def slow(*arguments, **named):
        rendering.set()
        assert go_on.wait(WAIT_S)
        return render(*arguments, **named)

    async def run():
        reply = asyncio.create_task(model.agenerate("Hi", max_tokens=5, temperature=0))
        while not rendering.is_set():
            await asyncio.sleep(0.001)
        go_on.set()
        return await reply

    monkeypatch.setattr(mlx_gptoss.model, "stream_chat", slow)
    assert asyncio.run(run()).usage.completion_tokens == 5


def test_waiting_for_tokens_does_not_hold_the_event_loop(model, handles):
    """The engine stands still until the event loop lets it go on."""
    go_on = threading.Event()

    async def run():
        held = threading.Thread(target=model._engine.call, args=(lambda runner: go_on.wait(WAIT_S),))
        held.start()
        reply = asyncio.create_task(model.agenerate("Hi", max_tokens=5, temperature=0))
        while not handles:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        assert not reply.done()
        go_on.set()
        return await reply, held.join()

    assert asyncio.run(run())[0].usage.completion_tokens == 5


def test_many_at_once(model):
    wanted = [model.complete((7, i), temperature=0, max_tokens=12).ids for i in range(30)]

    async def run():
        return await asyncio.gather(*(model.acomplete((7, i), temperature=0, max_tokens=12) for i in range(30)))

    assert [done.ids for done in asyncio.run(run())] == wanted


def test_event_loops_in_several_threads_share_a_model(model):
    wanted = model.generate("Hi", temperature=0, max_tokens=20).ids

    def in_thread(_):
        return asyncio.run(model.agenerate("Hi", temperature=0, max_tokens=20)).ids

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(in_thread, range(8))) == [wanted] * 8


async def _cancel_reply(model):
    task = asyncio.create_task(model.agenerate("Hi", **ENDLESS))
    while not model.status.running:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _break(model):
    async for _ in model.astream_raw((1, 2), **ENDLESS):
        break
    gc.collect()
    await asyncio.sleep(0)


async def _fail_inside(model):
    with pytest.raises(ZeroDivisionError):
        async for _ in model.astream_raw((1, 2), **ENDLESS):
            raise ZeroDivisionError


async def _close(model):
    events = model.astream_raw((1, 2), **ENDLESS)
    await anext(events)
    await events.aclose()
    assert [event async for event in events] == []


async def _leave_the_block(model):
    async with model.astream_raw((1, 2), **ENDLESS) as events:
        await anext(events)


async def _time_out(model):
    events = model.astream_raw((1, 2), **ENDLESS)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(_read_all(events), 0.2)


async def _close_from_another_task(model):
    events = model.astream_raw((1, 2), **ENDLESS)
    reader = asyncio.create_task(_read_all(events))
    while not model.status.running:
        await asyncio.sleep(0.001)
    await events.aclose()
    await reader  # it ends as if the reply had


async def _read_all(events):
    return [event async for event in events]


@pytest.mark.parametrize(
    "leave",
    [_cancel_reply, _break, _fail_inside, _close, _leave_the_block, _time_out, _close_from_another_task],
    ids=lambda leave: leave.__name__.strip("_"),
)
def test_leaving_ends_the_generation(model, handles, leave):
    asyncio.run(leave(model))
    (handle,) = handles
    assert end_of(handle).reason == "cancelled"


def test_the_end_of_the_event_loop_ends_the_generation(model, handles):
    loop = asyncio.new_event_loop()
    events = model.astream_raw((1, 2), **ENDLESS)
    loop.run_until_complete(anext(events))
    loop.close()
    (handle,) = handles
    assert end_of(handle).reason == "cancelled"
    assert events is not None  # it was not dropped before


def test_a_reply_cancelled_while_it_is_rendered_is_never_generated(model, handles, monkeypatch):
    rendering, go_on, render = threading.Event(), threading.Event(), mlx_gptoss.model.stream_chat
    finished = threading.Event()

    def slow(*arguments, **named):
        rendering.set()
        assert go_on.wait(WAIT_S)
        try:
            return render(*arguments, **named)
        finally:
            finished.set()

    async def run():
        task = asyncio.create_task(model.agenerate("Hi", **ENDLESS))
        while not rendering.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await asyncio.to_thread(finished.wait, WAIT_S)

    monkeypatch.setattr(mlx_gptoss.model, "stream_chat", slow)
    asyncio.run(run())
    assert all(end_of(handle).reason == "cancelled" for handle in handles)


def test_errors_come_where_they_are_awaited(model):
    async def run():
        with pytest.raises(InvalidRequest, match="empty"):
            await model.agenerate("")
        events = model.astream("word " * 9000)
        with pytest.raises(InvalidRequest, match="8192"):
            await anext(events)
        assert [event async for event in events] == []
        with pytest.raises(InvalidRequest, match="temperature"):
            model.astream("Hi", temperature="hot")

    asyncio.run(run())


def test_two_readers_of_one_reply_are_refused(model):
    async def run():
        async with model.astream_raw((1, 2), **ENDLESS) as events:
            first = asyncio.create_task(anext(events))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="two tasks"):
                await anext(events)
            assert isinstance(await first, TextDelta)

    asyncio.run(run())


def test_a_model_that_is_closed_meanwhile(mini):
    model = mlx_gptoss.load(mini / "mxfp4", max_context=8192)

    async def run():
        events = model.astream_raw((1, 2), **ENDLESS)
        await anext(events)
        await asyncio.to_thread(model.close)
        with pytest.raises(GptOssError, match="closed"):
            await _read_all(events)

    asyncio.run(run())


def test_a_dropped_queue_does_not_keep_its_reply(model, handles):
    """Nothing but the engine refers to a reply whose queue nobody has: no cycle keeps it until the next collection."""

    async def run():
        gc.disable()
        try:
            await anext(model.astream_raw((1, 2), **ENDLESS))
            end = await asyncio.to_thread(partial(end_of, handles[0]))
            assert end.reason == "cancelled"
        finally:
            gc.enable()

    asyncio.run(run())


def test_a_client_of_a_fastapi_app_that_leaves_ends_its_generation(model, handles):
    fastapi, uvicorn, httpx = (pytest.importorskip(name) for name in ("fastapi", "uvicorn", "httpx"))
    app = fastapi.FastAPI()

    @app.get("/endless")
    async def endless():
        events = model.astream_raw((1, 2), **ENDLESS)
        text = (event.text async for event in events if isinstance(event, TextDelta))
        return fastapi.responses.StreamingResponse(text)

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # the client may come before the server does
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/endless"
            with httpx.stream("GET", url, timeout=WAIT_S) as response:
                assert next(response.iter_raw())
            assert end_of(handles[0]).reason == "cancelled"
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
