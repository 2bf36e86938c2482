"""Ollama's messages in the form of OpenAI's: roles in any case, images beside the content, results without an id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import invalid_field


def to_openai(messages: Sequence[Any]) -> list[Any]:
    """Convert the messages for harmony.openai.from_chat, which checks them. Raises ApiError for images.

    A result names its call by tool_call_id or tool_name. Without either it answers the calls of the last assistant
    message in their order.
    """
    converted = []
    calls: list[Any] = []  # names of the calls that have no result yet
    for index, message in enumerate(messages):
        if isinstance(message, Mapping):
            message = _convert(message, index)
            if message.get("role") == "assistant":
                calls = _called_functions(message)
            elif message.get("role") == "tool":
                _name_result(message, calls)
        converted.append(message)
    return converted


def _convert(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A copy with the role in lower case, a text for missing content, and without an empty list of images."""
    if message.get("images"):
        raise invalid_field(f"messages[{index}].images", "cannot be read: the model reads only text")
    fields = {name: value for name, value in message.items() if value is not None and name != "images"}
    if isinstance(fields.get("role"), str):
        fields["role"] = fields["role"].lower()
    if fields.get("role") != "assistant":
        fields.setdefault("content", "")
    return fields


def _called_functions(message: Mapping[str, Any]) -> list[Any]:
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
    return [function.get("name") for function in functions if isinstance(function, Mapping)]


def _name_result(message: dict[str, Any], calls: list[Any]) -> None:
    """Give a result the name of its function, and take that call off the list."""
    name = message.pop("tool_name", None) or message.get("name")
    if not name and not message.get("tool_call_id") and calls:
        name = calls[0]
    if name:
        message["name"] = name
    if name in calls:
        calls.remove(name)
    elif calls:
        calls.pop(0)  # named by its id
