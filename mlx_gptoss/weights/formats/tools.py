"""Quantization tools whose files are not read: who wrote a checkpoint, and what its user can do.

The tensors decide whether a checkpoint is read. These names explain a refusal: they are looked up where tensors are
missing, unknown or of another kind. Sources: transformers' AUTO_QUANTIZATION_CONFIG_MAPPING and ExLlama.
"""

from __future__ import annotations

from collections.abc import Mapping

from .base import CheckpointHeaders
from .per_expert import quantization_config

# quant_method in config.json -> the tool, or the format, in its own words
NOT_READ: Mapping[str, str] = {
    "aqlm": "AQLM",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2 (EXL2)",
    "exl3": "ExLlamaV3 (EXL3)",
    "fbgemm_fp8": "FBGEMM's FP8",
    "fouroversix": "Four Over Six",
    "fp8": "transformers' fine-grained FP8",
    "fp_quant": "FP-Quant",
    "gemma": "Gemma's quantization-aware training",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "metal": "transformers' Metal kernels",
    "mxfp8": "transformers' MXFP8",
    "nvfp4": "transformers' NVFP4",
    "quanto": "Quanto",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "vptq": "VPTQ",
}
# What tensor names end in that only one of these tools writes, for a config.json that is silent.
_ENDINGS: Mapping[str, str] = {
    ".W_q": "hqq",
    ".codebooks": "aqlm",
    ".dense_weights": "spqr",
    ".indices": "vptq",
    ".q_invperm": "exl2",
    ".qbiases": "metal",
    ".tables2": "higgs",
    ".trellis": "exl3",
    ".weight._data": "quanto",
    ".weight_scale_inv": "fp8",
    ".weight_scales": "eetq",
    "_proj_scale_inv": "fp8",
}
_MODELOPT = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "MXFP8",
    "NVFP4_AWQ",
    "W4A16_AWQ",
    "W4A8_AWQ",
    "MIXED_PRECISION",
)
_ADVICE = (
    "use the model's MXFP4, bfloat16 or GGUF checkpoint, or quantize it with one of the tools that README's table of "
    "formats lists"
)


def refusal(headers: CheckpointHeaders) -> str | None:
    """Why a checkpoint that does not bind is not read and what to do, if it comes from a tool known here; else None."""
    method = _method(headers)
    if method is None:
        return None
    return f"this checkpoint was quantized with {method}, whose files are not read: {_ADVICE}"


def _method(headers: CheckpointHeaders) -> str | None:
    """The tool by config.json, or else by the names of tensors."""
    block = quantization_config(headers)
    method = block.get("quant_method")
    if method == "modelopt":
        algorithm = block.get("quant_algo")
        return f"ModelOpt's {algorithm}" if algorithm in _MODELOPT else None
    if isinstance(method, str) and method:
        return f"{NOT_READ[method]} (quant_method {method!r})" if method in NOT_READ else None
    found = next((t for name in headers.tensors for end, t in _ENDINGS.items() if name.endswith(end)), None)
    return f"{NOT_READ[found]} (by the names of its tensors)" if found else None
