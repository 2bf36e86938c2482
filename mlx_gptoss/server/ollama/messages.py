"""Ollama's messages in the form of OpenAI's: roles in any case, images aside, content that may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import invalid_field


def to_openai(messages: Sequence[Any]) -> list[Any]:
    """Convert the messages for harmony.openai.from_chat, which checks them. Raises ApiError for images."""
    return [
        _convert(message, index) if isinstance(message, Mapping) else message for index, message in enumerate(messages)
    ]


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
