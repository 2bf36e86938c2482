"""Tool declarations: JSON schemas written as TypeScript types, the "# Tools" section of a message.

The model was trained on this form. The layout is that of openai-harmony 0.0.8, including its oddities (what is
quoted, where comments go, `anyOf` becomes `any`); the tests compare the two byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from .messages import Function, TextFormat

_T = TypeVar("_T")
_TYPES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


@dataclass(frozen=True)
class Namespace:
    """Functions that are declared together; without functions, a tool whose input is plain text, such as python."""

    name: str
    description: str = ""
    functions: Sequence[Function] = ()


def tools_section(namespaces: Sequence[Namespace]) -> str:
    """Return the "# Tools" section that declares these namespaces."""
    return "\n\n".join(["# Tools", *map(_namespace, namespaces)])


def _namespace(namespace: Namespace) -> str:
    lines = [f"## {namespace.name}\n"]
    if not namespace.functions:
        return "\n".join([*lines, *_split_lines(namespace.description)])
    lines += [f"// {line}" for line in _split_lines(namespace.description)]
    lines.append(f"namespace {namespace.name} {{\n")
    for function in namespace.functions:
        lines += [f"// {line}" for line in _split_lines(function.description) + _text_format(function.text_format)]
        argument = "" if function.parameters is None else f"_: {typescript_type(function.parameters)}"
        if function.text_format is not None:
            argument = "_: string"
        lines.append(f"type {function.name} = ({argument}) => any;\n")
    return "\n".join([*lines, f"}} // namespace {namespace.name}"])


def _text_format(form: TextFormat | None) -> list[str]:
    """Return the lines that tell the model what a function's text is.

    gpt-oss was trained on functions of one object and has seen no function of text among them, but much TypeScript: a
    `string` argument, and in words that it is not JSON. The grammar follows as it is, as Codex and others write theirs
    to be read; the model does better at what a mask enforces when it knows of it.
    """
    if form is None:
        return []
    about = "The input is plain text, not JSON."
    if form.syntax is None:
        return [about]
    kind = "Lark grammar" if form.syntax == "lark" else "regular expression"
    return [f"{about} It must match this {kind}:", *_split_lines(form.definition)]


def typescript_type(schema: Any, indent: str = "") -> str:
    """Return the TypeScript type of a JSON schema; `any` for what openai-harmony does not translate.

    indent: precedes every line after the first.
    """
    variants = _get(schema, "oneOf", list)
    if variants is not None:
        return "".join(f"\n{indent} | {_variant(variant, indent)}" for variant in variants)
    names = [name for name in _get(schema, "type", list) or () if isinstance(name, str)]
    if names:
        return " | ".join("number" if name == "integer" else name for name in names)
    kind = _get(schema, "type", str) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return f"{typescript_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    choices = [f'"{choice}"' for choice in _get(schema, "enum", list) or () if isinstance(choice, str)]
    if kind == "string" and choices:
        return " | ".join(choices)
    return _TYPES.get(kind, "any")


def _variant(schema: Any, indent: str) -> str:
    """Return one line of a union: the type of a variant, with its description and default as a comment."""
    comments = [_get(schema, "description", str)]
    if "default" in _mapping(schema):
        comments.append(f"default: {_default(schema, bare_choice=False)}")
    return _nullable(schema, f"{indent}   ") + _trailing_comment(comments)


def _object(schema: Any, indent: str) -> str:
    description = _get(schema, "description", str)
    head = "" if description is None else f"{indent}// {description}\n"
    required = _get(schema, "required", list) or ()
    properties = _mapping(schema.get("properties"))
    body = "".join(_property(name, value, name in required, indent) for name, value in properties.items())
    return f"{head}{{\n{body}{indent}}}"


def _property(name: str, schema: Any, required: bool, indent: str) -> str:
    key = name if required else f"{name}?"
    comments = "".join(f"{indent}//{comment}\n" for comment in _comments_above(schema))
    variants = _get(schema, "oneOf", list)
    if variants is not None:
        return comments + _union_property(key, schema, variants, indent)
    trailing = ""
    if "default" in _mapping(schema) and "oneOf" not in schema:
        trailing = f" // default: {_default(schema)}"
    return f"{comments}{indent}{key}: {_nullable(schema, f'{indent}    ')},{trailing}\n"


def _comments_above(schema: Any) -> list[str]:
    """Return the comments above a property: title, description (except a union's, see below) and examples."""
    comments = []
    title, description = _get(schema, "title", str), _get(schema, "description", str)
    if title is not None:
        comments += [f" {title}", ""]
    if description is not None and "oneOf" not in schema:
        comments.append(f" {description}")
    examples = _get(schema, "examples", list)
    if examples:
        comments.append(" Examples:")
        comments += [f' - "{example}"' for example in examples if isinstance(example, str)]
    return comments


def _union_property(key: str, schema: Any, variants: list[Any], indent: str) -> str:
    """Return a property with `oneOf`: one line per variant.

    The property's description comes first, unless the first variant has the same one. A variant's own description is
    a trailing comment, unless it equals the property's or the variant is the first one after that description.
    """
    description = _get(schema, "description", str)
    above = description is not None and not (variants and _get(variants[0], "description", str) == description)
    lines = [f"{indent}// {description}"] if above else []
    if "default" in schema:
        lines.append(f"{indent}// default: {_default(schema)}")
    lines.append(f"{indent}{key}:")
    for index, variant in enumerate(variants):
        comments = [_get(variant, "description", str)]
        if comments[0] == description or (above and index == 0):
            comments = []
        if "default" in _mapping(variant):
            comments.append(f"default: {_default(variant)}")
        lines.append(f"{indent} | {_nullable(variant, f'{indent}   ')}{_trailing_comment(comments)}")
    return "\n".join([*lines, f"{indent},\n"])


def _nullable(schema: Any, indent: str) -> str:
    """Return the type, with `| null` if the schema is nullable (OpenAPI's keyword) and the type does not include it."""
    text = typescript_type(schema, indent)
    return f"{text} | null" if _get(schema, "nullable", bool) and "null" not in text else text


def _trailing_comment(comments: Sequence[str | None]) -> str:
    present = [comment for comment in comments if comment is not None]
    return f" // {' '.join(present)}" if present else ""


def _default(schema: Any, bare_choice: bool = True) -> str:
    """Return a default as it appears in a comment.

    A string is quoted but not escaped; with an enum, it is bare (bare_choice) or JSON.
    """
    default = schema["default"]
    if not isinstance(default, str):
        return compact_json(default)
    if not _get(schema, "enum", list):
        return f'"{default}"'
    return default if bare_choice else compact_json(default)


def compact_json(value: Any) -> str:
    """Return the value as JSON in serde_json's format: no spaces, no ASCII escapes, its own number format."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{compact_json(str(key))}:{compact_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(compact_json, value)) + "]"
    if isinstance(value, int) and not -(2**63) <= value < 2**64 and abs(value) < 10**308:
        value = float(value)
    if isinstance(value, float):
        return _number(value)
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """Return the shortest digits; below 1e-5 and from 1e16 on, with an exponent without plus sign or leading zeros."""
    if 1e-5 <= abs(value) < 1e-4:
        return format(Decimal(repr(value)), "f")
    return re.sub(r"e\+?(-?)0*", r"e\1", repr(value))


def _get(schema: Any, key: str, kind: type[_T]) -> _T | None:
    """Return schema[key] if it exists and has the given type."""
    value = _mapping(schema).get(key)
    return value if isinstance(value, kind) else None


def _mapping(schema: Any) -> Mapping[str, Any]:
    return schema if isinstance(schema, Mapping) else {}


def _split_lines(text: str) -> list[str]:
    """Split at LF and CRLF only, unlike str.splitlines, which also splits at other Unicode line ends."""
    lines = re.split(r"\r?\n", text)
    return lines[:-1] if not lines[-1] else lines
