"""GPTQModel's quantizer, with a little calibration, decoded by its own layers in float32."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from . import base

NAME = "GPTQModel"


def version() -> str | None:
    return base.version_of("gptqmodel")


def _make(source: Path, folder: Path, bits: int, group: int, symmetric: bool, reorder: bool) -> base.Weights:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # half of the cores by default, and its loader wants two
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=group, sym=symmetric, desc_act=reorder, device="cpu")
    model = GPTQModel.load(str(source), config)
    model.quantize(base.plain_text(16), batch_size=4)
    model.save(str(folder))
    return _decoded(source, GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH))


def _decoded(source: Path, loaded) -> base.Weights:
    import torch

    modules = {}
    for name, layer in loaded.model.named_modules():
        if hasattr(layer, "dequantize_weight") and hasattr(layer, "qweight"):
            layer.scales = layer.scales.float()
            with torch.no_grad():
                modules[name] = layer.dequantize_weight().float().T.numpy()
    return base.by_parameter(base.load(source)) | base.of_modules(modules)


ROWS = (
    base.Row(
        "GPTQ, 4 bits, groups of 128",
        {
            "gptq-4bit": partial(_make, bits=4, group=128, symmetric=True, reorder=False),
            "gptq-4bit-asym": partial(_make, bits=4, group=128, symmetric=False, reorder=False),
        },
    ),
    base.Row(
        "GPTQ, 4 bits, reordered (desc_act)",
        {"gptq-4bit-act": partial(_make, bits=4, group=128, symmetric=True, reorder=True)},
    ),
    base.Row(
        "GPTQ, 8 bits, groups of 128", {"gptq-8bit": partial(_make, bits=8, group=128, symmetric=True, reorder=False)}
    ),
)
