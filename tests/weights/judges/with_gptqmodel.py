"""GPTQModel's quantizer, with a little calibration, decoded by its own layers in float32.

It cuts the fused matrix of gate and up, whose rows alternate, in halves, and calls them gate_proj and up_proj. They are
joined again here, and every matrix is compared with the model that was quantized.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np

from . import base

NAME = "GPTQModel"
MIN_CORRELATION = 0.9  # of quantized weights with their originals; of rows in another order it is about 0


def version() -> str | None:
    return base.version_of("gptqmodel")


def _make(source: Path, folder: Path, bits: int, group: int, symmetric: bool, reorder: bool) -> base.Weights:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # half of the cores by default, and its loader wants two
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=group, sym=symmetric, desc_act=reorder, device="cpu")
    model = GPTQModel.load(str(source), config)
    model.quantize(base.plain_text(16), batch_size=4)
    model.save(str(folder))
    loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)  # keeps the scales
    return _decoded(source, folder, loaded)


def _decoded(source: Path, folder: Path, loaded) -> base.Weights:
    import torch
    from safetensors.torch import load_file

    modules = {}
    for name, layer in loaded.model.named_modules():
        if hasattr(layer, "dequantize_weight") and hasattr(layer, "qweight"):
            layer.scales = layer.scales.float()
            with torch.no_grad():
                modules[name] = layer.dequantize_weight().float().T.numpy()
    original = base.by_parameter(base.load(source))
    stored = {k: v.float().numpy() for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    found = base.with_biases(base.of_modules(modules), stored)
    for layer in range(base.LAYERS):
        for part in ("weight", "bias"):
            gate, up = (f"layers.{layer}.experts.{which}.{part}" for which in ("gate", "up"))
            rows = np.concatenate([found[gate], found[up]], axis=1)
            found |= {gate: rows[:, ::2], up: rows[:, 1::2]}
    for name, values in found.items():
        if np.corrcoef(values.ravel(), original[name].astype(np.float32).ravel())[0, 1] < MIN_CORRELATION:
            raise ValueError(f"{name} is not what was quantized")
    return original | found


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
