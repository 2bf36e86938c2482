"""Compiled products against float64: every storage, odd sizes, and the code for processors with narrower vectors."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from mlx_gptoss.backends.mlx.cpu import products as cpu_products
from mlx_gptoss.backends.mlx.cpu.products import Products, Stored
from mlx_gptoss.backends.mlx.cpu.storages import by_words
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.tensor import AFFINE, AFFINE_BITS, FP8_ROW, MXFP4, MXFP8, NVFP4, Dense, Quantized

pytest.importorskip("llvmlite")

from cpu_targets import TARGETS

from mlx_gptoss.backends.mlx.cpu.kernels import kernel_module

RNG = np.random.default_rng(0)
OUTPUTS = 37
TYPES = {"bfloat16": codecs.BFLOAT16, "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
FP8 = {"nvfp4": NVFP4, "mxfp8": MXFP8, "fp8": FP8_ROW}
STORAGES = ["mxfp4", *FP8, *TYPES, *(f"{bits} bits" for bits in AFFINE_BITS)]


@pytest.fixture(params=TARGETS, scope="module")
def products(request):
    made = Products(compiled=True)
    made._target = request.param
    yield made
    made.close()


def weight(kind, *shape, group=64, scale="bfloat16"):
    """A matrix, or several, [..., N, K]"""
    *lead, inputs = shape
    if kind in TYPES:
        return Dense(RNG.standard_normal(shape, np.float32).astype(TYPES[kind]))
    if kind == "mxfp4":
        codes = RNG.integers(0, 256, (*lead, inputs // 2), np.uint8)
        scales = RNG.integers(118, 125, (*lead, inputs // 32), np.uint8)
        scales[..., 0] = 0  # 2^-127
        return Quantized(MXFP4, codes, scales)
    if kind in FP8:
        return fp8(FP8[kind], *shape)
    bits = int(kind[0])
    codes = RNG.integers(0, 256, (*lead, inputs * bits // 8), np.uint8)
    scales = RNG.standard_normal((*lead, inputs // group), np.float32)
    biases = RNG.standard_normal(scales.shape, np.float32) - scales * 2 ** (bits - 1)
    return Quantized(AFFINE[bits, group], codes, scales.astype(TYPES[scale]), biases.astype(TYPES[scale]))


def fp8(spec, *shape):
    """A matrix with codes or scales in FP8, every number among them, and a factor for each row, or for each expert."""
    *lead, inputs = shape
    codes = numbers(*lead, inputs * spec.bits // 8) if spec.bits == 8 else RNG.integers(0, 256, (*lead, inputs // 2))
    scale = {
        "e4m3": lambda groups: numbers(*lead, groups),
        "e8m0": lambda groups: RNG.integers(118, 125, (*lead, groups)).astype(np.uint8),
        "none": lambda groups: None,
    }[spec.scale](inputs // (spec.group or inputs))
    outer = RNG.standard_normal((lead[0], 1, 1) if len(lead) > 1 else (*lead, 1), np.float32)
    return Quantized(spec, codes.astype(np.uint8), scale, outer=outer)


def numbers(*shape):
    """Random codes of E4M3, but for those that are no numbers."""
    return RNG.choice(np.flatnonzero(np.isfinite(codecs.E4M3)).astype(np.uint8), shape)


def decoded(found):
    return (codecs.dequantize(found) if isinstance(found, Quantized) else found.values).astype(np.float64)


def error(found, wanted):
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("kind", STORAGES)
def test_tokens_and_inputs(products, kind):
    """One token, those that are multiplied row by row in one strip and in several, and tiles with what is left over;
    inputs in one block and in several."""
    for inputs in (64, 320, 1856):
        matrix = weight(kind, OUTPUTS, inputs)
        assert products.reads(Stored(matrix))
        for tokens in (*range(1, 9), 13, 16, 17, 32, 37):
            x = RNG.standard_normal((tokens, inputs), np.float32)
            assert error(products.multiply(Stored(matrix), x), x @ decoded(matrix).T) < 1e-6


@pytest.mark.parametrize(
    ("kind", "group", "scale"), [("3 bits", 32, "float16"), ("4 bits", 128, "float32"), ("8 bits", 32, "float32")]
)
def test_groups_and_scales(products, kind, group, scale):
    for tokens in (1, 3, 37):
        matrix, x = weight(kind, OUTPUTS, 384, group=group, scale=scale), RNG.standard_normal((tokens, 384), np.float32)
        assert error(products.multiply(Stored(matrix), x), x @ decoded(matrix).T) < 1e-6


def test_the_ends_of_e8m0(products):
    """The least scale is 2^-127, a subnormal number; the last one is no number."""
    matrix = weight("mxfp4", OUTPUTS, 320)
    for tokens in (1, 3, 37):
        x = RNG.standard_normal((tokens, 320), np.float32) * np.float32(2.0**100)
        matrix.scale[:] = 0
        assert error(products.multiply(Stored(matrix), x), x @ decoded(matrix).T) < 1e-6
        matrix.scale[1, 3] = 255
        found = np.isnan(products.multiply(Stored(matrix), x))
        assert found[:, 1].all() and found.sum() == tokens


def test_every_code_of_fp8(products):
    """As codes of a matrix, each by itself, and as scales; exact, and no number where it is none."""
    codes = np.arange(256, dtype=np.uint8)[:, None].repeat(32, axis=1)
    for tokens in (1, 37):
        x = np.zeros((tokens, 32), np.float32)
        x[:, 5] = 1
        found = products.multiply(Stored(Quantized(FP8_ROW, codes)), x)
        assert (found == codecs.E4M3).sum() == tokens * 254 and np.isnan(found[:, [127, 255]]).all()
        one = np.full((256, 16), 0x22, np.uint8)  # 1.0
        found = products.multiply(Stored(Quantized(NVFP4, one, codes[:, :2])), x)
        assert (found == codecs.E4M3).sum() == tokens * 254 and np.isnan(found[:, [127, 255]]).all()


@pytest.mark.parametrize("kind", FP8)
def test_factors_of_rows_that_are_joined(products, kind):
    parts = [weight(kind, n, 64) for n in (OUTPUTS, 3)]
    parts += [replace(weight(kind, 2, 64), outer=outer) for outer in (np.float32(-2), None)]
    x = RNG.standard_normal((5, 64), np.float32)
    found = products.multiply(Stored(products.copied(parts)), x)
    assert error(found, np.concatenate([x @ decoded(part).T for part in parts], axis=1)) < 1e-6


@pytest.mark.parametrize("kind", ["mxfp4", *FP8])
def test_experts(products, monkeypatch, kind):
    """With no row, one and many, on several threads."""
    monkeypatch.setattr(cpu_products, "MIN_WORK_TO_SHARE", 1)
    bank = weight(kind, 6, OUTPUTS, 320)
    experts = np.repeat(np.arange(6), [1, 35, 0, 3, 13, 1])
    x = RNG.standard_normal((len(experts), 320), np.float32)
    wanted = np.einsum("pnd,pd->pn", decoded(bank)[experts], x)
    assert error(products.gather(Stored(bank), x, experts), wanted) < 1e-6


@pytest.mark.parametrize("kind", ["mxfp4", *FP8, "4 bits", "bfloat16", "odd"])
def test_experts_of_one_token(products, kind):
    """In any order, again and again, each with the token or with a row of its own."""
    bank = Dense(RNG.standard_normal((6, OUTPUTS, 100), np.float32)) if kind == "odd" else weight(kind, 6, OUTPUTS, 320)
    matrix = Stored(bank)
    for experts in ([4, 0, 5], [1, 3, 2], [2]):
        chosen = decoded(bank)[experts]
        for rows in {1, len(experts)}:
            x = RNG.standard_normal((rows, bank.shape[-1]), np.float32)
            found = products.gather_token(matrix, x, np.array(experts))
            assert error(found, np.einsum("pnd,pd->pn", chosen, np.broadcast_to(x, (len(experts), x.shape[1])))) < 1e-6


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4", "bfloat16", "3 bits"])
def test_neon_compiles(neon, kind):
    matrix = Stored(weight(kind, 1, 64))
    assert neon.compiled(kernel_module(matrix.storage, neon.target))[:4] == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORAGES)
def test_neon_emulated(neon, kind):
    """Run by QEMU."""
    neon.load(kernel_module(Stored(weight(kind, 1, 64)).storage, neon.target))
    for inputs, tokens in product((64, 320, 1856), (1, 2, 3, 4, 5, 7, 37)):
        stored = Stored(weight(kind, OUTPUTS, inputs))
        x = RNG.standard_normal((tokens, inputs), np.float32)
        order = by_words(inputs, neon.target.lanes) if stored.storage.by_words else np.arange(inputs)
        sums = x.reshape(tokens, -1, stored.storage.group or inputs).sum(axis=-1)
        codes, *rest = stored.weight.arrays
        nothing = np.zeros(1)
        scale, bias = (rest + [nothing] * 2)[:2] if stored.storage.scale != "none" else [nothing] * 2
        y, rows = np.empty((tokens, OUTPUTS), np.float32), 32
        call = [(np.zeros(1, np.int64), 0), 1, -(-OUTPUTS // rows), rows, OUTPUTS, inputs, *stored.strides]
        call += [4 * inputs, 4 * OUTPUTS]
        job = [(array, 0) for array in (codes, scale, bias, x[:, order], sums, y)]
        found = stored.finish(neon.run([*call, *job, tokens], y), None)
        assert error(found, x @ decoded(stored.weight).T) < 1e-6


def test_what_no_kernel_reads():
    products = Products(compiled=True)
    odd = Stored(Dense(RNG.standard_normal((OUTPUTS, 100), np.float32)))
    assert not products.reads(odd)
    x = RNG.standard_normal((3, 100), np.float32)
    assert error(products.multiply(odd, x), x @ decoded(odd.weight).T) < 1e-6
    products.close()
