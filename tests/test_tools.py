"""Python functions as tools: their schemas, files of them, and turns in which calls are carried out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest

import mlx_gptoss
from mlx_gptoss import Conversation, Finished, Message, Sampling, Tool, ToolCall, ToolResult, answer, load_tools
from mlx_gptoss.api import NANO
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
async def later(a: str): ...


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (no_hint, "'a' of the tool no_hint has no type hint"),
        (odd_hint, r"type hint set\[str\]; use str"),
        (odd_keys, "type hint dict"),
        (unknown_hint, "cannot be read: NameError"),
        (many, "cannot be passed by name"),
        (later, "is async"),
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


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="same name"):
        next(answer(Caller(), as_conversation("Hi"), [Tool.of(double)] * 2))  # type: ignore[arg-type]
