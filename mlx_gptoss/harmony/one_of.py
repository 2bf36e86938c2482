"""Whether two schemas may match the same value: what `oneOf` needs to be the same as `anyOf`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


class Discriminator:
    """What distinguishes a schema from others: its types, and the strings that it or a required property may be."""

    def __init__(self, schema: Any) -> None:
        schema = schema if isinstance(schema, dict) else {}
        values = _fixed_values(schema)
        names = schema.get("type", [_JSON_TYPES[type(value)] for value in values] or TYPES)
        self._types = set(strings_of([names] if isinstance(names, str) else names)) or set(TYPES)
        if "integer" in self._types:
            self._types.add("number")
        self._tags = {"": _string_values(values)}  # "" is the value itself, ".name" a required property
        properties = schema.get("properties")
        if self._types == {"object"} and isinstance(properties, dict):
            for name in strings_of(schema.get("required")):
                self._tags[f".{name}"] = _string_values(_fixed_values(properties.get(name)))

    def is_disjoint(self, other: Discriminator) -> bool:
        """Whether no value is valid under both schemas, as far as types and strings can prove it."""
        if not self._types & other._types:
            return True
        shared = [(strings, other._tags.get(name)) for name, strings in self._tags.items()]
        return any(ours and theirs and not ours & theirs for ours, theirs in shared)


_JSON_TYPES: Mapping[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def _fixed_values(schema: Any) -> list[Any]:
    """Return the values that `const` or `enum` allows; an empty list if there is neither."""
    if not isinstance(schema, dict):
        return []
    if "const" in schema:
        return [schema["const"]]
    return as_list(schema.get("enum"))


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def strings_of(value: Any) -> list[str]:
    return [word for word in as_list(value) if isinstance(word, str)]


def _string_values(values: list[Any]) -> set[str]:
    """Return the values as a set if all of them are strings; otherwise an empty set."""
    return set(values) if all(isinstance(value, str) for value in values) else set()
