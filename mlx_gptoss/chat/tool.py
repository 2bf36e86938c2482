"""Python functions as tools: what the model is told of them.

The schema of a tool's arguments is enforced (harmony/guide.py), so a function gets the types of its hints.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidRequest
from ..harmony.messages import Function
from ..options.check import shown

_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


@dataclass(frozen=True)
class Tool:
    """A Python function that the model may call. function: what the model is told. call: what is run; it may be
    asynchronous."""

    function: Function
    call: Callable[..., Any]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function."""
        return self.call(*arguments, **named)

    @staticmethod
    def of(call: Callable[..., Any]) -> Tool:
        """A tool made from a function, `def` or `async def`. Its docstring is the description.

        Each parameter needs a type hint: str, int, float, bool, None, list, dict with str keys, Literal, a union of
        these, or Any. Annotated[hint, "..."] adds a description. Raises InvalidRequest for anything else.
        """
        name = getattr(call, "__name__", None)
        if not callable(call) or name is None or isinstance(call, type):
            raise InvalidRequest(f"a tool must be a function, not {shown(call)}; write one with def")
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


AnyTool = Callable[..., Any] | Mapping[str, Any]  # a Tool can be called, too


def functions_of(tools: Sequence[AnyTool]) -> list[Function | Mapping[str, Any]]:
    """What the model is told of the tools: functions, Tools, and dicts in OpenAI's form, which stay as they are."""
    return [tool if isinstance(tool, Mapping) else as_tool(tool).function for tool in tools]


def as_tool(tool: Callable[..., Any]) -> Tool:
    """A function as a Tool; a Tool as it is. Raises InvalidRequest for anything else."""
    return tool if isinstance(tool, Tool) else Tool.of(tool)


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
