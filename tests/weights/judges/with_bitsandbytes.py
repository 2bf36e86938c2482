"""bitsandbytes' 4-bit types, as transformers saves them (attention) and as Unsloth does (a module for each expert too).

Its functions quantize and decode every module, in float32.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from . import base

NAME = "bitsandbytes"


def version() -> str | None:
    return base.version_of("bitsandbytes")


def _quantize(weight: np.ndarray, kind: str, nested: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The stored parts of a matrix [N, K], by the ending of their names, and the decoded matrix."""
    import torch
    from bitsandbytes import functional

    values = torch.from_numpy(weight.astype(np.float32))
    codes, state = functional.quantize_4bit(values, quant_type=kind, compress_statistics=nested)
    parts = {f".{name}": value.numpy() for name, value in state.as_dict(packed=True).items()}
    return {"": codes.numpy(), **parts}, functional.dequantize_4bit(codes, state).numpy()


def _make(source: Path, folder: Path, kind: str, nested: bool, experts: bool) -> base.Weights:
    tensors = base.load(source)
    decoded = {name: values.astype(np.float32) for name, values in tensors.items()}
    for name in list(tensors):
        if name.endswith("_proj.weight"):
            parts, decoded[name] = _quantize(tensors.pop(name), kind, nested)
            tensors |= {f"{name}{ending}": values for ending, values in parts.items()}
        elif experts and name.endswith(("gate_up_proj", "down_proj")):
            biases = tensors.pop(f"{name}_bias")
            for expert, weight in enumerate(tensors.pop(name)):
                module = f"{name}s.{expert}"
                parts, found = _quantize(np.ascontiguousarray(weight.T), kind, nested)
                decoded[name][expert] = found.T
                tensors |= {f"{module}.weight{ending}": values for ending, values in parts.items()}
                tensors[f"{module}.bias"] = biases[expert]
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    base.write(folder, tensors, config | {"bnb_4bit_use_double_quant": nested})
    return base.by_parameter(decoded)


def _row(kind: str, what: str, experts: bool) -> base.Row:
    prefix = f"{kind}-experts" if experts else kind
    cases = {f"{prefix}{'-double' * nested}": partial(_make, kind=kind, nested=nested, experts=experts)
             for nested in (True, False)}  # fmt: skip
    return base.Row(f"{kind.upper()}, with and without double quantization, {what}", cases)


ROWS = tuple(
    _row(kind, what, experts)
    for experts, what in ((False, "attention (transformers)"), (True, "and experts (Unsloth's layout)"))
    for kind in ("nf4", "fp4")
)
