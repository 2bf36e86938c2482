"""Every custom kernel against its twin at the sizes of a model, whatever is remembered, for measure/selftest.py.

Legend: E experts, D hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ....config import ModelConfig
from ....weights.tensor import AFFINE4, AFFINE8, MXFP4, Spec
from ..layers import MODES, QuantizedMatrix
from .choose import chooser
from .experts import ExpertLayer

EXPERTS = 8  # of the layers checked


def checked_cases(config: ModelConfig, dtype: mx.Dtype, device: mx.Device) -> Iterator[tuple[str, float, float]]:
    """(check and case, error, limit) of each. Empty if the device is no Metal GPU."""
    for kv_bits in (None, 8):
        choose = chooser(config, dtype, kv_bits, device, repeat=True)
        if choose is None:
            return
        layers = [config.windows.index(window) for window in dict.fromkeys(config.windows)]
        for layer in layers:
            choose.layer(layer, None, norm_apart=True)
        for spec in (MXFP4, AFFINE4, AFFINE8) if kv_bits is None else ():
            choose.layer(0, random_layer(config, spec, dtype), norm_apart=False)
        for check, case in choose.cases:
            yield f"{check}: {case.name}", case.error, case.limit


def random_layer(config: ModelConfig, spec: Spec, dtype: mx.Dtype) -> ExpertLayer:
    """A layer of few experts with random weights, as large as a model's."""
    D, I = config.hidden_size, config.intermediate_size
    rng = np.random.default_rng(spec.bits)

    def matrix(rows: int, width: int) -> QuantizedMatrix:
        codes = mx.array(rng.integers(0, 1 << 32, (EXPERTS, rows, width * spec.bits // 32), np.uint32))
        grouped = (EXPERTS, rows, width // spec.group)
        if spec == MXFP4:
            return QuantizedMatrix(codes, mx.array(rng.integers(117, 121, grouped, np.uint8)), None, None, spec)
        step = 4 * width**-0.5 / (1 << spec.bits)
        scales = mx.array(rng.uniform(step / 2, step, grouped).astype(np.float32)).astype(mx.bfloat16)
        return QuantizedMatrix(codes, scales, (-(1 << spec.bits) / 2 * scales).astype(scales.dtype), None, spec)

    assert spec in MODES
    bias = mx.array(rng.normal(size=(EXPERTS, 2 * I + D)).astype(np.float32)).astype(dtype)
    layer = ExpertLayer(matrix(2 * I, D), matrix(D, I), bias, config.swiglu_limit, config.swiglu_alpha)
    mx.eval(bias, [a for m in (layer.gate_up, layer.down) for a in vars(m).values() if isinstance(a, mx.array)])
    return layer
