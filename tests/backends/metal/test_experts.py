"""gate_up, SwiGLU and down of few tokens' experts in two launches, against float64."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from metal_numbers import narrow, wide

from mlx_gptoss.backends.mlx.fuse import fuse
from mlx_gptoss.backends.mlx.kernels.experts import ExpertLayer, Experts, mixture
from mlx_gptoss.backends.mlx.layers import DenseMatrix, ExpertLinear
from mlx_gptoss.measure.reference import random_weight
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.tensor import AFFINE, AFFINE4, MXFP4, NVFP4, Quantized, Spec, storage_name

LIMIT, ALPHA = 7.0, 1.702
USUAL = [
    (MXFP4, mx.float32),
    (MXFP4, mx.bfloat16),
    (AFFINE4, mx.bfloat16),
    (AFFINE[8, 32], mx.float32),
    (AFFINE[3, 64], mx.bfloat16),
]
MORE = [AFFINE[bits, group] for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
# D, I, experts, active, tokens: shorter than a step of 512; not a multiple of it; several of each
SIZES = [(128, 256, 8, 4, 1), (640, 128, 5, 2, 3)]
MORE_SIZES = [(256, 640, 3, 3, 2), (1152, 256, 4, 1, 3), (128, 128, 16, 8, 7), (512, 256, 9, 4, 6)]


def layer_of(gate_up: Quantized, down: Quantized, bias: np.ndarray, dtype: mx.Dtype) -> ExpertLayer:
    matrices = [ExpertLinear((fuse([weight]),)) for weight in (gate_up, down)]
    found = ExpertLayer.of(*matrices, narrow(bias, dtype), LIMIT, ALPHA)
    assert found is not None
    return found


def exact(x, residual, experts, weights, gate_up, down, bias, rounding) -> np.ndarray:
    """All in float64, but for `rounding` what SwiGLU returns. bias: as rounded"""
    first, second = (codecs.dequantize(weight).astype(np.float64) for weight in (gate_up, down))
    width = second.shape[-1]
    out = wide(residual).copy()
    for token, chosen in enumerate(np.array(experts).tolist()):
        for place, expert in enumerate(chosen):
            y = first[expert] @ wide(x)[token] + bias[expert, : 2 * width]
            gate, up = np.minimum(y[:width], LIMIT), np.clip(y[width:], -LIMIT, LIMIT)
            hidden = rounding(gate / (1 + np.exp(-ALPHA * gate)) * (up + 1))
            out[token] += wide(weights)[token, place] * (second[expert] @ hidden + bias[expert, 2 * width :])
    return out


def case(spec: Spec, size: tuple[int, int, int, int, int], dtype: mx.Dtype, scale: float = 1.0, seed: int = 0):
    D, width, E, A, T = size
    rng = np.random.default_rng(seed)
    gate_up, down = random_weight(spec, (E, 2 * width, D), seed + 1), random_weight(spec, (E, D, width), seed + 2)
    bias = narrow(rng.normal(size=(E, 2 * width + D)), dtype)
    x, residual = (narrow(rng.normal(size=(T, D)) * scale, dtype) for _ in "xr")
    experts = mx.array(rng.integers(0, E, (T, A)).astype(np.uint32))
    weights = narrow(rng.uniform(size=(T, A)), dtype)
    layer = layer_of(gate_up, down, wide(bias), dtype)
    return [x, residual, experts, weights], layer, (gate_up, down, wide(bias))


@pytest.mark.parametrize(("spec", "dtype"), USUAL, ids=[storage_name(spec) for spec, _ in USUAL])
def test_experts(run, close, spec, dtype):
    check(run, close, spec, SIZES[dtype == mx.bfloat16], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("spec", [MXFP4, *MORE], ids=storage_name)
def test_more_storages(run, close, spec, dtype):
    check(run, close, spec, SIZES[0], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("size", MORE_SIZES, ids=str)
@pytest.mark.parametrize("spec", [MXFP4, AFFINE4], ids=storage_name)
def test_more_sizes(run, close, spec, size):
    check(run, close, spec, size, mx.float32)


def check(run, close, spec: Spec, size, dtype: mx.Dtype) -> None:
    """Small, usual and large inputs: with the last, SwiGLU clamps most values."""
    for scale in (0.01, 1.0, 30.0):
        given, layer, stored = case(spec, size, dtype, scale)
        next_bias = given[0][0] * 3

        def rounding(hidden: np.ndarray) -> np.ndarray:
            return wide(narrow(hidden, dtype))

        found, base = run(Experts(LIMIT, ALPHA), *given, layer, next_bias)
        wanted = exact(*given, *stored, rounding)
        close(f"experts, {storage_name(spec)}", found, wanted, dtype, factor=2)
        close(f"experts, {storage_name(spec)}", base, wanted + wide(next_bias), dtype, factor=2)


@pytest.mark.slow
def test_the_widths_of_gpt_oss(run, close):
    """K = 2880 is no multiple of a step of 512."""
    given, layer, stored = case(MXFP4, (2880, 2880, 2, 4, 1), mx.bfloat16)
    found, *_ = run(Experts(LIMIT, ALPHA), *given, layer, None)
    close("experts, mxfp4", found, exact(*given, *stored, lambda h: wide(narrow(h, mx.bfloat16))), mx.bfloat16, 2)


@pytest.mark.parametrize("exponent", [20, 200])
def test_extreme_scales_of_mxfp4(run, exponent):
    """2^-107 and 2^73: far from what any model has."""
    given, _, (gate_up, down, bias) = case(MXFP4, SIZES[0], mx.float32)
    gate_up = replace(gate_up, scale=np.full_like(gate_up.scale, exponent))
    given[0] = given[0] * 2.0 ** (127 - exponent)  # so that products are of size 1
    layer = layer_of(gate_up, down, bias, mx.float32)
    found, *_ = run(Experts(LIMIT, ALPHA), *given, layer, None)
    wanted = exact(*given, gate_up, down, bias, lambda hidden: hidden)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_every_code_of_mxfp4(run):
    """A matrix with one code a row, and an input of ones: each output tells its code's value."""
    codes = np.tile((np.arange(16, dtype=np.uint8) * 17)[None, :, None], (1, 4, 16))  # [1, 64, 32 / 2]
    gate_up = Quantized(MXFP4, codes, np.full((1, 64, 1), 120, np.uint8))
    down = random_weight(MXFP4, (1, 32, 32), 1)
    bias = np.zeros((1, 64 + 32))
    layer = layer_of(gate_up, down, bias, mx.float32)
    given = [mx.eye(32)[:5], mx.zeros((5, 32)), mx.zeros((5, 1), mx.uint32), mx.ones((5, 1))]
    found, *_ = run(Experts(LIMIT, ALPHA), *given, layer, None)
    wanted = exact(*given, gate_up, down, bias, lambda hidden: hidden)
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_dtypes_of_affine_scales(run, stored):
    given, _, (gate_up, down, bias) = case(AFFINE4, (128, 64, 3, 2, 1), mx.bfloat16)
    gate_up, down = (
        replace(weight, scale=weight.scale.astype(stored), bias=weight.bias.astype(stored))
        for weight in (gate_up, down)
    )
    found, *_ = run(Experts(LIMIT, ALPHA), *given, layer_of(gate_up, down, bias, mx.bfloat16), None)
    wanted = exact(*given, gate_up, down, bias, lambda hidden: wide(narrow(hidden, mx.bfloat16)))
    assert np.abs(found - wanted).max() < 2**-7 * np.abs(wanted).max()


