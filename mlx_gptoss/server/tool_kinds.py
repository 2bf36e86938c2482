"""Kinds of tools: functions are served; others, such as image_generation, are left out while functions remain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ApiError

Tools = Sequence[Mapping[str, Any]]


def split_tools(tools: Tools) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Return the functions of a request's tools, and the kinds of its other tools."""
    functions = [tool for tool in tools if tool.get("type", "function") == "function"]
    kinds = {str(tool.get("type")) for tool in tools if tool.get("type", "function") != "function"}
    return functions, sorted(kinds)


def check_tools(tools: Tools) -> list[Mapping[str, Any]]:
    """Return the functions of a request's tools.

    Raises ApiError if there are tools, but none is a function: the reply would not be what the client expects.
    """
    functions, kinds = split_tools(tools)
    if kinds and not functions:
        message = f"tools has only {', '.join(kinds)[:200]}, which is not served: send functions, or no tools"
        raise ApiError(400, message, param="tools", code="unsupported_tool")
    return functions
