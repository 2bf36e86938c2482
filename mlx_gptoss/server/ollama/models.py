"""The models in Ollama's API: version, tags, show, ps and pull; what makes or removes models is refused."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..about import file_format, parameter_count, parameter_size, quantization, size_bytes
from ..body import BodyRoute
from ..errors import ApiError, JsonResponse
from ..fields import Name, RequestModel
from ..ignored import ignore
from ..models.remote import RemoteModel
from ..service import Service, ServiceDep
from .errors import ERROR_RESPONSES
from .ndjson import MEDIA_TYPE, STREAMING_RESPONSES, encode_line, timestamp

VERSION = "0.32.15"  # the release whose API this package follows. Clients want a number: VS Code 0.6.4 or later
FAMILY = "gptoss"  # Ollama's name of the architecture
CAPABILITIES = ("completion", "tools", "thinking")
FAMILY_NAMES = {
    (24, 32): "gpt-oss:20b",
    (36, 128): "gpt-oss:120b",
}  # layers and experts -> the name in Ollama's library
NEVER = "2262-04-11T23:47:16Z"  # when the model expires: the end of a clock of 64-bit nanoseconds
TEMPLATE = (  # the parts of a prompt, in the notation of Ollama's templates; harmony/render.py writes it
    "<|start|>system<|message|>...<|end|><|start|>developer<|message|>{{ .System }}{{ .Tools }}<|end|>"
    "<|start|>user<|message|>{{ .Prompt }}<|end|><|start|>assistant{{ .Thinking }}{{ .Response }}"
)
EMBEDDINGS = "this model does not support embeddings: it generates text"
MANAGED = "this server runs the models of `mlx-gptoss serve --model`: it cannot create, copy or remove models"
REFUSED = {  # method and path -> why
    ("POST", "/api/embed"): EMBEDDINGS,
    ("POST", "/api/embeddings"): EMBEDDINGS,
    ("DELETE", "/api/delete"): MANAGED,
    ("POST", "/api/create"): MANAGED,
    ("POST", "/api/copy"): MANAGED,
    ("POST", "/api/push"): MANAGED,
    ("POST", "/api/blobs/{digest}"): MANAGED,
}

router: APIRouter = APIRouter(route_class=BodyRoute, responses=ERROR_RESPONSES)


class ModelRequest(RequestModel):
    """The name of a model. `name` is the older spelling of `model`."""

    model: Name | None = None
    name: Name | None = None


class PullRequest(ModelRequest):
    """stream: lines, by default, or one object. insecure: there is no download that it could apply to."""

    stream: bool | None = None
    insecure: bool | None = None


@router.get("/api/version")
async def version() -> Response:
    """The version of Ollama whose API this server has."""
    return JsonResponse({"version": VERSION})


@router.get("/api/tags")
async def tags(service: ServiceDep) -> Response:
    """List all models, each under each of its names."""
    models = []
    for each in service.each_model():
        about = {
            "modified_at": timestamp(service.created * 10**9),
            "size": size_bytes(each.model),
            "digest": _digest(each),
            "details": _details(each),
            "capabilities": CAPABILITIES,
        }
        models += [{"name": name, "model": name, **about} for name in listed_names(each)]
    return JsonResponse({"models": models})


@router.get("/api/ps")
async def ps(service: ServiceDep) -> Response:
    """List the loaded models, with the memory that each is planned to take."""
    models = []
    for each in service.each_model():
        if each.model.plan is not None and each.selected.state == "loaded":
            name, needed = listed_names(each)[0], each.model.plan.needed_bytes
            about = {
                "size": needed,
                "size_vram": needed,
                "digest": _digest(each),
                "details": _details(each),
                "expires_at": _expires_at(each),
                "context_length": each.model.max_context,
            }
            models.append({"name": name, "model": name, **about})
    return JsonResponse({"models": models})


@router.post("/api/show")
async def show(body: ModelRequest, request: Request, service: ServiceDep) -> Response:
    """Describe a model: capabilities, sizes and default options."""
    ignore(request, body.ignored_fields())
    service = service.having(service.find(body.model or body.name))
    name = body.model or body.name or listed_names(service)[0]
    parameters = _parameters(service)
    return JsonResponse(
        {
            "modelfile": "\n".join([f"FROM {name}", *(f"PARAMETER {line}" for line in parameters)]),
            "parameters": "\n".join(parameters),
            "template": TEMPLATE,
            "system": "",
            "license": "",
            "details": _details(service),
            "model_info": _model_info(service, name),
            "capabilities": CAPABILITIES,
            "modified_at": timestamp(service.created * 10**9),
        }
    )


@router.post("/api/pull", responses=STREAMING_RESPONSES)
async def pull(body: PullRequest, request: Request, service: ServiceDep) -> Response:
    """Report success for every name that answers. Clients pull a model that /api/tags does not list."""
    ignore(request, body.ignored_fields() | ({"insecure"} if body.insecure else set()))
    service.find(body.model or body.name)
    if body.stream is False:
        return JsonResponse({"status": "success"})
    lines = [{"status": "pulling manifest"}, {"status": "success"}]
    return Response(b"".join(map(encode_line, lines)), media_type=MEDIA_TYPE)


def _expires_at(service: Service) -> str:
    """When the model is unloaded if no request comes."""
    pool = service.pool
    if pool is None or pool.idle_unload_s is None or not isinstance(service.model, RemoteModel):
        return NEVER
    return timestamp(time.time_ns() + round((service.model.used_at - time.monotonic() + pool.idle_unload_s) * 1e9))


def _refuse(message: str) -> Any:
    async def refuse() -> Response:
        """Not served: 400, with the reason."""
        raise ApiError(400, message, code="unsupported")

    return refuse


for (_method, _path), _message in REFUSED.items():
    router.add_api_route(_path, _refuse(_message), methods=[_method], include_in_schema=False)


def listed_names(service: Service) -> list[str]:
    """The names in /api/tags, each with a tag, as Open WebUI compares them.

    A gpt-oss of a published size also has its name in Ollama's library, which clients such as Codex look for, where
    that name gets an answer of this model.
    """
    names = [_tagged(name) for name in service.names]
    config = service.model.config
    family = FAMILY_NAMES.get((config.num_hidden_layers, config.num_local_experts))
    if family is not None and service.answers_to(family):
        names.append(family)
    return list(dict.fromkeys(names))


def _tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _digest(service: Service) -> str:
    """A stable id in the form of Ollama's: of the model's name, format and sizes, not of its weights."""
    identity = f"{service.model_id} {service.model.format} {service.model.config}"
    return hashlib.sha256(identity.encode(errors="replace")).hexdigest()


def _details(service: Service) -> dict[str, Any]:
    return {
        "parent_model": _tagged(service.selected.base) if service.selected.base else "",
        "format": file_format(service.model),
        "family": FAMILY,
        "families": [FAMILY],
        "parameter_size": parameter_size(service.model),
        "quantization_level": quantization(service.model),
        "context_length": service.model.max_context,
        "embedding_length": service.model.config.hidden_size,
    }


def _parameters(service: Service) -> list[str]:
    """The default options, one "name value" each."""
    sampling = service.model.default_sampling
    values = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "num_ctx": service.model.max_context,
    }
    return [f"{name:<30} {value:g}" for name, value in values.items()]


def _model_info(service: Service, name: str) -> dict[str, Any]:
    """The sizes under the keys of GGUF. The context length is that of this server. VS Code shows the basename."""
    config = service.model.config
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": service.model.max_context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.yarn.theta,
        "vocab_size": config.vocab_size,
    }
    return {
        "general.architecture": FAMILY,
        "general.basename": name,
        "general.parameter_count": parameter_count(service.model),
        **{f"{FAMILY}.{key}": value for key, value in sizes.items()},
    }
