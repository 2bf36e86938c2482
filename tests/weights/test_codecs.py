"""Codes to numbers and back: compared with ml_dtypes' tables, with mx.quantize bit for bit, and with brute force."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import codecs, quantization
from mlx_gptoss.weights.tensor import AFFINE4, AFFINE8, FP8_ROW, MXFP4, MXFP8, NVFP4, Dense, Quantized

BF16 = np.dtype(ml_dtypes.bfloat16)
MODES = {"affine 4": AFFINE4, "affine 8": AFFINE8, "mxfp8": MXFP8, "nvfp4": NVFP4}


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def difficult(seed: int, size: float, dtype: np.dtype) -> np.ndarray:
    """[400, 256]: normal rows, all-negative and all-positive rows, constants, zeros, signed zeros, outliers, ramps."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((400, 256)) * size
    values[:40] -= 5 * size
    values[40:80] = np.abs(values[40:80])
    values[80:84] = size
    values[84:88] = -size
    values[88:92] = 0
    values[92:96, ::3] = -0.0
    values[96:120, 7] *= 100
    values[120:124] = np.linspace(-size, size, 256)
    return values.astype(np.float32).astype(dtype)


def random_mxfp4(seed: int, *, present: int) -> Quantized:
    """Random codes and scales; every group has the code `present` (0 to 7), with either sign."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (3, 20, 128), dtype=np.uint8)
    codes[..., ::32] = present | (codes[..., ::32] & 8)
    scale = rng.integers(0, 255, (3, 20, 4), dtype=np.uint8)
    return Quantized(MXFP4, codecs.pack(codes, 4), scale)


def test_value_tables_equal_those_of_ml_dtypes():
    assert np.array_equal(codecs.E2M1, np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert np.signbit(codecs.E2M1[8])
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(codecs.E8M0, scales, equal_nan=True)


@pytest.mark.parametrize("width", [4, 8])
def test_pack_is_the_inverse_of_unpack(width):
    packed = np.random.default_rng(0).integers(0, 256, (5, 3, 64), dtype=np.uint8)
    codes = codecs.unpack(packed, width)
    assert codes.shape == (5, 3, 64 * 8 // width)
    assert codes.max() < 2**width
    assert np.array_equal(codecs.pack(codes, width), packed)


def test_the_low_nibble_comes_first():
    weight = Quantized(MXFP4, np.full((1, 16), 0x72, np.uint8), np.array([[128]], np.uint8))
    assert codecs.dequantize(weight)[0, :4].tolist() == [2.0, 12.0, 2.0, 12.0]


@pytest.mark.parametrize("outer", [np.float32(3), np.full((2, 1, 1), 3), np.full((2, 5, 1), 3), None])
def test_every_part_of_the_formula(outer):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (2, 5, 128), dtype=np.uint8)
    scale, bias = rng.standard_normal((2, 2, 5, 2)).astype(BF16)
    if outer is not None:
        outer = np.asarray(outer, np.float32)
        outer = outer * np.arange(1, outer.size + 1, dtype=np.float32).reshape(outer.shape)
    weight = Quantized(AFFINE4, codecs.pack(codes, 4), scale, bias, outer)
    scales_and_biases = [np.repeat(x.astype(np.float32), 64, axis=-1) for x in (scale, bias)]
    wanted = (codes * scales_and_biases[0] + scales_and_biases[1]) * np.float32(1 if outer is None else outer)
    assert np.array_equal(codecs.dequantize(weight), wanted)
    assert np.array_equal(codecs.dequantize(weight[1:2]), wanted[1:])


def test_fp8_rows_are_decoded():
    codes = np.random.default_rng(2).integers(0, 0x7F, (6, 40), dtype=np.uint8)
    outer = np.linspace(0.5, 2, 6, dtype=np.float32)[:, None].astype(BF16)
    wanted = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * outer.astype(np.float32)
    assert np.array_equal(codecs.dequantize(Quantized(FP8_ROW, codes, outer=outer)), wanted)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("size", [1e-7, 0.02, 1.0, 300.0])
@pytest.mark.parametrize("mode", MODES)
def test_quantizing_equals_mlx_bit_for_bit(mode, size, dtype):
    mx = pytest.importorskip("mlx.core")
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("the recipe is that of MLX's CPU code")
    spec, values = MODES[mode], difficult(int(1 / size), size, dtype)
    array = mx.array(bits(values)).view(mx.bfloat16 if dtype == BF16 else mx.float32)
    theirs = mx.quantize(array, spec.group, spec.bits, mode=mode.split()[0])
    ours = quantization.quantize(values, spec, dtype)
    for mine, their in zip((ours.codes, ours.scale, ours.bias), theirs, strict=False):
        raw = np.array(their.view(mx.uint8))
        assert np.array_equal(bits(mine).view(np.uint8), raw.reshape(mine.shape[0], -1))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("present", [6, 7])
def test_the_codes_of_mxfp4_are_recovered(present, dtype):
    weight = random_mxfp4(3, present=present)
    weight = Quantized(MXFP4, weight.codes, np.minimum(weight.scale, 250))  # 6 * 2^125 is finite
    found = quantization.quantize(codecs.dequantize(weight).astype(dtype), MXFP4)
    assert np.array_equal(found.codes, weight.codes)
    assert np.array_equal(found.scale, weight.scale)


def test_the_values_of_mxfp4_are_recovered_whatever_the_codes():
    """Groups without a 4 or 6 have several encodings. The values and the signs of zeros stay the same."""
    weight = random_mxfp4(4, present=1)
    small = weight.codes & 0b1011_1011  # no 4 and no 6 (nor 2, nor 3)
    weight = Quantized(MXFP4, small, np.minimum(weight.scale, 250))
    values = codecs.dequantize(weight)
    assert np.array_equal(bits(codecs.dequantize(quantization.quantize(values, MXFP4))), bits(values))


def test_mxfp4_rounds_to_nearest_and_ties_to_even():
    values = difficult(5, 0.02, np.dtype(np.float32))
    values[0, :9] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25]
    values[0, 9:] = 0
    found = quantization.quantize(values, MXFP4)
    assert codecs.unpack(found.codes, 4)[0, :9].tolist() == [7, 0, 2, 2, 4, 4, 6, 6, 8]
    step = np.repeat(codecs.E8M0[found.scale], 32, axis=-1)
    amax = np.abs(values).reshape(400, -1, 32).max(-1).repeat(32, -1)
    nonzero = amax > 0
    assert ((amax / step)[nonzero] >= 4).all() and ((amax / step)[nonzero] < 8).all()
    grid = codecs.E2M1[:8]
    best = np.abs(np.abs(values / step)[..., None] - grid).min(-1)
    assert np.array_equal(np.abs(codecs.dequantize(found) / step - values / step), best)


def test_block_size_and_strides_change_nothing(monkeypatch):
    fused = np.random.default_rng(6).standard_normal((3, 128, 2 * 96)).astype(BF16)  # [E, K, 2N], interleaved
    view = fused.swapaxes(1, 2)[:, 1::2]
    whole = {spec: quantization.quantize(np.ascontiguousarray(view), spec) for spec in (MXFP4, AFFINE4, MXFP8)}
    dense = codecs.dequantize(Dense(view))
    assert np.array_equal(dense, view.astype(np.float32))
    monkeypatch.setattr(codecs, "BLOCK_VALUES", 1000)
    assert np.array_equal(codecs.dequantize(Dense(view)), dense)
    assert np.array_equal(codecs.contiguous_rows(view), view)
    for spec, wanted in whole.items():
        found = quantization.quantize(view, spec)
        assert np.array_equal(found.codes, wanted.codes) and np.array_equal(found.scale, wanted.scale)
        again = codecs.dequantize(Quantized(spec, found.codes, found.scale, found.bias))
        assert np.array_equal(again, codecs.dequantize(wanted))


def test_bfloat16_rounds_ties_to_even():
    values = np.random.default_rng(7).standard_normal((40, 100)).astype(np.float32)
    assert np.array_equal(bits(codecs.to_bfloat16(Dense(values))), bits(values.astype(BF16)))
    weight = quantization.quantize(np.pad(values, ((0, 0), (0, 28))), AFFINE8)
    assert np.array_equal(bits(codecs.to_bfloat16(weight)), bits(codecs.dequantize(weight).astype(BF16)))


def test_a_weight_in_the_wanted_spec_is_returned_itself():
    weight = random_mxfp4(8, present=7)
    assert quantization.to_spec(weight, MXFP4) is weight


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spec", [AFFINE4, MXFP4, MXFP8, NVFP4], ids=str)
def test_nan_and_infinite_values_are_refused(spec, value):
    values = np.ones((4, 128), np.float32)
    values[2, 70] = value
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        quantization.quantize(values, spec)


def test_rows_that_groups_do_not_divide_are_refused():
    with pytest.raises(CheckpointError, match="96 values"):
        quantization.quantize(np.ones((2, 96), np.float32), AFFINE4)


@pytest.mark.parametrize(
    "weight",
    [
        Quantized(MXFP4, np.zeros((2, 16), np.uint8), np.array([[1], [255]], np.uint8)),
        Quantized(NVFP4, np.zeros((1, 8), np.uint8), np.array([[0xFF]], np.uint8)),
        Quantized(AFFINE4, np.zeros((1, 32), np.uint8), np.array([[np.inf]], BF16), np.array([[0]], BF16)),
        Quantized(AFFINE4, np.zeros((1, 32), np.uint8), np.array([[1]], BF16), np.array([[np.nan]], BF16)),
        Quantized(NVFP4, np.zeros((1, 8), np.uint8), np.array([[1]], np.uint8), outer=np.array(np.nan, np.float32)),
    ],
)
def test_nan_and_infinite_scales_are_refused(weight):
    with pytest.raises(CheckpointError, match=r"layers\.0 has a scale"):
        codecs.check_scales(weight, "layers.0")
