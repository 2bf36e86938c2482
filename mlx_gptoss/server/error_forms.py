"""The form of an error in each dialect, chosen by the path of the request."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from ..errors import GptOssError
from . import request_log
from .anthropic import errors as anthropic_errors
from .errors import ApiError, from_exception, from_validation
from .ollama import errors as ollama_errors

# Path -> the function that makes the response, for this path and those below it. The first match counts; other paths
# have OpenAI's form.
FORMS: Mapping[str, Callable[[ApiError], Response]] = {
    "/v1/messages": anthropic_errors.error_response,
    "/api/v0": ApiError.response,  # LM Studio's
    "/api/v1": ApiError.response,
    "/api": ollama_errors.error_response,
}


def error_response(error: ApiError, scope: Scope) -> Response:
    """The response to a failed request, in the form of its dialect."""
    request_log.note_error(error.code, error.status)
    path: str = scope["path"]
    for prefix, form in FORMS.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return form(error)
    return error.response()


def install_handlers(app: FastAPI) -> None:
    """Register handlers that answer every error of the app in the form of its dialect."""

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(from_exception(error), request.scope)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(from_validation(error), request.scope)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(ApiError(error.status_code, message, headers=error.headers), request.scope)

    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    for kind in (ApiError, GptOssError, Exception):
        app.add_exception_handler(kind, on_error)
