"""The integer schemes of compressed-tensors, as llm-compressor writes them. fp8.py finds their modules.

`pack-quantized` (W4A16, W8A16 and other bits): `.weight_packed` I32 [N, K * bits / 32], codes along K, lowest bits
first; `.weight_scale` [N, groups], [N, 1] or [1]; `.weight_shape` I64 [2]; for asymmetric codes `.weight_zero_point`
I32 [N * bits / 32, groups], along N. A code is the integer plus 2^(bits - 1). `.weight_g_idx` I32 [K] has the group of
each column (act-order, before release 0.20); -1 throughout means the columns are in order.

`int-quantized` (W8A8, W4A8): `.weight` I8 [N, K], with zero points of the scales' shape, as signed integers.

w = (integer - zero) * scale. Activations stay unquantized here. Source: compressed-tensors 0.20.1
(compressors/pack_quantized, quantization/lifecycle/forward_helpers.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...errors import CheckpointError
from .. import codecs
from ..params import Param
from ..tensor import Array
from .base import FLOATS, CheckpointHeaders, ExpectedTensor, GetTensor, Source
from .integers import ROW, Layout, Rows, Scheme, column_groups, find_layout, integer_entry, integer_source
from .per_expert import Modules, quantization_config, same_float_dtype

_ADVICE = "compress the model with llm-compressor's preset W4A16 or W8A16, or use the original checkpoint"
_SIGN = np.uint8(0x80)  # from a signed byte to the byte plus 128


def integer_weights(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source | None:
    """The Source of a matrix in one of the two schemes; None if the module has neither."""
    if headers.dtype(f"{modules.first}.weight_packed") == "I32":
        return _source(modules, param, headers, "pack-quantized")
    if headers.dtype(f"{modules.first}.weight") == "I8":
        return _source(modules, param, headers, "int-quantized")
    return None


def _source(modules: Modules, param: Param, headers: CheckpointHeaders, family: str) -> Source:
    module, (rows, width) = modules.first, param.shape[-2:]
    packed = family == "pack-quantized"
    scales = f"{module}.weight_scale"
    shape = headers.shape(scales)
    per_tensor = shape in ((), (1,))
    bits = _bits(module, rows, width, headers) if packed else None
    asymmetric = headers.has(f"{module}.weight_zero_point")
    layout = find_layout(
        module, bits, 1 if per_tensor else shape[-1], width, _schemes(module, headers, asymmetric and packed),
        asymmetric=asymmetric, any_order=headers.has(f"{module}.weight_g_idx"),
    )  # fmt: skip
    if asymmetric and layout.symmetric:
        layout = Layout(layout.bits, width, layout.group, False, layout.any_order)
    if asymmetric and packed and rows * layout.bits % 32:
        raise CheckpointError(
            f"{module} has {rows} rows of {layout.bits} bits, which do not fill whole words: {_ADVICE}"
        )
    expected = _expected(modules, layout, rows, width, headers, packed=packed)
    block = quantization_config(headers)

    def readers(get: GetTensor) -> Rows:
        def codes(name: str) -> Array:
            if not packed:
                signed: Array = get(f"{name}.weight").view(np.uint8) ^ _SIGN
                return signed
            _check_shape(get(f"{name}.weight_shape"), (rows, width), f"{name}.weight_shape")
            return np.ascontiguousarray(get(f"{name}.weight_packed")).view(np.uint8)

        def scale(name: str) -> Array:
            return np.broadcast_to(get(f"{name}.weight_scale").reshape(-1, layout.groups), (rows, layout.groups))

        def zeros(name: str) -> Array:
            stored = get(f"{name}.weight_zero_point")
            if packed:
                along = codecs.contiguous_rows(stored.T).view(np.uint8)
                points: Array = codecs.unpack(along, layout.bits).T
                return points
            return np.broadcast_to(
                stored.reshape(-1, layout.groups).astype(np.int16) + layout.middle, (rows, layout.groups)
            )

        def order(name: str) -> Array:
            stored = get(f"{name}.weight_g_idx")
            unused = bool((stored == -1).all())
            return layout.default_order() if unused else column_groups(stored, layout, f"{name}.weight_g_idx")

        return Rows(codes, scale, zeros if asymmetric else None, order if layout.any_order else None)

    note = _activations(block)
    return integer_source(modules, param, family, layout, expected, scales, headers, readers, note)


def _bits(module: str, rows: int, width: int, headers: CheckpointHeaders) -> int:
    """Bits per code by the shape of `.weight_packed`. Raises CheckpointError if it has none."""
    words = headers.shape(f"{module}.weight_packed")
    if len(words) != 2 or words[0] != rows or not words[1] or words[1] * 32 % width:
        raise CheckpointError(
            f"{module}.weight_packed is of a wrong shape: {list(words)} holds no [{rows}, {width}] codes of whole bits "
            "(compressed-tensors 0.14 padded words of 3, 5, 6 and 7 bits, which is not supported)"
        )
    return words[1] * 32 // width


def _expected(
    modules: Modules, layout: Layout, rows: int, width: int, headers: CheckpointHeaders, *, packed: bool
) -> list[ExpectedTensor]:
    """The tensors of every module."""
    module = modules.first
    shape = headers.shape(f"{module}.weight_scale")
    scales = shape if shape in ((), (1,)) else (rows, layout.groups)
    expected = modules.expected("weight_scale", same_float_dtype(headers, f"{module}.weight_scale"), scales)
    if packed:
        expected += modules.expected("weight_packed", ("I32",), (rows, width * layout.bits // 32))
        expected += modules.expected("weight_shape", ("I64", "I32"), (2,))
    else:
        expected += modules.expected("weight", ("I8",), (rows, width))
    if not layout.symmetric:
        zeros = (rows * layout.bits // 32, layout.groups) if packed else scales
        expected += modules.expected("weight_zero_point", ("I32",) if packed else ("I8",), zeros)
    if layout.any_order:
        expected += modules.expected("weight_g_idx", ("I32",), (width,))
    for part, dtypes in (("input_scale", FLOATS), ("input_zero_point", ("I8",)), ("input_global_scale", FLOATS)):
        if headers.has(f"{module}.{part}"):  # static activation scales, which have no use here
            expected += modules.expected(part, dtypes, headers.shape(f"{module}.{part}"))
    return expected


def _schemes(module: str, headers: CheckpointHeaders, asymmetric: bool) -> list[Scheme]:
    """What the config groups with integer weights say. Their targets are patterns, which are not run.

    asymmetric: packed zero points are stored. Raises CheckpointError if every group says otherwise.
    """
    schemes = []
    for weights in _groups(quantization_config(headers), "weights"):
        if weights.get("type", "int") != "int":
            continue
        group = integer_entry(weights, "group_size")
        by_row = group is None and weights.get("strategy") in ("channel", "tensor")
        symmetric = weights.get("symmetric", True) is not False
        schemes.append(Scheme(integer_entry(weights, "num_bits"), ROW if by_row else group, symmetric))
    if not schemes and _groups(quantization_config(headers), "weights"):
        raise CheckpointError(
            f"{module} holds integers, but config.json's quantization_config says that weights are floats: one of the "
            "two belongs to another checkpoint"
        )
    packed = headers.has(f"{module}.weight_packed")
    if schemes and packed and all(scheme.symmetric is asymmetric for scheme in schemes):
        has = "has zero points" if asymmetric else "has no weight_zero_point"
        raise CheckpointError(
            f"{module} {has}, but config.json's quantization_config says that its weights are "
            f"{'symmetric' if asymmetric else 'asymmetric'}: one of the two belongs to another checkpoint"
        )
    unknown = any(scheme.bits is None and scheme.group is None for scheme in schemes)
    return [] if unknown else list(dict.fromkeys(schemes))


def _groups(block: Mapping[str, object], part: str) -> list[Mapping[str, object]]:
    """The QuantizationArgs `part` (weights, input_activations) of every config group."""
    groups = block.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    args = [group.get(part) for group in found if isinstance(group, Mapping)]
    return [each for each in args if isinstance(each, Mapping)]


def _activations(block: Mapping[str, object]) -> str:
    """One line on activations that config.json wants quantized; "" if it does not."""
    found: Sequence[Mapping[str, object]] = _groups(block, "input_activations")
    if not found:
        return ""
    bits, kind, strategy = (str(found[0].get(key))[:20] for key in ("num_bits", "type", "strategy"))
    how = "dynamic" if found[0].get("dynamic") else "static"
    return (
        f"config.json's activation scheme ({kind}{bits}, {how}, per {strategy}) is not applied: activations stay floats"
    )


def _check_shape(stored: Array, shape: tuple[int, int], name: str) -> None:
    if tuple(stored.tolist()) != shape:
        raise CheckpointError(
            f"{name} says {stored.tolist()}, but the module is {list(shape)}; the checkpoint is damaged, download it "
            "again"
        )