def test_nan_stays_with_its_token(run):
    given, layer, _ = case(MXFP4, (*SIZES[0][:4], 2), mx.float32)
    x = np.array(given[0])
    x[1, 77] = np.nan
    found, *_ = run(Experts(LIMIT, ALPHA), mx.array(x), *given[1:], layer, None)
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


@pytest.mark.parametrize("spec", [MXFP4, AFFINE4], ids=storage_name)
def test_the_twin_computes_the_same(close, spec):
    given, layer, stored = case(spec, SIZES[0], mx.float32)
    wanted = exact(*given, *stored, lambda hidden: hidden)
    close(f"experts, {storage_name(spec)} (twin)", wide(mixture(*given, layer, None)[0]), wanted, mx.float32, factor=2)


def test_layers_that_the_kernel_does_not_take():
    stored = {spec: fuse([random_weight(spec, (2, 64, 64), 1)]) for spec in (MXFP4, AFFINE4, NVFP4)}
    bias, good = mx.zeros((2, 128)), ExpertLinear((stored[MXFP4],))

    def taken(*matrices) -> bool:
        linear = ExpertLinear(matrices)
        found = [ExpertLayer.of(*pair, bias, LIMIT, ALPHA) for pair in ((linear, good), (good, linear))]
        assert (found[0] is None) == (found[1] is None)
        return found[0] is not None

    assert taken(stored[MXFP4]) and taken(stored[AFFINE4])
    assert not taken(stored[NVFP4])  # another scale
    assert not taken(stored[MXFP4], stored[MXFP4])  # gate and up apart
    assert not taken(replace(stored[MXFP4], outer=mx.array(2.0)))
    assert not taken(DenseMatrix(mx.zeros((2, 64, 64))))
