"""Everything that can go wrong with a request, in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import Busy, DoesNotFit, GptOssError, InvalidRequest
from ..sampling import Sampling

UNION_MEMBERS = {"str", "int", "message", "reasoning", "function_call", "function_call_output"}
MAX_MESSAGE_CHARS = 1000  # characters; what was sent may be quoted in it
REQUEST_FIELDS = ("messages", "tools", "tool_choice", "response_format", *(field.name for field in fields(Sampling)))
_LEADING_FIELD = re.compile(rf"({'|'.join(REQUEST_FIELDS)})(\[\d+\]|\.[a-z_]+)*(?=[ :])")  # what a message begins with

log = logging.getLogger(__name__)


class JsonResponse(Response):
    """A JSON body, ASCII throughout: a lone surrogate that a client sent can be sent back."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump_json(content)


def dump_json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


class ErrorDetail(BaseModel):
    """What went wrong, and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer with a status of its own. type: "server_error" from 500 on, else "invalid_request_error"."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]}...")
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JsonResponse:
        return JsonResponse(self.body(), self.status, self.headers)


def invalid_field(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field that cannot be honoured."""
    return ApiError(400, f"{param} {message}", param=param, code=code)


def from_exception(error: BaseException) -> ApiError:
    """The answer to any exception. One that nobody foresaw is logged, and its text stays here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (InvalidRequest, DoesNotFit)):
        field = _LEADING_FIELD.match(str(error))
        too_long = "context holds" in str(error) or isinstance(error, DoesNotFit)
        code = "context_length_exceeded" if too_long else "invalid_value"
        return ApiError(400, str(error), param=field[0] if field and not too_long else None, code=code)
    if isinstance(error, Busy):
        return ApiError(503, str(error), code="busy", headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, GptOssError):
        return ApiError(500, str(error), code="engine_error")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, or with a query."""
    first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union's, the one that got furthest
    _, *path = first["loc"]
    param = _field_path(path)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not supported here: leave it out", param=param, code="unknown_parameter")
    if first["type"] == "missing" and not path:
        return ApiError(400, "the body is empty: send a JSON object, with Content-Type: application/json")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "union_tag_invalid":
        kinds = f"{first['ctx']['tag']!r}: use one of {first['ctx']['expected_tags']}"
        return ApiError(400, f"{param} has the type {kinds}", param=param, code="invalid_value")
    if not path:
        return ApiError(400, "the body must be a JSON object, with Content-Type: application/json", code="invalid_json")
    return ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value")


def _field_path(path: list[Any]) -> str:
    """messages[0].content, without what pydantic says of the members of a union."""
    first, *rest = path or [""]
    steps = (step for step in rest if isinstance(step, int) or not (step in UNION_MEMBERS or "[" in step))
    return f"{first}" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)[:100]


def install_handlers(app: FastAPI) -> None:
    """Have every error of the app answered in this shape."""

    async def known(request: Request, error: Exception) -> Response:
        return from_exception(error).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, what, headers=error.headers).response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (ApiError, GptOssError, Exception):
        app.add_exception_handler(kind, known)
