"""Converts `tools`, `tool_choice` and `response_format` of OpenAI's API to dataclasses.

Error messages begin with the path of the field; the server takes the `param` of its error responses from it.
Unknown fields have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidRequest
from .checks import boolean, items, string, tool_name
from .messages import Function, ResponseFormat, ToolChoice


def functions_from_tools(tools: Sequence[Mapping[str, Any] | Function]) -> tuple[Function, ...]:
    """Return the functions in a request's `tools`.

    tools: Function objects, or {"type": "function", "function": {"name", "description", "parameters", "strict"}}, also
        without the inner dict. A tool that is given twice counts once.

    Raises InvalidRequest for other kinds of tools, and for two different functions of the same name.
    """
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidRequest("tools must be a list of functions")
    functions: dict[str, Function] = {}
    for index, tool in enumerate(tools):
        function = _function(tool, f"tools[{index}]")
        if functions.setdefault(function.name, function) != function:
            raise InvalidRequest(f"two tools are named {function.name!r}: give each function its own name")
    return tuple(functions.values())


def _function(tool: Any, where: str) -> Function:
    if isinstance(tool, Function):
        tool_name(tool.name, f"{where}.name")
        return tool
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise InvalidRequest(f'{where} must be {{"type": "function", "function": {{...}}}}: only functions are offered')
    if "function" in tool:
        tool, where = tool["function"], f"{where}.function"
        if not isinstance(tool, Mapping):
            raise InvalidRequest(f'{where} must be {{"name": ..., "parameters": ...}}, not {tool!r}')
    parameters = tool.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidRequest(f"{where}.parameters must be a JSON schema of type object, not {parameters!r}")
    description = "" if tool.get("description") is None else string(tool, "description", where)
    name = tool_name(tool.get("name"), f"{where}.name")
    return Function(name, description, parameters, boolean(tool, "strict", where))


def tool_choice_of(value: Any, functions: Sequence[Function]) -> ToolChoice:
    """Return the ToolChoice of a request's `tool_choice`.

    value: "auto", "none", "required", the name of one of `functions`, or {"type": "function", "function": {"name"}},
        also without the inner dict; or {"type": "allowed_tools", "mode": "auto" or "required", "tools": [...]}, also
        with an inner dict. A function named "auto", "none" or "required" needs one of the last two forms.

    Raises InvalidRequest for anything else. A tool of another kind among the allowed ones is skipped.
    """
    if value in ("auto", "none", "required"):
        return ToolChoice(value)
    if isinstance(value, str):
        return ToolChoice("required", (_declared(value, functions),))
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind in ("function", "custom"):
        return ToolChoice("required", (_declared(_choice_name(value), functions),))
    if kind == "allowed_tools":
        allowed = value.get("allowed_tools", value)
        mode = allowed.get("mode", "auto") if isinstance(allowed, Mapping) else None
        if mode in ("auto", "required"):
            tools = [tool for tool in items(allowed, "tools", "tool_choice") if isinstance(tool, Mapping)]
            named = [_choice_name(tool) for tool in tools if tool.get("type", "function") in ("function", "custom")]
            names = tuple(_declared(name, functions) for name in named)
            return ToolChoice(mode, names) if names else ToolChoice("none")
    raise InvalidRequest(
        f'tool_choice must be "auto", "none", "required" or {{"type": "function", "function": {{"name": ...}}}}, '
        f"not {value!r}"
    )


def _choice_name(choice: Mapping[str, Any]) -> Any:
    """The function's name in one entry of a tool choice: next to its type, or in an inner dict."""
    inner = choice.get(choice.get("type", "function"), choice)
    return inner.get("name") if isinstance(inner, Mapping) else None


def _declared(name: Any, functions: Sequence[Function]) -> str:
    if name not in [function.name for function in functions]:
        raise InvalidRequest(f"tool_choice names {name!r}, which is not one of the tools")
    assert isinstance(name, str)
    return name


def response_format_of(value: Any) -> ResponseFormat | None:
    """Return the ResponseFormat of a request's `response_format`, or None for {"type": "text"}.

    value: {"type": "text"}; {"type": "json_object"}, with a "schema" as llama.cpp has it or without; or
        {"type": "json_schema", "json_schema": {"name", "description", "schema", "strict"}}, also without the inner
        dict and without a name. The schema is enforced even if `strict` is false.

    Raises InvalidRequest for anything else. Whether the schema can be enforced is checked later, in guide_for.
    """
    where = "response_format"
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in ("text", "json_object", "json_schema"):
        kinds = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {...}}'
        raise InvalidRequest(f"{where} must be {kinds}, not {value!r}")
    if kind == "text":
        return None
    if value.get("json_schema") is not None:
        value, where = value["json_schema"], f"{where}.json_schema"
        if not isinstance(value, Mapping):
            raise InvalidRequest(f'{where} must be {{"name": ..., "schema": ...}}, not {value!r}')
    schema = value.get("schema")
    if schema is None and kind == "json_object":
        return ResponseFormat({"type": "object"})
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{where}.schema must be a JSON schema, not {schema!r}")
    description = "" if value.get("description") is None else string(value, "description", where)
    boolean(value, "strict", where)
    name = None if value.get("name") is None else tool_name(value["name"], f"{where}.name")
    return ResponseFormat(schema, name, description)
