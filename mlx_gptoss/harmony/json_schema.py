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
from .patterns import translate_pattern

MAX_CHARACTERS = 1 << 17  # of the schema as JSON
MAX_SUBSCHEMAS = 2000  # schemas within it, each counted once
MAX_PATTERNS = 50  # in one patternProperties: each is held against each
MAX_ONE_OF = 100  # of one oneOf, likewise
MAX_NUMBER = 2**53  # bounds are compared as float64
MAX_MULTIPLE = 20_000  # time and memory of multipleOf grow with the least common multiple, faster than it
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
    *("contentEncoding", "contentMediaType", "$comment"),
    *("$defs", "definitions"),  # what stands there counts where something refers to it
}
_UNBOUNDED_REPEAT = re.compile(r"[*+]|,\}")  # a pattern without these, and with both anchors, matches few strings
_IGNORED_AT_ROOT = ("$schema", "$id")  # mean nothing within one document whose references are all local
_HINTS = {
    "nullable": 'write {"type": ["string", "null"]} or the like',
    "additionalItems": "use prefixItems and items",
    "if": "use anyOf",
    "not": "say what is allowed instead",
}


def normalize_schema(schema: Any, where: str) -> str:
    """The schema as JSON text for llguidance. `where` is what errors call it.

    `oneOf` becomes `anyOf`, and is refused where two of its schemas may hold at once.
    Raises InvalidRequest for what cannot be enforced; it names the keyword and its path.
    """
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{where} must be a JSON schema, an object, not {schema!r}")
    try:
        text = json.dumps(schema, allow_nan=False)
        if len(text) > MAX_CHARACTERS:
            raise InvalidRequest(
                f"{where} has {len(text)} characters, more than {MAX_CHARACTERS}; give a smaller schema"
            )
        copy = json.loads(text)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{where} must be plain JSON: {error}") from error
    except RecursionError:
        raise InvalidRequest(f"{where} is nested too deeply; give a flatter schema") from None
    for keyword in _IGNORED_AT_ROOT:
        copy.pop(keyword, None)
    _Checker(copy, where).run()
    return json.dumps(copy)


