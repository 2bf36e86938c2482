"""Request bodies: parsed and validated on a worker thread, so that a large one stops no other request.

One call into C holds the interpreter's lock from its beginning to its end, on any thread. json.loads is one: a string
takes 2 ns per byte, a name in an object up to 1 us. Where it would take too long, the decoder that json has in Python
does the same: it is slower, but the event loop goes on between two values.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope

from .errors import main_problem
from .rewrite import is_json

SMALL_BODY = 16 << 10  # bytes that take less time than a thread
MAX_C_VALUES = 20_000  # that json.loads reads in one call, names counted
MAX_NAMES = 20_000  # different ones in a body: to make and to free an object of 250,000 takes half a second


class BodyRoute(APIRoute):
    """A route of which the body, if it takes one, is read on a worker thread. Give it as `route_class` to a router."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        params = self.dependant.body_params
        if not params:
            return handler
        kind: Any = params[0].field_info.annotation
        adapter: TypeAdapter[Any] = TypeAdapter(kind)

        async def handle(request: Request) -> Response:
            body = await request.body()
            if not body or not is_json(request.headers.get("content-type", "")):
                return await handler(request)  # the error is FastAPI's
            if len(body) <= SMALL_BODY:
                value = _validated(adapter, body)
            else:
                value = await asyncio.to_thread(_validated, adapter, body)
            return await handler(_ReadRequest(request.scope, request.receive, body, value))

        return handle


class _ReadRequest(Request):
    """A request whose body has been read. FastAPI takes the instance that json() returns as it is."""

    def __init__(self, scope: Scope, receive: Receive, body: bytes, value: Any) -> None:
        super().__init__(scope, receive)
        self._body = body
        self._value = value

    async def json(self) -> Any:
        return self._value


def _main_problem(error: ValidationError) -> dict[str, Any]:
    """The problem of a body that the answer names. There may be as many as values."""
    problem = main_problem(error.errors(include_url=False, include_input=False))
    return {**problem, "loc": ("body", *problem["loc"])}


class _Names(dict[str, str]):
    """The names that a decoder has read. Raises ValueError for one more than MAX_NAMES."""

    def setdefault(self, name: str, default: Any = None, /) -> Any:
        if len(self) > MAX_NAMES:
            raise ValueError(f"more than {MAX_NAMES} different names")
        return super().setdefault(name, default)


class PythonDecoder(json.JSONDecoder):
    """json's decoder as it is without its C extension, but for strings. Raises ValueError for too many names."""

    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[str, str] = _Names()
        self.parse_object: Any = json.decoder.JSONObject  # type: ignore[attr-defined]
        self.parse_array: Any = json.decoder.JSONArray  # type: ignore[attr-defined]
        self.scan_once: Any = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]


def _count_values(body: bytes) -> int:
    """The number of values and names in a body, or more: what is in a string counts, too."""
    return sum(map(body.count, (b",", b"[", b"{", b":")))


def _validated(adapter: TypeAdapter[Any], body: bytes) -> Any:
    """The request in a body. Raises RequestValidationError for one that is not JSON, or not that of the endpoint."""
    try:
        text = body.decode("utf-8-sig")  # json.loads would accept surrogates, at 200 ns each
        content = json.loads(text) if _count_values(body) <= MAX_C_VALUES else PythonDecoder().decode(text)
    except json.JSONDecodeError as error:
        problem = {"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}}
        raise RequestValidationError([problem]) from None
    except UnicodeDecodeError:
        problem = {"type": "json_invalid", "loc": ("body", 0), "ctx": {"error": "it is not UTF-8"}}
        raise RequestValidationError([problem]) from None
    except (ValueError, RecursionError):
        words = f"it is nested too deeply, has a number of thousands of digits, or {MAX_NAMES} names"
        problem = {"type": "json_invalid", "loc": ("body", 0), "ctx": {"error": words}}
        raise RequestValidationError([problem]) from None
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        raise RequestValidationError([_main_problem(error)]) from None
