"""A turn in which the model's calls of Python functions are carried out: answer(), and aanswer() for coroutines."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat.reply import Event, Finished, ToolCall
from .chat.stream import Prompt, as_conversation
from .chat.tool import Tool, as_tool
from .errors import InvalidRequest
from .harmony.messages import Conversation, Message

if TYPE_CHECKING:
    from .model import Model

__all__ = ["Tool", "ToolResult", "aanswer", "answer", "load_tools"]

MAX_ROUNDS = 8  # replies with calls in one turn; the reply after them cannot call
MAX_PARALLEL = 16  # calls of one reply that run at once


@dataclass(frozen=True)
class ToolResult:
    """The result of a call, as the text that the model is given."""

    call: ToolCall
    text: str


def load_tools(path: str | Path) -> tuple[Tool, ...]:
    """Run a Python file and return the public functions that it defines as tools.

    Raises InvalidRequest if the file cannot be run, defines no public function, or one of them cannot be a tool.
    """
    file = Path(path)
    spec = importlib.util.spec_from_file_location(f"tools_in_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InvalidRequest(f"{path} is not a Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is arbitrary code
        raise InvalidRequest(f"the tools in {path} cannot be loaded: {error!r}") from error
    functions = [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    if not functions:
        raise InvalidRequest(f"{path} defines no public function; give the model one to call")
    return tuple(Tool.of(function) for function in functions)


def answer(
    model: Model, prompt: Prompt, tools: Sequence[Callable[..., Any]], *, rounds: int = MAX_ROUNDS, **options: Any
) -> Iterator[Event | ToolResult]:
    """Generate the assistant's next turn and carry out its calls: yields the events of each reply and a ToolResult for
    each call, until a reply has no call. After `rounds` replies with calls, the next one may not call.

    prompt: as of Model.generate. tools: functions with type hints, or Tools. One call runs on this thread; several
        calls of a reply run at once, on threads of their own. An asynchronous function runs in an event loop of its
        own; aanswer() runs it in yours.
    options: those of Model.stream, except tool_choice.

    Only the last reply's Finished is yielded, with the messages of the whole turn, results included. An exception in a
    function becomes its result. Raises InvalidRequest if two tools have the same name.
    """
    turn, options = _begin(prompt, tools, rounds, options)
    while True:
        for event in model.stream(turn.conversation, tool_choice=turn.tool_choice, **options):
            if (shown := turn.read(event)) is not None:
                yield shown
        if turn.ended:
            return
        for result in _run_all(turn.calls, turn.tools):
            turn.add(result)
            yield result


async def aanswer(
    model: Model, prompt: Prompt, tools: Sequence[Callable[..., Any]], *, rounds: int = MAX_ROUNDS, **options: Any
) -> AsyncIterator[Event | ToolResult]:
    """answer() for `async for`: the event loop stays free. Asynchronous functions run in it, others on worker threads;
    the calls of one reply run at once.

    Cancelling the task ends the generation within one step, and cancels asynchronous functions. Raises as answer()
    does.
    """
    turn, options = await asyncio.to_thread(_begin, prompt, tools, rounds, options)
    while True:
        async with model.astream(turn.conversation, tool_choice=turn.tool_choice, **options) as events:
            async for event in events:
                if (shown := turn.read(event)) is not None:
                    yield shown
        if turn.ended:
            return
        tasks = [asyncio.ensure_future(_arun(call, turn.tools)) for call in turn.calls]
        try:
            for task in tasks:
                result = await task
                turn.add(result)
                yield result
        finally:  # of those that still run
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class _Turn:
    """A turn in progress. left: replies that may still call. calls: of the last reply. ended: no reply follows."""

    conversation: Conversation
    tools: Mapping[str, Tool]
    left: int
    calls: list[ToolCall] = field(default_factory=list)
    messages: tuple[Message, ...] = ()
    ended: bool = False

    @property
    def tool_choice(self) -> str:
        return "auto" if self.left else "none"

    def read(self, event: Event) -> Event | None:
        """Take in an event of a reply. Returns what the caller of answer() gets."""
        if not isinstance(event, Finished):
            self.calls += [event] if isinstance(event, ToolCall) else []
            return event
        self.conversation = self.conversation.append(*event.messages)
        self.messages += event.messages
        self.ended = not self.calls or not self.left
        return replace(event, messages=self.messages, conversation=self.conversation) if self.ended else None

    def add(self, result: ToolResult) -> None:
        """Take in the result of a call; after the last one the next reply begins."""
        self.conversation = self.conversation.with_result(result.call.name, result.text)
        self.messages += self.conversation.messages[-1:]
        self.calls = [call for call in self.calls if call is not result.call]
        self.left -= not self.calls


def _begin(
    prompt: Prompt, tools: Sequence[Callable[..., Any]], rounds: int, options: dict[str, Any]
) -> tuple[_Turn, dict[str, Any]]:
    """The turn before its first reply, and the options of its replies. Raises InvalidRequest."""
    if "tool_choice" in options:
        raise InvalidRequest("answer() chooses when the model may call; leave tool_choice out, or use generate()")
    if callable(tools):
        raise InvalidRequest("tools must be a list of functions: put it in brackets, [...]")
    made = [as_tool(tool) for tool in tools]
    by_name = {tool.function.name: tool for tool in made}
    if len(by_name) < len(made):
        raise InvalidRequest("two tools have the same name: give each function its own")
    options = dict(options)
    opening = {name: options.pop(name, None) for name in ("reasoning", "system")}
    conversation = as_conversation(prompt, **opening)
    others = (function for function in conversation.functions if function.name not in by_name)
    functions = (*others, *(tool.function for tool in made))
    return _Turn(replace(conversation, functions=functions), by_name, rounds), options


def _run_all(calls: Sequence[ToolCall], tools: Mapping[str, Tool]) -> Iterator[ToolResult]:
    """Run the calls, several at once, and yield their results in the order of the calls."""
    if len(calls) == 1:
        yield _run(calls[0], tools)
        return
    threads = ThreadPoolExecutor(min(len(calls), MAX_PARALLEL), "mlx-gptoss tool")
    try:
        for result in [threads.submit(copy_context().run, _run, call, tools) for call in calls]:
            yield result.result()
    finally:  # after Ctrl-C, do not wait for the others
        threads.shutdown(wait=False, cancel_futures=True)


def _run(call: ToolCall, tools: Mapping[str, Tool]) -> ToolResult:
    """Run a call on this thread. An exception of the tool, which is arbitrary code, is the result: the model sees it
    and may try again."""
    try:
        value = _invoke(call, tools)
        return ToolResult(call, _text(_finish(value) if inspect.isawaitable(value) else value))
    except Exception as error:
        return ToolResult(call, f"error: {type(error).__name__}: {error}")


async def _arun(call: ToolCall, tools: Mapping[str, Tool]) -> ToolResult:
    """As _run(), for the event loop."""
    try:
        if call.name in tools and inspect.iscoroutinefunction(tools[call.name].call):
            value = _invoke(call, tools)
        else:
            value = await asyncio.to_thread(_invoke, call, tools)
        return ToolResult(call, _text(await value if inspect.isawaitable(value) else value))
    except Exception as error:
        return ToolResult(call, f"error: {type(error).__name__}: {error}")


def _invoke(call: ToolCall, tools: Mapping[str, Tool]) -> Any:
    if call.name not in tools:
        return f"error: there is no tool {call.name}"
    return tools[call.name].call(**json.loads(call.arguments))


def _finish(value: Awaitable[Any]) -> Any:
    """Await a value in an event loop of its own: on another thread where this one runs a loop, as in a notebook."""

    async def wait() -> Any:
        return await value

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1, "mlx-gptoss tool") as thread:
        return thread.submit(copy_context().run, asyncio.run, wait()).result()


def _text(value: Any) -> str:
    """The result as text: a string unchanged, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON can hold in place of a value that it cannot."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)
