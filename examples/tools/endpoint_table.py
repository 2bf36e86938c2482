"""Write mlx_gptoss/server/ENDPOINTS.md: every endpoint of the server and every field it reads, from the code.

    python examples/tools/endpoint_table.py

Needs the extra `serve`: pip install '.[serve]'.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

try:
    from fastapi.routing import APIRoute
    from pydantic import BaseModel, TypeAdapter

    from mlx_gptoss.server.app import ROUTERS
except ImportError as error:
    sys.exit(f"error: {error}; install the extra: pip install '.[serve]'")

TARGET = Path(__file__).parents[2] / "mlx_gptoss/server/ENDPOINTS.md"
HEAD = """\
# Endpoints and fields

Made from the code by `python examples/tools/endpoint_table.py`. A field that is not listed is accepted, has no effect
and is named in the response header `X-Ignored-Fields`; [README.md](README.md) says which values have a meaning of
their own. A path is found without `/v1`, too, and every GET answers to HEAD.
"""


def document() -> str:
    """The text of ENDPOINTS.md."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    lines = [HEAD, "| endpoint | what it does |", "|---|---|"]
    for route in routes:
        lines.append(f"| `{' '.join(sorted(route.methods))} {route.path}` | {_first_line(route.endpoint)} |")
    for model, paths in _bodies(routes):
        names = ", ".join(f"`{path}`" for path in paths)
        lines += ["", f"## {names}", "", _prose(model), "", "| field | type |", "|---|---|", *_fields(model)]
    return "\n".join(lines) + "\n"


def _first_line(function: Any) -> str:
    return (function.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").replace("    ", "")


def _prose(model: type[BaseModel]) -> str:
    return "\n".join(line.strip() for line in (model.__doc__ or "").strip().splitlines())


def _bodies(routes: list[APIRoute]) -> Iterator[tuple[type[BaseModel], list[str]]]:
    """Each class of request bodies, with the paths that take it."""
    paths: dict[type[BaseModel], list[str]] = {}
    for route in routes:
        hints = get_type_hints(route.endpoint)
        for hint in (hints.get("body"),):
            if isinstance(hint, type) and issubclass(hint, BaseModel):
                paths.setdefault(hint, []).append(route.path)
    yield from paths.items()


def _fields(model: type[BaseModel]) -> Iterator[str]:
    """One row of the table for each field that the class declares."""
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        names = [str(choice) for choice in alias.choices] if alias is not None and hasattr(alias, "choices") else [name]
        kind = TypeAdapter(field.rebuild_annotation()).json_schema() if field.annotation is not None else {}
        spelled = " or ".join(f"`{each}`" for each in names)
        yield f"| {spelled}{', required' if field.is_required() else ''} | {_type(kind, kind.get('$defs', {}))} |"


def _type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        inner = definitions.get(name, {}).get("properties", {})
        return f"object: {', '.join(inner)}" if 0 < len(inner) <= 4 else "object"
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        texts = [_type(option, definitions) for option in options if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(texts))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    bounds = _bounds(schema)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), definitions)}{bounds}"
    return f"{schema.get('type', 'any value')}{bounds}"


def _bounds(schema: dict[str, Any]) -> str:
    """The limits of a value, such as " (0 to 2)"."""
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is not None and high is not None and high < 2**62:
        return f" ({low:g} to {high:g})"
    if low is not None:
        return f" (at least {low:g})"
    longest = schema.get("maxItems", schema.get("maxLength"))
    return "" if longest is None else f" (at most {longest:,})"


if __name__ == "__main__":
    TARGET.write_text(document(), "utf-8")
    print(f"wrote {TARGET}")
