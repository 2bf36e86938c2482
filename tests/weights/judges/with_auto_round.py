"""AutoRound's export, rounded to nearest, decoded by AutoRound's own layer in float32."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import base

NAME = "auto-round"


def version() -> str | None:
    return base.version_of("auto-round")


def _make(source: Path, folder: Path, form: str = "auto_round", **scheme: Any) -> base.Weights:
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tool = AutoRound(
        model, AutoTokenizer.from_pretrained(source), iters=0, disable_opt_rtn=True, device_map="cpu", **scheme
    )
    work = folder.with_suffix(".made")
    tool.quantize_and_save(str(work), format=form)
    shutil.move(next(work.rglob("config.json")).parent, folder)
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return _decoded(source, tensors, config)


def _decoded(source: Path, tensors: dict[str, Any], config: dict[str, Any]) -> base.Weights:
    """config: the file's quantization_config, whose `packing_format` names the layer."""
    modules = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        parts = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
        dequantize = _dequantize_awq if config["packing_format"] == "auto_round:auto_awq" else _dequantize_gptq
        modules[module] = dequantize(*parts, config).float().T.numpy()
    arrays = {name: value.float().numpy() for name, value in tensors.items() if name.endswith(".bias")}
    weights = base.by_parameter(base.load(source)) | base.of_modules(modules)
    return base.with_biases(weights, {name: values.astype(np.float32) for name, values in arrays.items()})


def _dequantize_awq(qweight: Any, qzeros: Any, scales: Any, config: dict[str, Any]) -> Any:
    """[K, N] of a module in AWQ's packing, by the function of AutoRound's layer for it."""
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    return dequantize_gemm(qweight, qzeros, scales.float(), config["bits"], config["group_size"])


def _dequantize_gptq(qweight: Any, qzeros: Any, scales: Any, config: dict[str, Any]) -> Any:
    """[K, N] of a module in GPTQ's packing, whose zero points are stored less one if `packing_format` says so."""
    import torch
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    less_one = "auto_gptq" in config["packing_format"]
    layer_type = (qlinear_torch_zp if less_one else qlinear_torch).QuantLinear
    width, rows = qweight.shape[0] * 32 // config["bits"], qweight.shape[1]
    layer = layer_type(config["bits"], config["group_size"], width, rows, False)
    layer.qweight, layer.qzeros, layer.scales = qweight, qzeros, scales.float()
    layer.post_init()
    with torch.no_grad():  # rows of the identity select the columns
        return layer(torch.eye(width))


def _row(what: str, *cases: tuple[int, int, bool]) -> base.Row:
    return base.Row(what, {
        f"autoround-{'sym' if sym else 'asym'}-w{bits}-g{group}": partial(_make, bits=bits, group_size=group, sym=sym)
        for bits, group, sym in cases})  # fmt: skip


ROWS = (
    _row("4 bits, symmetric, groups of 64, experts", (4, 64, True)),
    _row("4 bits, groups of 32 and 128, symmetric or not, experts", (4, 128, False), (4, 128, True), (4, 32, False)),
    _row("8 bits, symmetric, groups of 128, experts", (8, 128, True)),
)
