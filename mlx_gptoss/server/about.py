"""What the APIs of other servers tell about a model: names, sizes and format of the loaded one."""

from __future__ import annotations

from ..weights.params import parameters
from .models.named import ServedModel
from .models.remote import RemoteModel

ARCHITECTURE = "gpt-oss"


def parameter_count(model: ServedModel) -> int:
    """The number of weights, embeddings included."""
    return sum(param.size for param in parameters(model.config))


def parameter_size(model: ServedModel) -> str:
    """The number of weights as people say it: "20.9B"."""
    count = parameter_count(model)
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def quantization(model: ServedModel) -> str:
    """The checkpoint's format in capitals: "MXFP4"."""
    return model.format.upper()


def size_bytes(model: ServedModel) -> int:
    """The size of the weights."""
    return model.size_bytes if isinstance(model, RemoteModel) else model.plan.weights_bytes


def file_format(model: ServedModel) -> str:
    """The kind of the checkpoint's files: "gguf" or "safetensors"."""
    return "gguf" if model.format == "gguf" else "safetensors"
