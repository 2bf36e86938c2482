"""Errors in Ollama's format: {"error": "what is wrong"}, as a response or as the last line of a stream."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from ..errors import ApiError, JsonResponse


class ErrorBody(BaseModel):
    """The body of every response that is not 2xx."""

    error: str


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def error_body(error: ApiError) -> dict[str, str]:
    """The JSON object that Ollama's clients read."""
    return {"error": str(error)}


def error_response(error: ApiError) -> JsonResponse:
    """The response to a request that failed."""
    return JsonResponse(error_body(error), error.status, error.headers)
