"""compressed-tensors, the library under llm-compressor and vLLM: every module compressed and decompressed by it.

Scales are those of the tool's min-max observer. Decompression runs in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import base

NAME = "compressed-tensors"


def version() -> str | None:
    return base.version_of("compressed-tensors")


def _range(weight: Any, args: Any) -> tuple[Any, Any]:
    """The minima and maxima of what shares a scale, in the shape of the scales."""
    rows, width = weight.shape
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy in ("tensor", "tensor_group") and args.group_size is None:
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "block":
        height, breadth = args.block_structure
        blocks = weight.reshape(rows // height, height, width // breadth, breadth)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.reshape(rows, -1, args.group_size or width)
    return groups.amin(-1), groups.amax(-1)


def scheme_of(name: str, **changes: Any) -> Any:
    """A preset scheme, with other arguments for its weights."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"])
    for key, value in changes.items():
        setattr(scheme.weights, key, value)
    return scheme


def compress(weight: np.ndarray, scheme: Any, kind: str) -> tuple[dict[str, Any], Any]:
    """The compressed parts of a module's weight [N, K], and the same decompressed in float32, as torch tensors."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = scheme.weights
    values = torch.from_numpy(weight.astype(np.float32)).bfloat16()
    low, high = _range(values, args)
    state: dict[str, Any] = {"weight": values}
    factor = None
    if str(getattr(args.strategy, "value", args.strategy)) == "tensor_group":
        factor = state["weight_global_scale"] = generate_gparam(values.float().min(), values.float().max())
    scale, zero = calculate_qparams(low, high, args, factor)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    inputs = scheme.input_activations
    if inputs is not None and inputs.dynamic is not True:
        name = "input_scale" if inputs.dynamic is False else "input_global_scale"
        state[name] = torch.ones(1)
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(state, scheme)
    if kind == "nvfp4-pack-quantized":  # whose decompressor rounds to bfloat16
        codes = unpack_fp4_from_uint8(stored["weight_packed"], *weight.shape, dtype=torch.float32)
        scale, factor = stored["weight_scale"].float(), stored["weight_global_scale"]
        return stored, dequantize(codes, scale, args=args, global_scale=factor, dtype=torch.float32)
    wide = {name: part.float() if part.dtype == torch.bfloat16 else part for name, part in stored.items()}
    return stored, compressor.decompress(wide, scheme)["weight"].float()


def _make(source: Path, folder: Path, scheme: Callable[[], Any], experts: bool = True) -> base.Weights:
    import torch
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
    from safetensors.torch import save_file

    chosen = scheme()
    kind = infer_module_format(torch.nn.Linear, chosen).value
    left = base.per_expert(source) if experts else base.load(source)
    tensors = {n: torch.from_numpy(v.view(np.int16)).view(torch.bfloat16) for n, v in left.items()}
    decoded = {}
    for module, weight in base.modules_of(source, experts).items():
        stored, found = compress(weight, chosen, kind)
        tensors |= {f"{module}.{part}": value.contiguous() for part, value in stored.items()}
        decoded[module] = found.numpy()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ignored = [f"model.layers.{n}.mlp.router" for n in range(base.LAYERS)] + ["lm_head"]
    config = QuantizationConfig(
        config_groups={"group_0": chosen},
        format=kind,
        ignore=ignored,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    base.write_config(folder, config.model_dump(mode="json") | {"version": version()})
    return base.by_parameter(base.load(source)) | base.of_modules(decoded)


def _case(name: str, experts: bool = True, **changes: Any) -> base.Make:
    return partial(_make, scheme=partial(scheme_of, name, **changes), experts=experts)


ROWS = (
    base.Row("FP8_DYNAMIC, a scale per row", {"fp8-dynamic": _case("FP8_DYNAMIC")}),
    base.Row("FP8, a scale per tensor", {"fp8": _case("FP8")}),
    base.Row("FP8_BLOCK, a scale per 128 by 128", {"fp8-block": _case("FP8_BLOCK")}),
    base.Row("NVFP4, NVFP4A16", {"nvfp4a16": _case("NVFP4A16"), "ct-nvfp4": _case("NVFP4")}),
    base.Row("MXFP4, MXFP4A16", {"mxfp4a16": _case("MXFP4A16"), "ct-mxfp4": _case("MXFP4")}),
    base.Row("MXFP8, MXFP8A16", {"mxfp8a16": _case("MXFP8A16"), "ct-mxfp8": _case("MXFP8")}),
    base.Row("MXFP6A16", {"mxfp6a16": _case("MXFP6A16")}),
    base.Row(
        "W4A16, symmetric, groups of 32, 64 and 128",
        {f"w4a16-g{group}": _case("W4A16", group_size=group) for group in (128, 64, 32)},
    ),
    base.Row(
        "W4A16_ASYM, groups of 32, 64 and 128",
        {f"w4a16-asym-g{group}": _case("W4A16_ASYM", group_size=group) for group in (128, 64, 32)},
    ),
    base.Row("W8A16, groups of 128", {"w8a16": _case("W8A16")}),
    base.Row("INT8 (W8A8), a scale per row", {"w8a8": _case("INT8")}),
)
