"""The lists of models in OpenAI's form, and POST /models/load and /models/unload as llama.cpp's router has them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ..body import BodyRoute
from ..disconnect import cancel_on_disconnect
from ..errors import JsonResponse
from ..fields import RequestModel
from ..ignored import ignore
from ..service import Service, ServiceDep

router: APIRouter = APIRouter(route_class=BodyRoute)


class ModelRequest(RequestModel):
    """model: the name of the model to load or unload."""

    model: Annotated[str, Field(max_length=1024)]


@router.get("/v1/models")
async def list_models(service: ServiceDep) -> Response:
    """List all models, loaded or not, each by its name and its aliases."""
    models = [_model_object(each, name) for each in service.each_model() for name in each.names]
    page = {"has_more": False, "first_id": models[0]["id"], "last_id": models[-1]["id"]}  # Anthropic's
    return JsonResponse({"object": "list", "data": models, **page})


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, service: ServiceDep) -> Response:
    """Describe a model. An unknown name means the first one, unless the server is strict about names: then 404."""
    service = service.having(service.find(name))
    return JsonResponse(_model_object(service, name if name in service.names else service.model_id))


@router.post("/v1/models/load")
async def load(body: ModelRequest, request: Request, service: ServiceDep) -> Response:
    """Load a model now, and answer when it is loaded. Another one may have to be unloaded for it."""
    ignore(request, body.ignored_fields())
    service = service.having(service.known(body.model))
    await cancel_on_disconnect(request, service.load())
    return JsonResponse({"success": True, "model": service.model_id, "state": service.selected.state})


@router.post("/v1/models/unload")
async def unload(body: ModelRequest, request: Request, service: ServiceDep) -> Response:
    """Unload a model when the requests that use it have ended. The next request for it loads it again."""
    ignore(request, body.ignored_fields())
    service = service.having(service.known(body.model))
    await cancel_on_disconnect(request, service.unload())
    return JsonResponse({"success": True, "model": service.model_id, "state": service.selected.state})


def _model_object(service: Service, name: str) -> dict[str, Any]:
    """The fields of OpenAI and of Anthropic, the context length under the names of OpenRouter and vLLM, the model of an
    adapter under vLLM's, and the state under llama.cpp's."""
    context, created = service.model.max_context, datetime.fromtimestamp(service.created, timezone.utc)
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "mlx-gptoss",
        "type": "model",
        "display_name": name,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": context,
        "context_length": context,
        "max_model_len": context,
        "status": {"value": service.selected.state},
        **({"parent": service.selected.base} if service.selected.base else {}),
    }
