"""What the Hugging Face layouts share: tensor names, fused gate and up projections, dense tensors and biases.

A fused `gate_up_proj` interleaves its rows: even rows belong to the gate projection, odd rows to the up projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .. import codecs
from ..params import Param
from ..safetensors import TensorInfo
from ..tensor import Array, Weight
from .base import Encoder, TensorSlice, Unit

HF_DENSE = "hf-dense"  # the family of a dense tensor under its Hugging Face name, which most formats share

_PARTS = ("weight", "bias")
_HF_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention.sinks": "self_attn.sinks",
    **{f"attention.{x}.{part}": f"self_attn.{x}_proj.{part}" for x in "qkvo" for part in _PARTS},
    **{f"router.{part}": f"mlp.router.{part}" for part in _PARTS},
    **{f"experts.{x}.{part}": f"mlp.experts.{x}_proj.{part}" for x in ("gate", "up", "down") for part in _PARTS},
}


def hf_name(param: Param) -> str:
    """The Hugging Face name of a parameter, such as `model.layers.3.self_attn.q_proj.weight`.

    Experts get the names that MLX uses, such as `model.layers.3.mlp.experts.gate_proj.weight`; Hugging Face fuses gate
    and up into one tensor.
    """
    name = _HF_NAMES[param.kind]
    return name if param.layer is None else f"model.layers.{param.layer}.{name}"


def experts_prefix(param: Param) -> str:
    """The prefix of a layer's expert tensors: `model.layers.3.mlp.experts.`"""
    return f"model.layers.{param.layer}.mlp.experts."


def fused_rows(part: str) -> slice:
    """The rows of a fused gate_up tensor that belong to "gate" (even) or "up" (odd); all rows for "down"."""
    return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}.get(part, slice(None))


def fused_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape of gate and up together: `shape` with `axis` doubled."""
    return (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])


def dense_unit(param: Param, dtypes: Mapping[str, str], name: str) -> Unit:
    """A parameter written as one float tensor: matrices as bfloat16, vectors in the dtype that `dtypes` gives."""
    info = TensorInfo(name, dtypes.get(param.name, "BF16"), param.shape)

    def encode(weights: Sequence[Weight]) -> Encoder:
        return lambda start, stop: [(name, start, _to_dtype(weights[0][start:stop], info.dtype))]

    return Unit((param,), (info,), encode)


def fused_units(
    params: Sequence[Param], dtypes: Mapping[str, str], expert_unit: Callable[[tuple[Param, ...]], Unit]
) -> list[Unit]:
    """The units of a layout with fused experts.

    expert_unit: returns the unit of expert matrices, for (gate, up) or for (down,). Their biases are fused in the same
        way; all other parameters are dense tensors under their Hugging Face names.
    """
    units = []
    by_name = {param.name: param for param in params}
    for param in params:
        part = param.kind.split(".")[1] if param.role == "experts" else ""
        if part == "up":
            continue  # written with gate
        fused = (param, by_name[param.name.replace(".gate.", ".up.")]) if part == "gate" else (param,)
        if not part:
            units.append(dense_unit(param, dtypes, hf_name(param)))
        elif param.is_matrix:
            units.append(expert_unit(fused))
        else:
            units.append(_bias_unit(fused, dtypes))
    return units


def _bias_unit(params: tuple[Param, ...], dtypes: Mapping[str, str]) -> Unit:
    """`gate_up_proj_bias` [E, 2I] of (gate, up), or `down_proj_bias` [E, H] of (down,)."""
    name = experts_prefix(params[0]) + ("gate_up_proj_bias" if len(params) == 2 else "down_proj_bias")
    dtype = max((dtypes.get(param.name, "BF16") for param in params), key=("BF16", "F32").index)
    info = TensorInfo(name, dtype, (params[0].shape[0], sum(param.shape[1] for param in params)))

    def encode(weights: Sequence[Weight]) -> Encoder:
        def encode_rows(start: int, stop: int) -> list[TensorSlice]:
            parts = [_to_dtype(weight[start:stop], dtype) for weight in weights]
            return [(name, start, np.stack(parts, axis=-1).reshape(stop - start, -1))]

        return encode_rows

    return Unit(params, (info,), encode)


def _to_dtype(weight: Weight, dtype: str) -> Array:
    """The values as bfloat16 for "BF16", else as float32."""
    return codecs.to_bfloat16(weight) if dtype == "BF16" else codecs.dequantize(weight)
