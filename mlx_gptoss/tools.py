"""Python functions as tools: their schemas for the model, and a turn in which its calls are carried out.

The schema of a tool's arguments is enforced (harmony/guide.py), so a function gets the types of its hints.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat.reply import Event, Finished, ToolCall
from .chat.stream import with_reply
from .errors import InvalidRequest
from .harmony.messages import Conversation, Function, Message

if TYPE_CHECKING:
    from .model import Model

MAX_ROUNDS = 8  # replies with calls in one turn; the reply after them cannot call
_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


@dataclass(frozen=True)
class Tool:
    """A Python function that the model may call. function: what the model is told. call: what is run."""

    function: Function
    call: Callable[..., Any]

    @staticmethod
    def of(call: Callable[..., Any]) -> Tool:
        """A tool made from a plain function. Its docstring is the description.

        Each parameter needs a type hint: str, int, float, bool, None, list, dict with str keys, Literal, a union of
        these, or Any. Annotated[hint, "..."] adds a description. Raises InvalidRequest for anything else.
        """
        name = call.__name__
        if inspect.iscoroutinefunction(call):
            raise InvalidRequest(f"the tool {name} is async; make it a plain function")
        try:
            hints = typing.get_type_hints(call, include_extras=True)
        except Exception as error:  # hints are arbitrary code
            raise InvalidRequest(f"the type hints of the tool {name} cannot be read: {error!r}") from error
        properties, required = {}, []
        for parameter in inspect.signature(call).parameters.values():
            where = f"the parameter {parameter.name!r} of the tool {name}"
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise InvalidRequest(f"{where} cannot be passed by name; make it an ordinary parameter")
            if parameter.name not in hints:
                raise InvalidRequest(f"{where} has no type hint; give it one, such as str")
            properties[parameter.name] = _schema(hints[parameter.name], where)
            if parameter.default is parameter.empty:
                required.append(parameter.name)
            elif isinstance(parameter.default, (str, int, float, bool)):
                properties[parameter.name]["default"] = parameter.default
        schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        return Tool(Function(name, inspect.getdoc(call) or "", schema, strict=True), call)


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
    model: Model, conversation: Conversation, tools: Sequence[Tool], *, rounds: int = MAX_ROUNDS, **options: Any
) -> Iterator[Event | ToolResult]:
    """Generate the assistant's next turn and carry out its calls: yields the events of each reply and a ToolResult for
    each call, until a reply has no call. After `rounds` replies with calls, the next one may not call.

    Only the last reply's Finished is yielded, with the messages of the whole turn, results included. An exception in a
    function becomes its result. options: those of Model.stream, except reasoning, system and tools, which the
    conversation has. Raises InvalidRequest if two tools have the same name.
    """
    by_name = {tool.function.name: tool for tool in tools}
    if len(by_name) < len(tools):
        raise InvalidRequest("two tools have the same name: give each function its own")
    conversation = replace(conversation, functions=(*conversation.functions, *(tool.function for tool in tools)))
    messages: tuple[Message, ...] = ()
    for left in range(rounds, -1, -1):
        calls: list[ToolCall] = []
        for event in model.stream(conversation, tool_choice="auto" if left else "none", **options):
            if isinstance(event, Finished):
                conversation, messages = with_reply(conversation, event.messages), messages + event.messages
                if not calls or not left:
                    yield replace(event, messages=messages)
                    return
            else:
                calls += [event] if isinstance(event, ToolCall) else []
                yield event
        for call in calls:
            result = ToolResult(call, _run(call, by_name))
            yield result
            conversation = conversation.with_result(call.name, result.text)
            messages += conversation.messages[-1:]


def _run(call: ToolCall, tools: Mapping[str, Tool]) -> str:
    """The result as text: a string unchanged, anything else as JSON."""
    if call.name not in tools:
        return f"error: there is no tool {call.name}"
    try:
        value = tools[call.name].call(**json.loads(call.arguments))
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except Exception as error:  # a tool is arbitrary code; the model sees the error and may try again
        return f"error: {type(error).__name__}: {error}"


def _schema(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type hint."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    if origin is typing.Annotated:
        texts = [note for note in arguments[1:] if isinstance(note, str)]
        return _schema(arguments[0], where) | ({"description": texts[0]} if texts else {})
    if origin is typing.Literal:
        kind = {"type": "string"} if all(isinstance(value, str) for value in arguments) else {}
        return kind | {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        if all(argument in _NAMES for argument in arguments):
            return {"type": [_NAMES[argument] for argument in arguments]}
        return {"anyOf": [_schema(argument, where) for argument in arguments]}
    if list in (hint, origin):
        return {"type": "array"} | ({"items": _schema(arguments[0], where)} if arguments else {})
    if dict in (hint, origin) and (not arguments or arguments[0] is str):
        return {"type": "object"} | ({"additionalProperties": _schema(arguments[1], where)} if arguments else {})
    raise InvalidRequest(
        f"{where} has the type hint {hint!r}; use str, int, float, bool, None, list, dict[str, ...], Literal or a "
        "union of them"
    )
