"""Which JSON schemas can be enforced token by token: those of which nothing would be ignored, and none too large.

The dialect is draft 2020-12, of which the keywords below are enforced by llguidance (docs/json_schema.md there). It
passes over keywords that it does not know, and so would a typing error; here they are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, NoReturn
from urllib.parse import unquote

from ..errors import InvalidRequest
from .patterns import translated

MOST_CHARACTERS = 1 << 17  # of the schema as JSON
MOST_SCHEMAS = 2000  # schemas within it, each counted once
MOST_PATTERNS = 50  # in one patternProperties: each is held against each
MOST_CHOICES = 100  # of one oneOf, likewise
LARGEST_NUMBER = 2**53  # bounds are compared as float64
LARGEST_MULTIPLE = 20_000  # time and memory of multipleOf grow with the least common multiple, faster than it
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
    *("contentEncoding", "contentMediaType", "$comment"),
    *("$defs", "definitions"),  # what stands there counts where something refers to it
}
_ENDLESS = re.compile(r"[*+]|,\}")  # a pattern without these, and with both anchors, matches few strings
_HEAD = ("$schema", "$id")  # mean nothing within one document whose references are all local
_INSTEAD = {
    "nullable": 'write {"type": ["string", "null"]} or the like',
    "additionalItems": "use prefixItems and items",
    "if": "use anyOf",
    "not": "say what is allowed instead",
}


def enforceable(schema: Any, where: str) -> str:
    """The schema as JSON text for llguidance. `where` is what errors call it.

    `oneOf` becomes `anyOf`, and is refused where two of its schemas may hold at once.
    Raises InvalidRequest for what cannot be enforced; it names the keyword and its place.
    """
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{where} must be a JSON schema, an object, not {schema!r}")
    try:
        text = json.dumps(schema, allow_nan=False)
        if len(text) > MOST_CHARACTERS:
            raise InvalidRequest(
                f"{where} has {len(text)} characters, more than {MOST_CHARACTERS}; give a smaller schema"
            )
        copy = json.loads(text)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{where} must be plain JSON: {error}") from error
    except RecursionError:
        raise InvalidRequest(f"{where} is nested too deeply; give a flatter schema") from None
    for keyword in _HEAD:
        copy.pop(keyword, None)
    _Check(copy, where).all()
    return json.dumps(copy)


class _Check:
    """A walk over a schema and what it refers to. Renames `oneOf` and rewrites patterns."""

    def __init__(self, root: dict[str, Any], where: str) -> None:
        self._root = root
        self._where = where
        self._todo: list[tuple[str, Any]] = [("#", root)]  # no recursion: references may form long chains
        self._seen: dict[int, tuple[str, dict[str, Any]]] = {}
        self._multiple = 1

    def all(self) -> None:
        while self._todo:
            place, schema = self._todo.pop()
            if isinstance(schema, bool) or id(schema) in self._seen:
                continue
            if not isinstance(schema, dict):
                self._refuse(place, f"{schema!r} is no schema: use an object, true or false")
            self._seen[id(schema)] = (place, schema)
            if len(self._seen) > MOST_SCHEMAS:
                raise InvalidRequest(f"{self._where} holds more than {MOST_SCHEMAS} schemas; give a smaller one")
            for keyword, value in list(schema.items()):
                check = _CHECKS.get(keyword)
                if check is not None:
                    check(self, f"{place}/{keyword}", value, schema)
                elif keyword not in _ANNOTATIONS:
                    hint = _INSTEAD.get(keyword, "leave it out")
                    self._refuse(place, f"the keyword {keyword!r} cannot be enforced; {hint}")
        self._check_circles()

    def _refuse(self, place: str, why: str) -> NoReturn:
        raise InvalidRequest(f"{self._where} cannot be enforced: at {place[:200]}: {why}")

    # What each keyword may hold. `value` stands at `place` in `schema`.

    def nothing(self, place: str, value: Any, schema: Any) -> None:
        """llguidance checks it."""

    def one(self, place: str, value: Any, schema: Any) -> None:
        if isinstance(value, list):
            self._refuse(place, "a list of schemas is prefixItems in draft 2020-12")
        self._todo.append((place, value))

    def several(self, place: str, value: Any, schema: Any) -> None:
        if not isinstance(value, list) or not value:
            self._refuse(place, "it must be a non-empty list of schemas")
        self._todo += [(f"{place}/{number}", item) for number, item in enumerate(value)]

    def one_of(self, place: str, value: Any, schema: Any) -> None:
        """One of them is any of them where no two can hold at once. llguidance's own proof of that has holes."""
        self.several(place, value, schema)
        if len(value) > MOST_CHOICES:
            self._refuse(place, f"more than {MOST_CHOICES} schemas; use anyOf")
        shapes = [_Shape(self._resolved(item)) for item in value]
        if "anyOf" in schema or not all(a.excludes(b) for a, b in combinations(shapes, 2)):
            self._refuse(place, "two of its schemas may hold at once, or anyOf stands beside it; use anyOf alone")
        renamed = [("anyOf" if key == "oneOf" else key, item) for key, item in schema.items()]
        schema.clear()  # the order of keywords is that of the properties in the text
        schema.update(renamed)

    def named(self, place: str, value: Any, schema: Any) -> None:
        if not isinstance(value, dict):
            self._refuse(place, "it must be an object of schemas")
        self._todo += [(f"{place}/{name}", item) for name, item in value.items()]

    def patterns(self, place: str, value: Any, schema: Any) -> None:
        self.named(place, value, schema)
        if len(value) > MOST_PATTERNS:
            self._refuse(place, f"more than {MOST_PATTERNS} patterns; give fewer")
        named = schema.get("properties") or schema.get("required")
        few = [pattern for pattern in value if {"^", "$"} <= set(pattern) and not _ENDLESS.search(pattern)]
        if named and few:  # what is left of few names may be none, which llguidance finds out too late
            self._refuse(place, f"{few[0]!r} may match no name but those in properties; name its properties there, too")
        schema["patternProperties"] = {self._pattern(place, key): item for key, item in value.items()}

    def pattern(self, place: str, value: Any, schema: Any) -> None:
        schema["pattern"] = self._pattern(place, value)

    def _pattern(self, place: str, value: Any) -> str:
        rewritten = translated(value) if isinstance(value, str) else None
        if rewritten is None:
            self._refuse(place, f"{str(value)[:100]!r} is no pattern, or one with look-around, \\b or the like")
        return rewritten

    def reference(self, place: str, value: Any, schema: Any) -> None:
        self._todo.append((str(value), self._target(place, value)))

    def type_names(self, place: str, value: Any, schema: Any) -> None:
        for name in value if isinstance(value, list) else [value]:
            if name not in TYPES:
                self._refuse(place, f"there is no type {name!r}: use {', '.join(TYPES)}")

    def number(self, place: str, value: Any, schema: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > LARGEST_NUMBER:
            self._refuse(place, f"{value!r} is not a number from -2^53 to 2^53, which alone are exact")

    def multiple(self, place: str, value: Any, schema: Any) -> None:
        self.number(place, value, schema)
        digits = f"{value:.12f}".rstrip("0")
        self._multiple = math.lcm(self._multiple, int(digits.replace(".", "")) or 1)
        if value <= 0 or float(digits) != value or self._multiple > LARGEST_MULTIPLE:
            self._refuse(place, f"multipleOf {value!r} is too fine, or too large beside others in the schema")

    def format_name(self, place: str, value: Any, schema: Any) -> None:
        if value not in FORMATS:
            self._refuse(place, f"the format {value!r} is not known: use {', '.join(FORMATS)}, or pattern")

    def least_properties(self, place: str, value: Any, schema: Any) -> None:
        """Nothing keeps a name that is not in `properties` from coming twice, and it counts once."""
        if not isinstance(value, int) or value > max(1, len(set(_words(schema.get("required"))))):
            self._refuse(place, "more than 1, and more than are required, cannot be counted; require them by name")

    def only_false(self, place: str, value: Any, schema: Any) -> None:
        if value is not False:
            self._refuse(place, "it cannot be enforced; leave it out")

    # References.

    def _target(self, place: str, reference: Any) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            self._refuse(place, f"{reference!r} does not point into this schema: references must begin with #/")
        target: Any = self._root
        for part in reference.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            inside = isinstance(target, dict) and key in target
            if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            elif inside:
                target = target[key]
            else:
                self._refuse(place, f"{reference!r} points to nothing")
        return target

    def _check_circles(self) -> None:
        """Refuse references that lead back to where they stand with no array or object in between."""
        entered: set[int] = set()  # on the way to the schema at hand
        left: set[int] = set()
        for place, start in self._seen.values():
            todo = [start]
            while todo:
                one = todo[-1]
                if id(one) in entered or id(one) in left:
                    todo.pop()
                    entered.discard(id(one))
                    left.add(id(one))
                    continue
                entered.add(id(one))
                for item in self._at_once(one):
                    if id(item) in entered:
                        self._refuse(place, "a reference leads back to itself with no array or object in between")
                    todo.append(item)

    def _at_once(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """The schemas that speak of the same value."""
        items = [item for key in ("allOf", "anyOf", "oneOf") for item in _list(schema.get(key))]
        items += [self._target("#", schema["$ref"])] if "$ref" in schema else []
        return [item for item in items if isinstance(item, dict)]

    def _resolved(self, schema: Any) -> Any:
        """The schema that a lone reference leads to, through at most a few others."""
        for _ in range(8):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = self._target("#", schema["$ref"])
        return schema


class _Shape:
    """What tells a schema from others: its types, and the strings that it can be, or that a required property can."""

    def __init__(self, schema: Any) -> None:
        schema = schema if isinstance(schema, dict) else {}
        values = _values(schema)
        names = schema.get("type", [_TYPE_OF[type(value)] for value in values] or TYPES)
        self._types = set(_words([names] if isinstance(names, str) else names)) or set(TYPES)
        if "integer" in self._types:
            self._types.add("number")
        self._tags = {"": _all_strings(values)}
        properties = schema.get("properties")
        if self._types == {"object"} and isinstance(properties, dict):
            for name in _words(schema.get("required")):
                self._tags[f".{name}"] = _all_strings(_values(properties.get(name)))

    def excludes(self, other: _Shape) -> bool:
        if not self._types & other._types:
            return True
        shared = [(strings, other._tags.get(name)) for name, strings in self._tags.items()]
        return any(ours and theirs and not ours & theirs for ours, theirs in shared)


_TYPE_OF: Mapping[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def _values(schema: Any) -> list[Any]:
    """The values of an enum or const; none if there may be others."""
    if not isinstance(schema, dict):
        return []
    if "const" in schema:
        return [schema["const"]]
    return _list(schema.get("enum"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _words(value: Any) -> list[str]:
    return [word for word in _list(value) if isinstance(word, str)]


def _all_strings(values: list[Any]) -> set[str]:
    """The values if all are strings."""
    return set(values) if all(isinstance(value, str) for value in values) else set()


_CHECKS: Mapping[str, Callable[[_Check, str, Any, Any], None]] = {
    "$ref": _Check.reference,
    "additionalProperties": _Check.one,
    "allOf": _Check.several,
    "anyOf": _Check.several,
    "const": _Check.nothing,
    "enum": _Check.nothing,
    "exclusiveMaximum": _Check.number,
    "exclusiveMinimum": _Check.number,
    "format": _Check.format_name,
    "items": _Check.one,
    "maxItems": _Check.nothing,
    "maxLength": _Check.nothing,
    "maxProperties": _Check.nothing,
    "maximum": _Check.number,
    "minItems": _Check.nothing,
    "minLength": _Check.nothing,
    "minProperties": _Check.least_properties,
    "minimum": _Check.number,
    "multipleOf": _Check.multiple,
    "oneOf": _Check.one_of,
    "pattern": _Check.pattern,
    "patternProperties": _Check.patterns,
    "prefixItems": _Check.several,
    "properties": _Check.named,
    "required": _Check.nothing,
    "type": _Check.type_names,
    "uniqueItems": _Check.only_false,
}
