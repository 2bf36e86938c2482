"""LM Studio's lists of models: GET /api/v0/models and /api/v1/models. rewrite.py maps its other paths to OpenAI's."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from .about import ARCHITECTURE, file_format, parameter_size, quantization, size_bytes
from .errors import JsonResponse
from .service import Service, ServiceDep

router: APIRouter = APIRouter()


@router.get("/api/v0/models")
async def list_models(service: ServiceDep) -> Response:
    """List all models, each by its name and its aliases."""
    return JsonResponse(
        {"object": "list", "data": [_model_object(each, name) for each in service.each_model() for name in each.names]}
    )


@router.get("/api/v0/models/{name:path}")
async def retrieve_model(name: str, service: ServiceDep) -> Response:
    """Describe a model. An unknown name means the first one, unless the server is strict about names: then 404."""
    service = service.having(service.find(name))
    return JsonResponse(_model_object(service, name if name in service.names else service.model_id))


@router.get("/api/v1/models")
async def list_models_v1(service: ServiceDep) -> Response:
    """The same in the format of LM Studio 0.4."""
    models = [_model_object_v1(each, name) for each in service.each_model() for name in each.names]
    return JsonResponse({"models": models})


def _model_object(service: Service, name: str) -> dict[str, Any]:
    model = service.model
    return {
        "id": name,
        "object": "model",
        "type": "llm",
        "publisher": _publisher(name),
        "arch": ARCHITECTURE,
        "compatibility_type": _compatibility(service),
        "quantization": quantization(model),
        "state": "loaded" if service.selected.state == "loaded" else "not-loaded",
        "max_context_length": model.config.max_position_embeddings,
        **({"loaded_context_length": model.max_context} if service.selected.state == "loaded" else {}),
        "capabilities": ["tool_use"],
    }


def _model_object_v1(service: Service, name: str) -> dict[str, Any]:
    model = service.model
    instance = {"id": name, "config": {"context_length": model.max_context}}
    return {
        "type": "llm",
        "publisher": _publisher(name),
        "key": name,
        "display_name": name.rpartition("/")[2],
        "architecture": ARCHITECTURE,
        "quantization": {"name": quantization(model), "bits_per_weight": None},
        "size_bytes": size_bytes(model),
        "params_string": parameter_size(model),
        "loaded_instances": [instance] if service.selected.state == "loaded" else [],
        "max_context_length": model.config.max_position_embeddings,
        "format": _compatibility(service),
        "capabilities": {"vision": False, "trained_for_tool_use": True},
        "description": None,
    }


def _publisher(name: str) -> str:
    """The owner in a hub id."""
    return name.rpartition("/")[0] or "mlx-gptoss"


def _compatibility(service: Service) -> str:
    """The kind of the files where LM Studio knows it, "gguf" or "mlx"; otherwise what runs the model: "torch"."""
    if file_format(service.model) == "gguf":
        return "gguf"
    return "torch" if service.model.backend == "cuda" else "mlx"
