"""The ASGI application: routes, middleware and the chat page. One file per endpoint; ROUTERS lists them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import error_forms, ignored, llama_cpp, lm_studio, markdown, request_log
from .anthropic import messages
from .errors import ErrorBody, JsonResponse
from .guard import LOCAL_ORIGIN, Guard
from .ignored import ReportIgnored
from .models import endpoints as models
from .ollama import chat as ollama_chat
from .ollama import generate as ollama_generate
from .ollama import models as ollama_models
from .openai import chat_completions, completions
from .request_log import RequestLog
from .responses import compaction, conversations, stored_responses
from .responses import endpoint as responses
from .rewrite import Rewrite
from .service import Service, ServiceDep

PAGE_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
PAGE_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}

router: APIRouter = APIRouter()
ROUTERS = (
    router,
    models.router,
    markdown.router,
    chat_completions.router,
    responses.router,
    compaction.router,
    stored_responses.router,
    conversations.router,
    completions.router,
    messages.router,
    ollama_models.router,
    ollama_chat.router,
    ollama_generate.router,
    lm_studio.router,
    llama_cpp.router,
)


@router.get("/health")
@router.get("/ready")
async def health(service: ServiceDep) -> Response:
    """200 while the server accepts requests, 503 when it drains before a shutdown or its engine has failed. A model
    whose own process has failed is started again by the next request, so the server is well."""
    status = "failed" if service.model.failure else "draining" if service.gate.draining else "ok"
    models = [{"id": named.id, "state": named.state, "pid": named.pid} for named in service.models]
    return JsonResponse({"status": status, "models": models}, 200 if status == "ok" else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: ServiceDep) -> Response:
    """Metrics in the text format of Prometheus."""
    return Response(service.render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


def build_app(service: Service) -> ASGIApp:
    """Return the complete server: routes, page, access checks, CORS and request counts."""
    error_responses: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
    app = FastAPI(title="mlx-gptoss", docs_url=None, redoc_url=None, responses=error_responses)
    app.state.service = service
    error_forms.install_handlers(app)
    for endpoint_router in ROUTERS:
        app.include_router(endpoint_router)
    _add_page(app)
    guarded: ASGIApp = Guard(ReportIgnored(app), service.gate)
    if service.gate.allowed_origins or service.gate.is_local:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=service.gate.allowed_origins,
            allow_origin_regex=LOCAL_ORIGIN.pattern if service.gate.is_local else None,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[ignored.HEADER, request_log.HEADER],
        )
    return Rewrite(RequestLog(_count_requests(guarded, service)))


def _add_page(app: FastAPI) -> None:
    """Serve the page at / and its files under /page/. They are read once, so that no request names a path on disk."""
    folder = files(__package__) / "page"
    for file in folder.iterdir() if folder.is_dir() else ():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in PAGE_TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            handler = _static_handler(file.read_bytes(), PAGE_TYPES[suffix])
            app.add_api_route(path, handler, methods=["GET"], include_in_schema=False)


def _static_handler(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    """Return an endpoint that always answers with `content`."""
    headers = {
        "Content-Security-Policy": PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def handler() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return handler


def _count_requests(app: ASGIApp, service: Service) -> ASGIApp:
    """Count responses by path and status.

    The label is the route's template, or "other" where no route matched, so that clients cannot create new labels.
    """

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                service.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await app(scope, receive, counting_send)

    return count
