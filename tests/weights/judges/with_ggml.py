"""ggml, llama.cpp's library: its own quantizer of every type, decoded by its own `to_float`.

It is found in llama-cpp-python, or in the folder that LLAMA_CPP_LIB_PATH names. Q2_0 has no row, because the gguf
package cannot write it yet; test_gguf_llama_cpp.py compares its values.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache, partial
from pathlib import Path

import numpy as np

from . import base, with_gguf

NAME = "ggml"
NUMBERS = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23,
    "IQ1_M": 29, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40, "Q1_0": 41, "Q2_0": 42,
}  # fmt: skip


class _Traits(ctypes.Structure):
    """The start of `struct ggml_type_traits` (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("llama_cpp")
    folders = [Path(os.environ["LLAMA_CPP_LIB_PATH"])] if "LLAMA_CPP_LIB_PATH" in os.environ else []
    if spec is not None and spec.origin:
        folders.append(Path(spec.origin).parent / "lib")
    names = [folder / f"libggml-base.{ending}" for folder in folders for ending in ("so", "dylib")]
    path = next((path for path in names if path.exists()), None)
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    library.ggml_version.restype = library.ggml_commit.restype = ctypes.c_char_p
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def version() -> str | None:
    library = _library()
    return None if library is None else library.ggml_version().decode()


def quantize(values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., N, K] as blocks uint8 [..., N, bytes], and those decoded. All columns are equally important."""
    library = _library()
    traits = library.ggml_get_type_traits(NUMBERS[kind]).contents
    assert traits.type_name.decode().lower() == kind.lower() and traits.is_quantized
    flat = np.ascontiguousarray(values.reshape(-1, values.shape[-1]), np.float32)
    rows, width = flat.shape
    size = width // traits.blck_size * traits.type_size
    blocks, decoded = np.zeros((rows, size), np.uint8), np.empty_like(flat)
    importance = np.ones(width, np.float32)
    pointer = ctypes.c_void_p
    made = library.ggml_quantize_chunk(
        ctypes.c_int(NUMBERS[kind]), pointer(flat.ctypes.data), pointer(blocks.ctypes.data), ctypes.c_int64(0),
        ctypes.c_int64(rows), ctypes.c_int64(width), pointer(importance.ctypes.data),
    )  # fmt: skip
    assert made == blocks.nbytes
    for row in range(rows):
        traits.to_float(blocks[row].ctypes.data, decoded[row].ctypes.data, width)
    return blocks.reshape(*values.shape[:-1], size), decoded.reshape(values.shape)


def _make(source: Path, folder: Path, kind: str) -> base.Weights:
    """The experts of the second layer and the attention of both in this type, the rest in float32."""
    weights, tensors = with_gguf.source_weights(source), {}
    for name, values in weights.items():
        own = with_gguf.is_matrix(name) and ("attention" in name or name.startswith("layers.1.experts"))
        if own:
            tensors[name], weights[name] = quantize(values, kind)
        else:
            tensors[name] = values
    types = {name: (values, kind if values.dtype == np.uint8 else "F32") for name, values in tensors.items()}
    with_gguf.write(folder / "model.gguf", types)
    return weights


def _row(what: str, *kinds: str) -> base.Row:
    return base.Row(", ".join(kinds) + what, {f"ggml-{kind.lower()}": partial(_make, kind=kind) for kind in kinds})


ROWS = (
    _row("", "MXFP4"),
    _row("", "NVFP4", "Q8_0", "Q4_0", "Q4_1", "Q4_K"),
    _row("", "TQ2_0"),
    _row("", "Q5_0", "Q5_1", "Q5_K"),
    _row("", "Q2_K", "Q3_K", "Q6_K", "IQ1_M", "IQ2_XS", "IQ2_S"),
    _row("", "IQ2_XXS", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    _row("", "IQ1_S"),
    _row("", "TQ1_0"),
    _row("", "Q1_0"),
)
