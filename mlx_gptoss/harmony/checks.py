"""Checks of single values in a request. Each returns the value.

`where` is the path of the object that has the field, such as "messages[0]"; error messages begin with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InvalidRequest

MAX_TOOL_NAME_CHARACTERS = 1024


def string(fields: Mapping[str, Any], field: str, where: str) -> str:
    """The string in this field. Raises InvalidRequest for any other type."""
    value = fields.get(field)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{field} must be a string, not {value!r}")
    return value


def boolean(fields: Mapping[str, Any], field: str, where: str) -> bool:
    """The boolean in this field, False if it is missing or null. Raises InvalidRequest for any other type."""
    value = fields.get(field)
    if value not in (None, False, True):
        raise InvalidRequest(f"{where}.{field} must be true or false, not {value!r}")
    return bool(value)


def items(fields: Mapping[str, Any], field: str, where: str) -> list[Any]:
    """The list in this field, empty if it is missing or null. Raises InvalidRequest for any other type."""
    value = fields.get(field)
    if value is not None and not isinstance(value, list):
        raise InvalidRequest(f"{where}.{field} must be a list, not {value!r}")
    return value or []


def tool_name(value: Any, where: str) -> str:
    """A function's name. Any text will do (names.py). Raises InvalidRequest for an empty or overlong one."""
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TOOL_NAME_CHARACTERS:
        raise InvalidRequest(
            f"{where} must be a name of 1 to {MAX_TOOL_NAME_CHARACTERS} characters, not {value!r:.200}"
        )
    return value
