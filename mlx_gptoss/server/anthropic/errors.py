"""Errors in Anthropic's format: {"type": "error", "error": {"type", "message"}, "request_id"}."""

from __future__ import annotations

import secrets
from typing import Any, Literal

from pydantic import BaseModel

from .. import request_log
from ..errors import ApiError, JsonResponse

REQUEST_ID = "request-id"  # the response header that Anthropic's clients show in their errors
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ErrorDetail(BaseModel):
    type: str
    message: str


class ErrorBody(BaseModel):
    """The body of every response that is not 2xx."""

    type: Literal["error"]
    error: ErrorDetail
    request_id: str


def new_request_id() -> str:
    """The id of the request in hand, as in the log; outside of one, a random id."""
    record = request_log.current()
    return f"req_{secrets.token_hex(12)}" if record is None else record.request_id


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """The JSON object that Anthropic's clients read, in a response or in an `error` event."""
    kind = TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    message = str(error)
    if error.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # the words by which clients know that they have to compact
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def error_response(error: ApiError) -> JsonResponse:
    """The response to a request that failed."""
    request_id = new_request_id()
    return JsonResponse(error_body(error, request_id), error.status, {**(error.headers or {}), REQUEST_ID: request_id})
