"""The application: which path is answered by whom. One file an endpoint; a new one is one line in ROUTERS."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import chat_completions, completions, errors, responses
from .errors import ErrorBody, JsonResponse
from .guard import Guard
from .service import Service, ServiceDep

PAGE_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

router = APIRouter()
ROUTERS = (router, chat_completions.router, responses.router, completions.router)


@router.get("/v1/models")
async def list_models(service: ServiceDep) -> Response:
    """The one model that is loaded."""
    return JsonResponse({"object": "list", "data": [_model_object(service)]})


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, service: ServiceDep) -> Response:
    service.check_model(name)
    return JsonResponse(_model_object(service))


@router.get("/health")
async def health(service: ServiceDep) -> Response:
    """200 while requests are taken, 503 while the last ones end."""
    draining = service.gate.draining
    return JsonResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: ServiceDep) -> Response:
    """For Prometheus."""
    return Response(service.render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


def build_app(service: Service) -> ASGIApp:
    """The whole server for one model."""
    other: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
    app = FastAPI(title="mlx-gptoss", docs_url=None, redoc_url=None, responses=other)
    app.state.service = service
    errors.install_handlers(app)
    for part in ROUTERS:
        app.include_router(part)
    _add_page(app)
    outer: ASGIApp = Guard(app, service.gate)
    if service.gate.allowed_origins:
        outer = CORSMiddleware(
            outer,
            allow_origins=service.gate.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
    return _count_requests(outer, service)


def _model_object(service: Service) -> dict[str, Any]:
    return {"id": service.model_id, "object": "model", "created": service.created, "owned_by": "mlx-gptoss"}


def _add_page(app: FastAPI) -> None:
    """The page at /, its files read once: no request names a path on the disk."""
    folder = files(__package__) / "page"
    for file in folder.iterdir() if folder.is_dir() else ():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in PAGE_TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            answer = _static_handler(file.read_bytes(), PAGE_TYPES[suffix])
            app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)


def _static_handler(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    headers = {
        "Content-Security-Policy": PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def answer() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return answer


def _count_requests(app: ASGIApp, service: Service) -> ASGIApp:
    """Counts what is answered, under the path's template, so that nobody can make up labels."""

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                service.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await app(scope, receive, counting_send)

    return count