class _Checker:
    """A walk over a schema and what it refers to. Renames `oneOf` and rewrites patterns."""

    def __init__(self, root: dict[str, Any], where: str) -> None:
        self._root = root
        self._where = where
        self._todo: list[tuple[str, Any]] = [("#", root)]  # no recursion: references may form long chains
        self._seen: dict[int, tuple[str, dict[str, Any]]] = {}
        self._common_multiple = 1

    def run(self) -> None:
        while self._todo:
            path, schema = self._todo.pop()
            if isinstance(schema, bool) or id(schema) in self._seen:
                continue
            if not isinstance(schema, dict):
                self._refuse(path, f"{schema!r} is no schema: use an object, true or false")
            self._seen[id(schema)] = (path, schema)
            if len(self._seen) > MAX_SUBSCHEMAS:
                raise InvalidRequest(f"{self._where} holds more than {MAX_SUBSCHEMAS} schemas; give a smaller one")
            for keyword, value in list(schema.items()):
                check = _CHECKS.get(keyword)
                if check is not None:
                    check(self, f"{path}/{keyword}", value, schema)
                elif keyword not in _ANNOTATIONS:
                    hint = _HINTS.get(keyword, "leave it out")
                    self._refuse(path, f"the keyword {keyword!r} cannot be enforced; {hint}")
        self._check_cycles()

    def _refuse(self, path: str, why: str) -> NoReturn:
        raise InvalidRequest(f"{self._where} cannot be enforced: at {path[:200]}: {why}")

    # What each keyword may hold. `value` stands at `path` in `schema`.

    def accept(self, path: str, value: Any, schema: Any) -> None:
        """llguidance checks it."""

    def check_subschema(self, path: str, value: Any, schema: Any) -> None:
        if isinstance(value, list):
            self._refuse(path, "a list of schemas is prefixItems in draft 2020-12")
        self._todo.append((path, value))

    def check_list(self, path: str, value: Any, schema: Any) -> None:
        if not isinstance(value, list) or not value:
            self._refuse(path, "it must be a non-empty list of schemas")
        self._todo += [(f"{path}/{number}", item) for number, item in enumerate(value)]

    def check_one_of(self, path: str, value: Any, schema: Any) -> None:
        """One of them is any of them where no two can hold at once. llguidance's own proof of that has holes."""
        self.check_list(path, value, schema)
        if len(value) > MAX_ONE_OF:
            self._refuse(path, f"more than {MAX_ONE_OF} schemas; use anyOf")
        variants = [_Discriminator(self._follow_references(item)) for item in value]
        if "anyOf" in schema or not all(a.is_disjoint(b) for a, b in combinations(variants, 2)):
            self._refuse(path, "two of its schemas may hold at once, or anyOf stands beside it; use anyOf alone")
        renamed = [("anyOf" if key == "oneOf" else key, item) for key, item in schema.items()]
        schema.clear()  # the order of keywords is that of the properties in the text
        schema.update(renamed)

    def check_map(self, path: str, value: Any, schema: Any) -> None:
        if not isinstance(value, dict):
            self._refuse(path, "it must be an object of schemas")
        self._todo += [(f"{path}/{name}", item) for name, item in value.items()]

    def check_pattern_properties(self, path: str, value: Any, schema: Any) -> None:
        self.check_map(path, value, schema)
        if len(value) > MAX_PATTERNS:
            self._refuse(path, f"more than {MAX_PATTERNS} patterns; give fewer")
        named = schema.get("properties") or schema.get("required")
        finite = [pattern for pattern in value if {"^", "$"} <= set(pattern) and not _UNBOUNDED_REPEAT.search(pattern)]
        if named and finite:  # what is left of few names may be none, which llguidance finds out too late
            self._refuse(
                path, f"{finite[0]!r} may match no name but those in properties; name its properties there, too"
            )
        schema["patternProperties"] = {self._rewritten_pattern(path, key): item for key, item in value.items()}

    def check_pattern(self, path: str, value: Any, schema: Any) -> None:
        schema["pattern"] = self._rewritten_pattern(path, value)

    def _rewritten_pattern(self, path: str, value: Any) -> str:
        rewritten = translate_pattern(value) if isinstance(value, str) else None
        if rewritten is None:
            self._refuse(path, f"{str(value)[:100]!r} is no pattern, or one with look-around, \\b or the like")
        return rewritten

    def check_reference(self, path: str, value: Any, schema: Any) -> None:
        self._todo.append((str(value), self._target(path, value)))

    def check_type(self, path: str, value: Any, schema: Any) -> None:
        for name in value if isinstance(value, list) else [value]:
            if name not in TYPES:
                self._refuse(path, f"there is no type {name!r}: use {', '.join(TYPES)}")

    def check_bound(self, path: str, value: Any, schema: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > MAX_NUMBER:
            self._refuse(path, f"{value!r} is not a number from -2^53 to 2^53, which alone are exact")

    def check_multiple_of(self, path: str, value: Any, schema: Any) -> None:
        self.check_bound(path, value, schema)
        digits = f"{value:.12f}".rstrip("0")
        self._common_multiple = math.lcm(self._common_multiple, int(digits.replace(".", "")) or 1)
        if value <= 0 or float(digits) != value or self._common_multiple > MAX_MULTIPLE:
            self._refuse(path, f"multipleOf {value!r} is too fine, or too large beside others in the schema")

    def check_format(self, path: str, value: Any, schema: Any) -> None:
        if value not in FORMATS:
            self._refuse(path, f"the format {value!r} is not known: use {', '.join(FORMATS)}, or pattern")

    def check_min_properties(self, path: str, value: Any, schema: Any) -> None:
        """Nothing keeps a name that is not in `properties` from coming twice, and it counts once."""
        if not isinstance(value, int) or value > max(1, len(set(_strings(schema.get("required"))))):
            self._refuse(path, "more than 1, and more than are required, cannot be counted; require them by name")

    def check_false(self, path: str, value: Any, schema: Any) -> None:
        if value is not False:
            self._refuse(path, "it cannot be enforced; leave it out")

    # References.

    def _target(self, path: str, reference: Any) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            self._refuse(path, f"{reference!r} does not point into this schema: references must begin with #/")
        target: Any = self._root
        for part in reference.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            inside = isinstance(target, dict) and key in target
            if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            elif inside:
                target = target[key]
            else:
                self._refuse(path, f"{reference!r} points to nothing")
        return target

    def _check_cycles(self) -> None:
        """Refuse references that lead back to where they stand with no array or object in between."""
        on_path: set[int] = set()  # on the way to the schema at hand
        finished: set[int] = set()
        for path, start in self._seen.values():
            todo = [start]
            while todo:
                one = todo[-1]
                if id(one) in on_path or id(one) in finished:
                    todo.pop()
                    on_path.discard(id(one))
                    finished.add(id(one))
                    continue
                on_path.add(id(one))
                for item in self._in_place_subschemas(one):
                    if id(item) in on_path:
                        self._refuse(path, "a reference leads back to itself with no array or object in between")
                    todo.append(item)

    def _in_place_subschemas(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """The schemas that speak of the same value."""
        items = [item for key in ("allOf", "anyOf", "oneOf") for item in _list(schema.get(key))]
        items += [self._target("#", schema["$ref"])] if "$ref" in schema else []
        return [item for item in items if isinstance(item, dict)]

    def _follow_references(self, schema: Any) -> Any:
        """The schema that a lone reference leads to, through at most a few others."""
        for _ in range(8):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = self._target("#", schema["$ref"])
        return schema


class _Discriminator:
    """What tells a schema from others: its types, and the strings that it can be, or that a required property can."""

    def __init__(self, schema: Any) -> None:
        schema = schema if isinstance(schema, dict) else {}
        values = _fixed_values(schema)
        names = schema.get("type", [_JSON_TYPES[type(value)] for value in values] or TYPES)
        self._types = set(_strings([names] if isinstance(names, str) else names)) or set(TYPES)
        if "integer" in self._types:
            self._types.add("number")
        self._tags = {"": _string_values(values)}
        properties = schema.get("properties")
        if self._types == {"object"} and isinstance(properties, dict):
            for name in _strings(schema.get("required")):
                self._tags[f".{name}"] = _string_values(_fixed_values(properties.get(name)))

    def is_disjoint(self, other: _Discriminator) -> bool:
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
    """The values of an enum or const; none if there may be others."""
    if not isinstance(schema, dict):
        return []
    if "const" in schema:
        return [schema["const"]]
    return _list(schema.get("enum"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _strings(value: Any) -> list[str]:
    return [word for word in _list(value) if isinstance(word, str)]


def _string_values(values: list[Any]) -> set[str]:
    """The values if all are strings."""
    return set(values) if all(isinstance(value, str) for value in values) else set()


_CHECKS: Mapping[str, Callable[[_Checker, str, Any, Any], None]] = {
    "$ref": _Checker.check_reference,
    "additionalProperties": _Checker.check_subschema,
    "allOf": _Checker.check_list,
    "anyOf": _Checker.check_list,
    "const": _Checker.accept,
    "enum": _Checker.accept,
    "exclusiveMaximum": _Checker.check_bound,
    "exclusiveMinimum": _Checker.check_bound,
    "format": _Checker.check_format,
    "items": _Checker.check_subschema,
    "maxItems": _Checker.accept,
    "maxLength": _Checker.accept,
    "maxProperties": _Checker.accept,
    "maximum": _Checker.check_bound,
    "minItems": _Checker.accept,
    "minLength": _Checker.accept,
    "minProperties": _Checker.check_min_properties,
    "minimum": _Checker.check_bound,
    "multipleOf": _Checker.check_multiple_of,
    "oneOf": _Checker.check_one_of,
    "pattern": _Checker.check_pattern,
    "patternProperties": _Checker.check_pattern_properties,
    "prefixItems": _Checker.check_list,
    "properties": _Checker.check_map,
    "required": _Checker.accept,
    "type": _Checker.check_type,
    "uniqueItems": _Checker.check_false,
}
