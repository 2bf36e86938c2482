"""torchao, through transformers: tensor subclasses in safetensors, decoded by torchao itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import base

NAME = "torchao"


def version() -> str | None:
    return base.version_of("torchao")


def _config(name: str) -> Any:
    import torch
    import torchao.prototype.mx_formats as mx
    import torchao.quantization as q

    return {
        "int8": lambda: q.Int8WeightOnlyConfig(),
        "intx4": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
        "intx8": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=q.PerGroup(32)),
        "float8": lambda: q.Float8WeightOnlyConfig(),
        "ao-nvfp4": lambda: mx.NVFP4WeightOnlyConfig(),
    }[name]()


def _decoded(tensor: Any) -> np.ndarray:
    """float32, also where the class would round to the dtype of the model."""
    import torch

    try:
        found = tensor.dequantize(torch.float32)
    except TypeError:
        if tensor.scale.dtype == torch.bfloat16:
            tensor.scale = tensor.scale.float()
        if hasattr(tensor, "dtype") and tensor.dequantize().dtype != torch.float32:
            parts = [getattr(tensor, name) for name in tensor.tensor_data_names]
            tensor = type(tensor)(
                *parts, tensor.target_dtype, tensor.block_size, torch.float32, tensor.activation_quantization
            )
        found = tensor.dequantize()
    return found.float().numpy()


def _make(source: Path, folder: Path, name: str) -> base.Weights:
    import torch
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    from transformers import GptOssForCausalLM, TorchAoConfig

    config = TorchAoConfig(_config(name))
    GptOssForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        tensors, _ = unflatten_tensor_state_dict(stored, file.metadata())
    return base.by_parameter(
        {
            key: value.float().numpy() if type(value) is torch.Tensor else _decoded(value)
            for key, value in tensors.items()
        }
    )


ROWS = tuple(
    base.Row(what, {case: partial(_make, name=case) for case in cases})
    for what, cases in {
        "Int8WeightOnlyConfig, attention": ["int8"],
        "IntxWeightOnlyConfig, 4 and 8 bits, attention": ["intx4", "intx8"],
        "Float8WeightOnlyConfig, attention": ["float8"],
        "NVFP4WeightOnlyConfig, attention": ["ao-nvfp4"],
    }.items()
)
