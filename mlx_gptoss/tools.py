"""Python functions as tools: what the model is told of them, and a turn in which its calls are carried out.

A tool's arguments are enforced by its schema (harmony/guide.py), so a function gets the types that its hints promise.
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

ROUNDS = 8  # replies with calls in one turn; the reply after them cannot call
_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    function: Function
    call: Callable[..., Any]

    @staticmethod
    def of(call: Callable[..., Any]) -> Tool:
        """A plain function with a type hint for each parameter: str, int, float, bool, None, list, dict with str keys,
        Literal, unions of these, or Any. Annotated[hint, "..."] describes a parameter; the docstring, the function.

        Raises InvalidRequest for any other.
        """
        name = call.__name__
        if inspect.iscoroutinefunction(call):
            raise InvalidRequest(f"the tool {name} is async; make it a plain function")
        try:
            hints = typing.get_type_hints(call, include_extras=True)
        except Exception as error:  # hints are any code
            raise InvalidRequest(f"the type hints of the tool {name} cannot be read: {error!r}") from error
        properties, required = {}, []
        for parameter in inspect.signature(call).parameters.values():
            where = f"the parameter {parameter.name!r} of the tool {name}"
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise InvalidRequest(f"{where} has no name to be given by; make it an ordinary one")
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
    """What a call returned, as the text that the model is given."""

    call: ToolCall
    text: str


def load_tools(path: str | Path) -> tuple[Tool, ...]:
    """Run a Python file, and take the public functions that it defines as tools.

    Raises InvalidRequest if it cannot be run, defines none, or one of them is no tool.
    """
    file = Path(path)
    spec = importlib.util.spec_from_file_location(f"tools_in_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InvalidRequest(f"{path} is no Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is any code
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
    model: Model, conversation: Conversation, tools: Sequence[Tool], *, rounds: int = ROUNDS, **options: Any
) -> Iterator[Event | ToolResult]:
    """The assistant's next turn, calls carried out: the events of each reply, a ToolResult after each call, the model's
    next reply, and so on to one without a call. After `rounds` replies with calls the next may not call.

    Only the last reply's Finished comes, with the messages of the whole turn, results included. What a function raises
    is its result. options: those of Model.stream but for what a Conversation brings.
    """
    byname = {tool.function.name: tool for tool in tools}
    if len(byname) < len(tools):
        raise InvalidRequest("two tools have the same name: give each function its own")
    conversation = replace(conversation, functions=(*conversation.functions, *(tool.function for tool in tools)))
    said: tuple[Message, ...] = ()
    for left in range(rounds, -1, -1):
        calls: list[ToolCall] = []
        for event in model.stream(conversation, tool_choice="auto" if left else "none", **options):
            if isinstance(event, Finished):
                conversation, said = with_reply(conversation, event.messages), said + event.messages
                if not calls or not left:
                    yield replace(event, messages=said)
                    return
            else:
                calls += [event] if isinstance(event, ToolCall) else []
                yield event
        for call in calls:
            result = ToolResult(call, _carried_out(call, byname))
            yield result
            conversation = conversation.with_result(call.name, result.text)
            said += conversation.messages[-1:]


def _carried_out(call: ToolCall, tools: Mapping[str, Tool]) -> str:
    """The result as text: a string as it is, all else as JSON."""
    if call.name not in tools:
        return f"error: there is no tool {call.name}"
    try:
        value = tools[call.name].call(**json.loads(call.arguments))
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except Exception as error:  # a tool is any code; the model is told, and may try again
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
        f"{where} is hinted {hint!r}; use str, int, float, bool, None, list, dict[str, ...], Literal or a union of them"
    )
