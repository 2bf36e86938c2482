"""Python functions as tools: their schemas, files of them, and turns in which calls are carried out."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest

import mlx_gptoss
from mlx_gptoss import (
    Conversation,
    Finished,
    Message,
    Sampling,
    Tool,
    ToolCall,
    ToolResult,
    aanswer,
    answer,
    load_tools,
)
from mlx_gptoss.api import NANO
from mlx_gptoss.chat.event_queue import AsyncEvents
from mlx_gptoss.chat.reply import Timings, Usage
from mlx_gptoss.chat.stream import as_conversation, with_reply
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.harmony.grammar import json_grammar
from mlx_gptoss.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)
WEATHER = '''
from typing import Annotated
import json

def get_weather(location: Annotated[str, "City name"]) -> dict:
    """Get the current weather."""
    return {"temperature": 18, "condition": "sunny"}

def _not_offered(): ...
'''


def every_hint(
    text: Annotated[str, "What to say."],
    count: int,
    ratio: float,
    flag: bool,
    size: Literal["s", "m"],
    level: Literal[1, 2, "x"],
    names: list[str],
    table: dict[str, list[int]],
    either: Union[int, str],  # noqa: UP007
    items: list,
    thing: dict,
    anything: Any,
    several: list[int] | str,
    maybe: Optional[str] = None,  # noqa: UP045
    *,
    times: int = 3,
) -> None:
    """Say it.

    Loudly."""


def test_the_schema_of_a_function() -> None:
    function = Tool.of(every_hint).function
    assert (function.name, function.description, function.strict) == ("every_hint", "Say it.\n\nLoudly.", True)
    schema = function.parameters
    assert schema is not None
    assert schema["properties"] == {
        "text": {"type": "string", "description": "What to say."},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "size": {"type": "string", "enum": ["s", "m"]},
        "level": {"enum": [1, 2, "x"]},
        "names": {"type": "array", "items": {"type": "string"}},
        "table": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}}},
        "either": {"type": ["integer", "string"]},
        "items": {"type": "array"},
        "thing": {"type": "object"},
        "anything": {},
        "several": {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]},
        "maybe": {"type": ["string", "null"]},
        "times": {"type": "integer", "default": 3},
    }
    assert schema["required"] == [name for name in schema["properties"] if name not in ("maybe", "times")]
    json_grammar(schema, Tokenizer.from_folder(NANO), "the schema")  # can be enforced


def no_hint(a): ...
def odd_hint(a: set[str]): ...
def odd_keys(a: dict[int, str]): ...
def unknown_hint(a: Nowhere): ...  # noqa: F821
def many(*a: str): ...


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (no_hint, "'a' of the tool no_hint has no type hint"),
        (odd_hint, r"type hint set\[str\]; use str"),
        (odd_keys, "type hint dict"),
        (unknown_hint, "cannot be read: NameError"),
        (many, "cannot be passed by name"),
        (str, "must be a function"),
        ("double", "must be a function, not 'double'"),
    ],
)
def test_functions_that_are_no_tools(function: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        Tool.of(function)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import json\nx = 1\ndef _f(): ...\nclass C: ...\n", "defines no public function"),
        ("1 / 0", "cannot be loaded: ZeroDivisionError"),
        ("def f(", "cannot be loaded: SyntaxError"),
        ("def f(a): ...", "has no type hint"),
    ],
)
def test_files_that_hold_no_tools(tmp_path: Path, code: str, complaint: str) -> None:
    (tmp_path / "tools.py").write_text(code)
    with pytest.raises(InvalidRequest, match=complaint):
        load_tools(tmp_path / "tools.py")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not a Python file"):
        load_tools(tmp_path)
    with pytest.raises(InvalidRequest, match="FileNotFoundError"):
        load_tools(tmp_path / "nothing.py")


def test_the_bundled_model_calls_and_answers_from_the_result(tmp_path: Path) -> None:
    (tmp_path / "weather.py").write_text(WEATHER)
    tools, asked = load_tools(tmp_path / "weather.py"), as_conversation("What is the weather in Paris?")
    assert [tool.function.name for tool in tools] == ["get_weather"]
    with mlx_gptoss.load(max_context=1024) as model:
        events = list(answer(model, asked, tools, sampling=GREEDY))
        call = next(event for event in events if isinstance(event, ToolCall))
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"location": "Paris"})
        result = ToolResult(call, '{"temperature": 18, "condition": "sunny"}')
        assert events.index(result) == events.index(call) + 1
        last = events[-1]
        assert isinstance(last, Finished) and last.finish_reason == "stop"
        assert [m.content for m in last.messages if m.channel == "final"] == ["It is 18 degrees and sunny in Paris."]
        assert [m.role for m in last.messages if m.recipient] == ["assistant", "tool"]
        again = with_reply(asked, last.messages).with_user("What is 12 + 30?")
        assert not any(m.channel == "analysis" for m in again.messages)
        *_, last = answer(model, again, tools, sampling=GREEDY)
        assert isinstance(last, Finished) and last.messages[-1].content == "12 + 30 = 42"


class Caller:
    """A model that calls `double` as long as it may. `asked`: what it was given each time."""

    def __init__(self, arguments: str = '{"n": 4}', name: str = "double") -> None:
        self.arguments, self.name = arguments, name
        self.asked: list[tuple[Conversation, str]] = []

    def stream(self, conversation: Conversation, *, tool_choice: str) -> Iterator[Any]:
        self.asked.append((conversation, tool_choice))
        final = Message("assistant", "done", "final")
        call = Message("assistant", self.arguments, "commentary", f"functions.{self.name}", "<|constrain|>json")
        if tool_choice == "auto":
            yield ToolCall("call_1", self.name, self.arguments)
        message = call if tool_choice == "auto" else final
        yield Finished("stop", Usage(1, 1), Timings(0, 0, 0), (), (message,))


def double(n: int) -> int:
    return n * 2


def test_rounds_are_bounded_and_the_last_reply_may_not_call() -> None:
    model = Caller()
    *events, last = answer(model, as_conversation("Hi"), [Tool.of(double)], rounds=3)  # type: ignore[arg-type]
    assert [choice for _, choice in model.asked] == ["auto", "auto", "auto", "none"]
    assert [event.text for event in events if isinstance(event, ToolResult)] == ["8"] * 3
    assert isinstance(last, Finished)
    assert [(m.role, m.content) for m in last.messages] == [*[("assistant", '{"n": 4}'), ("tool", "8")] * 3,
                                                            ("assistant", "done")]  # fmt: skip
    conversation, _ = model.asked[-1]
    assert conversation.messages[1:] == last.messages[:-1]
    assert conversation.messages[2].name == "functions.double"


def results(tool: Any, *caller: str) -> list[str]:
    events = answer(Caller(*caller), as_conversation("Hi"), [Tool.of(tool)], rounds=1)  # type: ignore[arg-type]
    return [event.text for event in events if isinstance(event, ToolResult)]


def test_errors_are_results() -> None:
    def fails(n: int) -> None:
        raise ValueError("n is too small")

    def prints(n: int) -> str:
        return "é"

    def gives_odd_things(n: int) -> dict[str, object]:
        return {"path": Path("a"), "é": None}

    fails.__name__ = prints.__name__ = gives_odd_things.__name__ = "double"
    assert results(fails) == ["error: ValueError: n is too small"]
    assert results(prints) == ["é"]
    assert results(gives_odd_things) == ['{"path": "a", "é": null}']
    assert results(double, "no JSON")[0].startswith("error: JSONDecodeError")
    assert results(double, '{"m": 1}')[0].startswith("error: TypeError")
    assert results(double, "{}", "other") == ["error: there is no tool other"]


def test_ctrl_c_within_a_tool_is_not_a_result() -> None:
    def interrupted(n: int) -> None:
        raise KeyboardInterrupt

    interrupted.__name__ = "double"
    with pytest.raises(KeyboardInterrupt):
        results(interrupted)


async def halve(n: int) -> int:
    await asyncio.sleep(0)
    return n // 2


async def fails_later(n: int) -> int:
    raise ValueError("too late")


class AsyncCaller(Caller):
    """The same for coroutines, with several calls in a reply."""

    def __init__(self, *calls: tuple[str, str]) -> None:
        super().__init__()
        self.calls = [ToolCall(f"call_{i}", name, arguments) for i, (name, arguments) in enumerate(calls)]

    def stream(self, conversation: Conversation, *, tool_choice: str) -> Iterator[Any]:
        self.asked.append((conversation, tool_choice))
        said = [Message("assistant", c.arguments, "commentary", f"functions.{c.name}") for c in self.calls]
        if len(self.asked) == 1:
            yield from self.calls
        else:
            said = [Message("assistant", "done", "final")]
        yield Finished("stop", Usage(1, 1), Timings(0, 0, 0), (), tuple(said))

    def astream(self, conversation: Conversation, *, tool_choice: str) -> AsyncEvents:
        events = self.stream(conversation, tool_choice=tool_choice)

        class Ready:
            async def __aenter__(self) -> AsyncIterator[Any]:
                async def each() -> AsyncIterator[Any]:
                    for event in events:
                        yield event

                return each()

            async def __aexit__(self, *error: object) -> None: ...

        return Ready()  # type: ignore[return-value]


async def all_of(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


@pytest.mark.parametrize("in_a_loop", [False, True], ids=["plain", "in a notebook"])
def test_answer_runs_asynchronous_functions(in_a_loop: bool) -> None:
    def run() -> list[str]:
        return [e.text for e in answer(caller, "Hi", [double, halve]) if isinstance(e, ToolResult)]  # type: ignore[arg-type]

    async def within() -> list[str]:
        return run()

    caller = AsyncCaller(("halve", '{"n": 4}'))
    assert (asyncio.run(within()) if in_a_loop else run()) == ["2"]


def test_calls_of_one_reply_run_at_once_and_keep_their_order() -> None:
    """Each waits for the other."""
    barrier = threading.Barrier(2)

    def wait(n: int) -> int:
        barrier.wait(60)
        return n

    calls = [("wait", '{"n": 1}'), ("wait", '{"n": 2}')]
    *events, last = answer(AsyncCaller(*calls), "Hi", [wait])  # type: ignore[arg-type]
    assert [event.text for event in events if isinstance(event, ToolResult)] == ["1", "2"]
    assert isinstance(last, Finished) and [m.role for m in last.messages[:4]] == ["assistant"] * 2 + ["tool"] * 2
    events = asyncio.run(all_of(aanswer(AsyncCaller(*calls), "Hi", [wait])))  # type: ignore[arg-type]
    assert [event.text for event in events if isinstance(event, ToolResult)] == ["1", "2"]


def test_aanswer_runs_functions_of_both_kinds_and_errors_are_results() -> None:
    calls = ("double", '{"n": 4}'), ("halve", '{"n": 4}'), ("fails_later", '{"n": 4}'), ("nothing", "{}")
    caller = AsyncCaller(*calls)
    events = asyncio.run(all_of(aanswer(caller, "Hi", [double, halve, fails_later])))  # type: ignore[arg-type]
    texts = [event.text for event in events if isinstance(event, ToolResult)]
    assert texts == ["8", "2", "error: ValueError: too late", "error: there is no tool nothing"]
    assert isinstance(events[-1], Finished) and events[-1].conversation.messages[-1].content == "done"
    assert [m.content for m in caller.asked[1][0].messages if m.role == "tool"] == texts


def test_cancelling_aanswer_cancels_what_it_runs() -> None:
    began, ended = asyncio.Event(), []

    async def endless(n: int) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(n)

    async def run() -> None:
        caller = AsyncCaller(("endless", '{"n": 1}'), ("endless", '{"n": 2}'))
        task = asyncio.create_task(all_of(aanswer(caller, "Hi", [endless])))  # type: ignore[arg-type]
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert sorted(ended) == [1, 2]


def test_results_of_dataclasses_and_pydantic_classes_are_json() -> None:
    pydantic = pytest.importorskip("pydantic")
    shape = pydantic.create_model("Shape", sides=(int, 3))
    caller = AsyncCaller(("double", '{"n": 4}'))

    def run(value: Any) -> str:
        def double(n: int) -> Any:
            return {"value": value}

        caller.asked.clear()
        (result,) = [e for e in answer(caller, "Hi", [double]) if isinstance(e, ToolResult)]  # type: ignore[arg-type]
        return result.text

    assert run(shape()) == '{"value": {"sides": 3}}'
    assert run(Usage(1, 2)) == '{"value": {"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 0}}'


def test_functions_are_given_to_generate_stream_and_the_loops() -> None:
    def get_weather(location: Annotated[str, "City name"]) -> dict[str, Any]:
        """Get the current weather."""
        return {"temperature": 18, "condition": "sunny"}

    question = "What is the weather in Paris?"
    with mlx_gptoss.load(max_context=1024) as model:
        (call,) = model.generate(question, tools=[get_weather], temperature=0).tool_calls
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"location": "Paris"})
        events = list(model.stream(question, tools=[Tool.of(get_weather)], temperature=0))
        assert [event.arguments for event in events if isinstance(event, ToolCall)] == [call.arguments]
        *_, last = answer(model, question, [get_weather], temperature=0)
        *_, alast = asyncio.run(all_of(aanswer(model, question, [get_weather], temperature=0)))
        assert isinstance(last, Finished) and isinstance(alast, Finished)
        assert last.conversation == alast.conversation
        assert last.conversation.messages[-1].content == "It is 18 degrees and sunny in Paris."
        *_, last = answer(model, last.conversation.append("What is 12 + 30?"), [get_weather], temperature=0)
        assert isinstance(last, Finished) and last.messages[-1].content == "12 + 30 = 42"
        assert [function.name for function in last.conversation.functions] == ["get_weather"]


def test_wrong_arguments_of_answer_name_the_remedy() -> None:
    for tools, options, message in [
        (double, {}, "brackets"),
        ([double], {"tool_choice": "auto"}, "leave tool_choice out"),
        (["double"], {}, "must be a function"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            next(answer(Caller(), "Hi", tools, **options))  # type: ignore[arg-type]


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="same name"):
        next(answer(Caller(), as_conversation("Hi"), [Tool.of(double)] * 2))  # type: ignore[arg-type]
