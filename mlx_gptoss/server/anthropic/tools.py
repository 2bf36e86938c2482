"""Anthropic's `tools` and `tool_choice`. Tools without a schema (web_search, bash, ...) are not served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ...errors import InvalidRequest
from ...harmony.checks import boolean, string, tool_name
from ...harmony.messages import Function
from ...harmony.openai_tools import functions_from_tools
from ..fields import Name, RequestModel
from ..tool_kinds import check_tools, split_tools

_FIELDS = {"type", "name", "description", "input_schema", "strict"}


class ToolChoice(RequestModel):
    """Whether the model calls a tool. name: which one, for the type "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @property
    def value(self) -> str | dict[str, Any]:
        """The tool choice as model.stream takes it."""
        if self.type == "tool":
            return {"type": "function", "name": self.name}
        return "required" if self.type == "any" else self.type


def functions_of(tools: Sequence[Mapping[str, Any]]) -> tuple[Function, ...]:
    """The functions in a request's `tools`: those with an input_schema.

    Raises InvalidRequest for malformed ones, and ApiError if there are only tools of other kinds.
    """
    kept = check_tools([_typed(tool) for tool in tools])
    return functions_from_tools([_function(tool, f"tools[{index}]") for index, tool in enumerate(kept)])


def ignored_tools(tools: Sequence[Mapping[str, Any]]) -> set[str]:
    """The paths of what has no effect: tools of other kinds, and fields of functions."""
    functions, kinds = split_tools([_typed(tool) for tool in tools])
    fields = {field for tool in functions for field, value in tool.items() if value not in (None, False, [], {})}
    cache = {"cache_control"} & fields
    return {f"tools[].{name}" for name in (*kinds, *(fields - _FIELDS - cache))} | cache


def _typed(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tool with the type that tool_kinds.py gives a function."""
    return {**tool, "type": "function"} if tool.get("type") in (None, "custom") else tool


def _function(tool: Mapping[str, Any], where: str) -> Function:
    schema = tool.get("input_schema")
    if schema is not None and not isinstance(schema, Mapping):
        raise InvalidRequest(f"{where}.input_schema must be a JSON schema of type object, not {schema!r}")
    description = "" if tool.get("description") is None else string(tool, "description", where)
    return Function(tool_name(tool.get("name"), f"{where}.name"), description, schema, boolean(tool, "strict", where))
