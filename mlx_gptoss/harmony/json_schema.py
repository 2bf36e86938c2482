"""Checks that a JSON schema can be enforced token by token, and rewrites it for llguidance.

The dialect is draft 2020-12. llguidance enforces the keywords in `_CHECKS` (its docs/json_schema.md) and ignores
keywords that it does not know. A misspelt keyword would be ignored, too. Here every keyword is enforced, is an
annotation, or is refused by name; schemas that are too large to compile are refused as well.

To add a keyword that llguidance enforces, add a line to `_CHECKS`, and a case to tests/data/schemas.json.
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
MAX_SUBSCHEMAS = 2000  # each counted once, however often it is referenced
MAX_PATTERNS = 50  # in one patternProperties: every pair of them is compared
MAX_ONE_OF = 100  # schemas in one oneOf: every pair of them is compared
MAX_NUMBER = 2**53  # llguidance compares bounds as float64
MAX_MULTIPLE = 20_000  # of all multipleOf: time and memory grow faster than their least common multiple
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
    *("contentEncoding", "contentMediaType", "$comment"),
    *("$defs", "definitions"),  # definitions are checked where a $ref points to them
}
_UNBOUNDED_REPEAT = re.compile(r"[*+]|,\}")  # a pattern without these, and with both anchors, matches few strings
_IGNORED_AT_ROOT = ("$schema", "$id")  # no effect in a single document with only local references
_HINTS = {
    "nullable": 'write {"type": ["string", "null"]} or the like',
    "additionalItems": "use prefixItems and items",
    "if": "use anyOf",
    "not": "describe what is allowed instead",
}


def normalize_schema(schema: Any, where: str) -> str:
    """Check a schema and return it as JSON text for llguidance.

    schema: a mapping. It is not modified.
    where: what error messages call the schema, such as "response_format".

    `oneOf` becomes `anyOf`; it is refused if two of its schemas may match the same value. Patterns are translated
    (patterns.py). Raises InvalidRequest for a schema that cannot be enforced, with the keyword and its path.
    """
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{where} must be a JSON schema (an object), not {schema!r}")
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
    """Walks over a schema and everything that it references. Renames `oneOf` and rewrites patterns in place.

    Paths in error messages are JSON pointers, such as "#/properties/a".
    """

    def __init__(self, root: dict[str, Any], where: str) -> None:
        self._root = root
        self._where = where
        self._todo: list[tuple[str, Any]] = [("#", root)]  # a stack, not recursion: references may form long chains
        self._seen: dict[int, tuple[str, dict[str, Any]]] = {}  # id() of a subschema -> its path and itself
        self._common_multiple = 1  # of all multipleOf so far

    def run(self) -> None:
        """Check the whole schema. Raises InvalidRequest."""
        while self._todo:
            path, schema = self._todo.pop()
            if isinstance(schema, bool) or id(schema) in self._seen:
                continue
            if not isinstance(schema, dict):
                self._refuse(path, f"{schema!r} is not a schema: use an object, true or false")
            self._seen[id(schema)] = (path, schema)
            if len(self._seen) > MAX_SUBSCHEMAS:
                raise InvalidRequest(f"{self._where} has more than {MAX_SUBSCHEMAS} subschemas; give a smaller schema")
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

    # One check per keyword: `value` is the value of the keyword at `path`, in `schema`.

    def accept(self, path: str, value: Any, schema: Any) -> None:
        """For a keyword whose value llguidance checks."""

    def check_subschema(self, path: str, value: Any, schema: Any) -> None:
        """The value is a schema."""
        if isinstance(value, list):
            self._refuse(path, "in draft 2020-12, a list of schemas is prefixItems")
        self._todo.append((path, value))

    def check_list(self, path: str, value: Any, schema: Any) -> None:
        """The value is a list of schemas."""
        if not isinstance(value, list) or not value:
            self._refuse(path, "it must be a non-empty list of schemas")
        self._todo += [(f"{path}/{number}", item) for number, item in enumerate(value)]

    def check_one_of(self, path: str, value: Any, schema: Any) -> None:
        """`oneOf` means `anyOf` if no two of its schemas match the same value. llguidance's own proof has gaps."""
        self.check_list(path, value, schema)
        if len(value) > MAX_ONE_OF:
            self._refuse(path, f"more than {MAX_ONE_OF} schemas; use anyOf")
        if "anyOf" in schema:
            self._refuse(path, "oneOf and anyOf in the same schema; use anyOf alone")
        variants = [_Discriminator(self._follow_references(item)) for item in value]
        if not all(a.is_disjoint(b) for a, b in combinations(variants, 2)):
            self._refuse(path, "two of its schemas may match the same value; use anyOf")
        renamed = [("anyOf" if key == "oneOf" else key, item) for key, item in schema.items()]
        schema.clear()  # rebuilt, as the order of the keywords is the order of the properties in the text
        schema.update(renamed)

    def check_map(self, path: str, value: Any, schema: Any) -> None:
        """The value maps names to schemas."""
        if not isinstance(value, dict):
            self._refuse(path, "it must map names to schemas")
        self._todo += [(f"{path}/{name}", item) for name, item in value.items()]

    def check_pattern_properties(self, path: str, value: Any, schema: Any) -> None:
        self.check_map(path, value, schema)
        if len(value) > MAX_PATTERNS:
            self._refuse(path, f"more than {MAX_PATTERNS} patterns; give fewer")
        named = schema.get("properties") or schema.get("required")
        finite = [pattern for pattern in value if {"^", "$"} <= set(pattern) and not _UNBOUNDED_REPEAT.search(pattern)]
        if named and finite:  # the named properties may leave it no name, which llguidance notices only on the way
            self._refuse(path, f"{finite[0]!r} may match only names in properties; list its names in properties, too")
        schema["patternProperties"] = {self._translate_pattern(path, key): item for key, item in value.items()}

    def check_pattern(self, path: str, value: Any, schema: Any) -> None:
        schema["pattern"] = self._translate_pattern(path, value)

    def _translate_pattern(self, path: str, value: Any) -> str:
        translated = translate_pattern(value) if isinstance(value, str) else None
        if translated is None:
            self._refuse(path, f"the pattern {str(value)[:100]!r} is invalid, or uses look-around, \\b or the like")
        return translated

    def check_reference(self, path: str, value: Any, schema: Any) -> None:
        self._todo.append((str(value), self._resolve(path, value)))

    def check_type(self, path: str, value: Any, schema: Any) -> None:
        for name in value if isinstance(value, list) else [value]:
            if name not in TYPES:
                self._refuse(path, f"unknown type {name!r}: use {', '.join(TYPES)}")

    def check_bound(self, path: str, value: Any, schema: Any) -> None:
        """The value is a number in the range where float64 represents every integer exactly."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > MAX_NUMBER:
            self._refuse(path, f"{value!r} is not a number from -2^53 to 2^53")

    def check_multiple_of(self, path: str, value: Any, schema: Any) -> None:
        """The value is a decimal number; all of a schema's have a small least common multiple, decimal points aside."""
        self.check_bound(path, value, schema)
        digits = f"{value:.12f}".rstrip("0")
        self._common_multiple = math.lcm(self._common_multiple, int(digits.replace(".", "")) or 1)
        if value <= 0 or float(digits) != value or self._common_multiple > MAX_MULTIPLE:
            self._refuse(path, f"multipleOf {value!r} is too fine, or too large together with others in the schema")

    def check_format(self, path: str, value: Any, schema: Any) -> None:
        if value not in FORMATS:
            self._refuse(path, f"unknown format {value!r}: use {', '.join(FORMATS)}, or pattern")

    def check_min_properties(self, path: str, value: Any, schema: Any) -> None:
        """At most 1, or the number of required properties.

        Beyond that the grammar would have to count names, and a name that is not in `properties` may occur twice.
        """
        if not isinstance(value, int) or value > max(1, len(set(_strings(schema.get("required"))))):
            self._refuse(path, "more than 1 and more than are required cannot be counted; require them by name")

    def check_false(self, path: str, value: Any, schema: Any) -> None:
        """The keyword may only be turned off."""
        if value is not False:
            self._refuse(path, "it cannot be enforced; leave it out")

    # References.

    def _resolve(self, path: str, reference: Any) -> Any:
        """Return what a reference, a JSON pointer such as "#/$defs/a", points to."""
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
        """Refuse references that lead back to themselves with no array or object in between.

        A depth-first search over the in-place subschemas, with a stack instead of recursion.
        """
        on_path: set[int] = set()  # the schemas between the start and the current one
        finished: set[int] = set()
        for path, start in self._seen.values():
            todo = [start]
            while todo:
                current = todo[-1]
                if id(current) in on_path or id(current) in finished:
                    todo.pop()
                    on_path.discard(id(current))
                    finished.add(id(current))
                    continue
                on_path.add(id(current))
                for item in self._in_place_subschemas(current):
                    if id(item) in on_path:
                        self._refuse(path, "a reference leads back to itself with no array or object in between")
                    todo.append(item)

    def _in_place_subschemas(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the subschemas that apply to the same value as the schema itself."""
        items = [item for key in ("allOf", "anyOf", "oneOf") for item in _list(schema.get(key))]
        items += [self._resolve("#", schema["$ref"])] if "$ref" in schema else []
        return [item for item in items if isinstance(item, dict)]

    def _follow_references(self, schema: Any) -> Any:
        """Return the schema that `$ref` leads to, through at most 8 references; without `$ref`, the schema itself."""
        for _ in range(8):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = self._resolve("#", schema["$ref"])
        return schema


class _Discriminator:
    """What distinguishes a schema from others: its types, and the strings that it or a required property may be."""

    def __init__(self, schema: Any) -> None:
        schema = schema if isinstance(schema, dict) else {}
        values = _fixed_values(schema)
        names = schema.get("type", [_JSON_TYPES[type(value)] for value in values] or TYPES)
        self._types = set(_strings([names] if isinstance(names, str) else names)) or set(TYPES)
        if "integer" in self._types:
            self._types.add("number")
        self._tags = {"": _string_values(values)}  # "" is the value itself, ".name" a required property
        properties = schema.get("properties")
        if self._types == {"object"} and isinstance(properties, dict):
            for name in _strings(schema.get("required")):
                self._tags[f".{name}"] = _string_values(_fixed_values(properties.get(name)))

    def is_disjoint(self, other: _Discriminator) -> bool:
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
    return _list(schema.get("enum"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _strings(value: Any) -> list[str]:
    return [word for word in _list(value) if isinstance(word, str)]


def _string_values(values: list[Any]) -> set[str]:
    """Return the values as a set if all of them are strings; otherwise an empty set."""
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
