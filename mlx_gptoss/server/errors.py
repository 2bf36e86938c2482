"""Errors of the API: every failure becomes a status, a message and a code; error_forms.py writes them per dialect."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.responses import Response

from ..errors import Busy, DoesNotFit, GptOssError, InvalidRequest, ModelUnavailable
from ..sampling import Sampling
from . import request_log

# Steps that pydantic adds to an error's location for the members of a union; they are not fields of the request.
UNION_MEMBERS = {"str", "int", "constrained-str"}
MAX_MESSAGE_CHARS = 1000  # a message may quote what the client sent
TOO_LARGE = ("schema_too_large", "too_many_fields")  # types of fields.py's own errors
REQUEST_FIELDS = (
    "messages",
    "tools",
    "tool_choice",
    "response_format",
    "stop_token_ids",
    *(field.name for field in fields(Sampling)),
)
_LEADING_FIELD = re.compile(rf"({'|'.join(REQUEST_FIELDS)})(\[\d+\]|\.[a-z_]+)*(?=[ :])")  # at the start of a message

log: logging.Logger = logging.getLogger(__name__)


class JsonResponse(Response):
    """A JSON response in pure ASCII, so that a lone surrogate from the client can be echoed."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump_json(content)


def dump_json(content: Any) -> bytes:
    """Compact JSON on one line, in ASCII."""
    return json.dumps(content, separators=(",", ":")).encode()


class ErrorDetail(BaseModel):
    """What is wrong and what to do. `param` is the request field, `code` a constant for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is not 2xx, in OpenAI's form."""

    error: ErrorDetail


class ApiError(Exception):
    """An error response with a status of its own.

    Its `type` in JSON is "server_error" from status 500 on, else "invalid_request_error".
    """

    status: int
    param: str | None
    code: str | None
    headers: Mapping[str, str] | None

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
        """The JSON object that OpenAI's clients read."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JsonResponse:
        """The response in OpenAI's form."""
        return JsonResponse(self.body(), self.status, self.headers)


def invalid_field(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Return the 400 for a request field. The message becomes "{param} {message}"; raise the result."""
    return ApiError(400, f"{param} {message}", param=param, code=code)


def from_exception(error: BaseException) -> ApiError:
    """Convert any exception into an error response. An unexpected one is logged, and its text is not sent."""
    found = _converted(error)
    request_log.note_error(found.code, found.status)
    return found


def _converted(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (InvalidRequest, DoesNotFit)):
        field = _LEADING_FIELD.match(str(error))
        too_long = "context holds" in str(error) or isinstance(error, DoesNotFit)
        code = "context_length_exceeded" if too_long else "invalid_value"
        return ApiError(400, str(error), param=field[0] if field and not too_long else None, code=code)
    if isinstance(error, Busy):
        return ApiError(503, str(error), code="busy", headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, ModelUnavailable):
        return ApiError(503, str(error), code="model_unavailable", headers={"Retry-After": "5"})
    if isinstance(error, GptOssError):
        return ApiError(500, str(error), code="engine_error")
    log.error("unexpected error in a request", exc_info=error)
    return ApiError(500, "internal server error; see the server's log", code="internal_error")


def main_problem(problems: Sequence[Any]) -> Any:
    """The problem of pydantic's that the client should hear of: for a union, that of its best matching member."""
    return max(problems, key=lambda one: (one["type"] in TOO_LARGE, len(one["loc"])))


def from_validation(error: RequestValidationError) -> ApiError:
    """Convert a validation error of the body or the query into a 400 that names one field."""
    first = main_problem(error.errors())
    _, *path = first["loc"]
    param = _field_path(path)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not supported: leave it out", param=param, code="unknown_parameter")
    if first["type"] in TOO_LARGE:
        return ApiError(400, f"{param or 'the body'} {first['msg']}", param=param or None, code=first["type"])
    if first["type"] == "missing" and not path:
        return ApiError(400, "the body is empty: send a JSON object with Content-Type: application/json")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "union_tag_invalid":
        types = f"{first['ctx']['tag']!r}: use one of {first['ctx']['expected_tags']}"
        return ApiError(400, f"{param} has the type {types}", param=param, code="invalid_value")
    if not path:
        return ApiError(400, "the body must be a JSON object with Content-Type: application/json", code="invalid_json")
    return ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value")


def _field_path(path: list[Any]) -> str:
    """A location of pydantic's as a path such as messages[0].content, without the union members it names."""
    first, *rest = path or [""]
    steps = (step for step in rest if isinstance(step, int) or not (step in UNION_MEMBERS or "[" in step))
    return f"{first}" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)[:100]
