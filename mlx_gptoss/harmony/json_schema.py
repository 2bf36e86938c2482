"""Checks that a JSON schema can be enforced token by token, and rewrites it for llguidance.

The dialect is draft 2020-12. llguidance enforces the keywords in `_CHECKS` (its docs/json_schema.md) and ignores
keywords that it does not know. A misspelt keyword would be ignored, too. Here every keyword is enforced, is an
annotation, or is refused by name; schemas that are too large to compile are refused as well.

The parameters of a function are read with a different purpose: a call should be as valid as possible. Objects are
closed, and unless the function is strict, what cannot be enforced is left out instead of refused.

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
from .one_of import TYPES, Discriminator, as_list, strings_of
from .patterns import translate_pattern

MAX_CHARACTERS = 1 << 17  # of the schema as JSON
MAX_SUBSCHEMAS = 2000  # each counted once, however often it is referenced
MAX_PATTERNS = 50  # in one patternProperties: every pair of them is compared
MAX_ONE_OF = 100  # schemas in one oneOf: every pair of them is compared
MAX_NUMBER = 2**53  # llguidance compares bounds as float64
MAX_MULTIPLE = 20_000  # of all multipleOf: time and memory grow faster than their least common multiple
MAX_COUNT = 2**31  # of items, characters and properties
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")

_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
    *("contentEncoding", "contentMediaType", "$comment"),
    *("$defs", "definitions"),  # definitions are checked where a $ref points to them
}
_UNBOUNDED_REPEAT = re.compile(r"[*+]|,\}")  # a pattern without these, and with both anchors, matches few strings
_IN_PLACE = {"$ref", "allOf", "anyOf", "oneOf"}  # keywords whose subschemas apply to the same value
_DESCRIBES_PROPERTIES = {"properties", "patternProperties", "additionalProperties", *_IN_PLACE}
_UNENFORCED = {  # keywords that narrow what is valid and cannot be enforced
    *("not", "if", "contains", "minContains", "maxContains", "propertyNames", "unevaluatedItems", "additionalItems"),
    *("unevaluatedProperties", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"),
}
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
    copy = _copy(schema, where)
    _Checker(copy, where).run()
    return json.dumps(copy)


def normalize_parameters(schema: Any, where: str, *, strict: bool) -> tuple[str, list[str]]:
    """Return a function's parameters as JSON text for llguidance, and what is left out of them.

    The value is an object, whatever the schema says. An object with `properties` is closed unless it says otherwise:
    a call with arguments that the function does not have is a mistake.

    strict: refuse what cannot be enforced, as normalize_schema does. Otherwise it is left out: every keyword narrows
    what is valid, so the rest is still enforced. `oneOf` becomes `anyOf` even if two of its schemas may match the same
    value, and a list of schemas as `items` becomes `prefixItems`.

    Raises InvalidRequest for a schema that cannot be enforced; without `strict`, only for one that is no object schema,
    is too large, or refers back to itself with no array or object in between.
    """
    copy = _copy(schema, where)
    kinds = copy.setdefault("type", "object")
    if kinds != "object" and "object" not in as_list(kinds):
        raise InvalidRequest(f"{where} must be a JSON schema of type object, not of type {str(kinds)[:100]!r}")
    copy["type"] = "object"
    checker = _Checker(copy, where, relaxed=not strict)
    checker.run()
    checker.close_objects()
    return json.dumps(copy), checker.dropped


def _copy(schema: Any, where: str) -> dict[str, Any]:
    """Return a copy of a schema. Raises InvalidRequest if it is no mapping, too large or not JSON."""
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{where} must be a JSON schema (an object), not {schema!r}")
    try:
        text = json.dumps(schema, allow_nan=False)
        if len(text) > MAX_CHARACTERS:
            raise InvalidRequest(
                f"{where} has {len(text)} characters, more than {MAX_CHARACTERS}; give a smaller schema"
            )
        copy: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{where} must be plain JSON: {error}") from error
    except RecursionError:
        raise InvalidRequest(f"{where} is nested too deeply; give a flatter schema") from None
    for keyword in _IGNORED_AT_ROOT:
        copy.pop(keyword, None)
    return copy


class _Checker:
    """Walks over a schema and everything that it references. Renames `oneOf` and rewrites patterns in place.

    Paths in error messages are JSON pointers, such as "#/properties/a".
    """

    def __init__(self, root: dict[str, Any], where: str, *, relaxed: bool = False) -> None:
        """relaxed: leave out what cannot be enforced, and list it in `dropped`."""
        self._root = root
        self._where = where
        self._relaxed = relaxed
        self.dropped: list[str] = []
        self._todo: list[tuple[str, Any]] = [("#", root)]  # a stack, not recursion: references may form long chains
        self._seen: dict[int, tuple[str, dict[str, Any]]] = {}  # id() of a subschema -> its path and itself
        self._common_multiple = 1  # of all multipleOf so far

    def run(self) -> None:
        """Check the whole schema. Raises InvalidRequest."""
        while self._todo:
            path, schema = self._todo.pop()
            if isinstance(schema, bool) or id(schema) in self._seen:
                continue
            self._seen[id(schema)] = (path, schema)
            if len(self._seen) > MAX_SUBSCHEMAS:
                raise InvalidRequest(f"{self._where} has more than {MAX_SUBSCHEMAS} subschemas; give a smaller schema")
            for keyword, value in list(schema.items()):
                self._check_keyword(path, keyword, value, schema)
        self._check_cycles()

    def _check_keyword(self, path: str, keyword: str, value: Any, schema: dict[str, Any]) -> None:
        check = _CHECKS.get(keyword)
        try:
            if check is not None:
                check(self, f"{path}/{keyword}", value, schema)
            elif keyword not in _ANNOTATIONS:
                self._refuse(path, f"the keyword {keyword!r} cannot be enforced; {_HINTS.get(keyword, 'leave it out')}")
        except InvalidRequest as refusal:
            if not self._relaxed:
                raise
            schema.pop(keyword, None)
            # By the standard, an unknown keyword is an annotation, and so is an unknown format.
            if (check is not None and keyword != "format") or keyword in _UNENFORCED:
                self.dropped.append(str(refusal))

    def close_objects(self) -> None:
        """Let objects with `properties` have no others, except those that are described in several places."""
        merged = {id(item) for _, schema in self._seen.values() for item in self._parts_of_a_whole(schema)}
        for _, schema in self._seen.values():
            parts = self._in_place_subschemas(schema)
            if "properties" not in schema or id(schema) in merged or any(_DESCRIBES_PROPERTIES & set(p) for p in parts):
                continue
            if not {"additionalProperties", "patternProperties"} & set(schema):
                schema["additionalProperties"] = False
                if not {"type", "enum", "const"} & set(schema) and not parts:
                    schema["type"] = "object"

    def _parts_of_a_whole(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the subschemas that describe the same object together with each other or with the schema itself."""
        parts = self._in_place_subschemas(schema)
        alone = not _DESCRIBES_PROPERTIES & set(schema) - _IN_PLACE and len(_IN_PLACE & set(schema)) == 1
        return [] if alone and len(as_list(schema.get("allOf"))) < 2 else parts

    def _refuse(self, path: str, why: str) -> NoReturn:
        raise InvalidRequest(f"{self._where} cannot be enforced: at {path[:200]}: {why}")

    def _push(self, path: str, holder: Any, key: Any) -> None:
        """Check the schema holder[key] later."""
        if not isinstance(holder[key], (bool, dict)):
            refusal = f"{self._where} cannot be enforced: at {path[:200]}: {str(holder[key])[:100]} is not a schema"
            if not self._relaxed:
                raise InvalidRequest(f"{refusal}: use an object, true or false")
            self.dropped.append(refusal)
            holder[key] = True
        self._todo.append((path, holder[key]))

    # One check per keyword: `value` is the value of the keyword at `path`, in `schema`.

    def accept(self, path: str, value: Any, schema: Any) -> None:
        """For a keyword whose value llguidance checks."""

    def check_subschema(self, path: str, value: Any, schema: Any) -> None:
        """The value is a schema."""
        keyword = path.rpartition("/")[2]
        if isinstance(value, list):
            if not self._relaxed or keyword != "items" or "prefixItems" in schema:
                self._refuse(path, "in draft 2020-12, a list of schemas is prefixItems")
            self.check_list(path, value, schema)
            schema["prefixItems"] = schema.pop("items")
        else:
            self._push(path, schema, keyword)

    def check_list(self, path: str, value: Any, schema: Any) -> None:
        """The value is a list of schemas."""
        if not isinstance(value, list) or not value:
            self._refuse(path, "it must be a non-empty list of schemas")
        for number in range(len(value)):
            self._push(f"{path}/{number}", value, number)

    def check_one_of(self, path: str, value: Any, schema: Any) -> None:
        """`oneOf` means `anyOf` if no two of its schemas match the same value. llguidance's own proof has gaps."""
        self.check_list(path, value, schema)
        if "anyOf" in schema:
            self._refuse(path, "oneOf and anyOf in the same schema; use anyOf alone")
        if not self._relaxed:
            if len(value) > MAX_ONE_OF:
                self._refuse(path, f"more than {MAX_ONE_OF} schemas; use anyOf")
            variants = [Discriminator(self._follow_references(item)) for item in value]
            if not all(a.is_disjoint(b) for a, b in combinations(variants, 2)):
                self._refuse(path, "two of its schemas may match the same value; use anyOf")
        renamed = [("anyOf" if key == "oneOf" else key, item) for key, item in schema.items()]
        schema.clear()  # rebuilt, as the order of the keywords is the order of the properties in the text
        schema.update(renamed)

    def check_map(self, path: str, value: Any, schema: Any) -> None:
        """The value maps names to schemas."""
        if not isinstance(value, dict):
            self._refuse(path, "it must map names to schemas")
        for name in value:
            self._push(f"{path}/{name}", value, name)

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
        target = self._resolve(path, value)
        if not isinstance(target, (bool, dict)):
            self._refuse(str(value), f"{str(target)[:100]} is not a schema: use an object, true or false")
        self._todo.append((str(value), target))

    def check_type(self, path: str, value: Any, schema: Any) -> None:
        for name in value if isinstance(value, list) else [value]:
            if name not in TYPES:
                self._refuse(path, f"unknown type {name!r}: use {', '.join(TYPES)}")

    def check_names(self, path: str, value: Any, schema: Any) -> None:
        """The value is a list of names."""
        if not isinstance(value, list) or len(strings_of(value)) < len(value):
            self._refuse(path, "it must be a list of names")

    def check_count(self, path: str, value: Any, schema: Any) -> None:
        """The value is a whole number."""
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            self._refuse(path, f"{str(value)[:100]} is not a whole number from 0 to 2^31")

    def check_max_properties(self, path: str, value: Any, schema: Any) -> None:
        """A number that is counted if no property is optional."""
        self.check_count(path, value, schema)
        named = schema.get("properties")
        if isinstance(named, dict) and not set(named) <= set(strings_of(schema.get("required"))):
            self._refuse(path, "properties cannot be counted unless all of them are required")

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
        self.check_count(path, value, schema)
        if value > max(1, len(set(strings_of(schema.get("required"))))):
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
        items = [item for key in ("allOf", "anyOf", "oneOf") for item in as_list(schema.get(key))]
        items += [self._resolve("#", schema["$ref"])] if "$ref" in schema else []
        return [item for item in items if isinstance(item, dict)]

    def _follow_references(self, schema: Any) -> Any:
        """Return the schema that `$ref` leads to, through at most 8 references; without `$ref`, the schema itself."""
        for _ in range(8):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = self._resolve("#", schema["$ref"])
        return schema


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
    "maxItems": _Checker.check_count,
    "maxLength": _Checker.check_count,
    "maxProperties": _Checker.check_max_properties,
    "maximum": _Checker.check_bound,
    "minItems": _Checker.check_count,
    "minLength": _Checker.check_count,
    "minProperties": _Checker.check_min_properties,
    "minimum": _Checker.check_bound,
    "multipleOf": _Checker.check_multiple_of,
    "oneOf": _Checker.check_one_of,
    "pattern": _Checker.check_pattern,
    "patternProperties": _Checker.check_pattern_properties,
    "prefixItems": _Checker.check_list,
    "properties": _Checker.check_map,
    "required": _Checker.check_names,
    "type": _Checker.check_type,
    "uniqueItems": _Checker.check_false,
}
