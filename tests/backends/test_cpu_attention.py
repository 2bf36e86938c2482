"""Attention of one token, by its kernel and by numpy, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_gptoss.backends.mlx.cpu import products as cpu_products
from mlx_gptoss.backends.mlx.cpu.attention import TokenAttention, Tokens
from mlx_gptoss.backends.mlx.cpu.products import Products
from mlx_gptoss.backends.mlx.cpu.storages import Heads

pytest.importorskip("llvmlite")

from cpu_targets import TARGETS

from mlx_gptoss.backends.mlx.cpu.attention_kernel import attention_module

RNG = np.random.default_rng(0)
DIM, SCALE = 64, 0.17
CASES = {  # places of the cache, window, slots and positions
    "one": (512, None, [0], [0]),
    "a block": (512, None, [0], [255]),
    "a block and one": (512, None, [0], [256]),
    "several rows": (2048, None, [0, 2, 3], [300, 0, 2047]),
    "a ring that is not full": (128, 128, [0, 1], [5, 127]),
    "a full ring": (128, 128, [0, 2], [128, 300]),
    "a ring with room for drafts": (136, 128, [0, 1, 3], [130, 300, 135]),
}


@pytest.fixture(params=[*TARGETS, pytest.param(None, id="numpy")], scope="module")
def products(request):
    made = Products(compiled=request.param is not None)
    if request.param is not None:
        made._target = request.param
    yield made
    made.close()


class Token:
    """What a step gives to attention, in a cache with something in every place."""

    def __init__(self, heads: int, group: int, case: str) -> None:
        self.places, self.window, self.slots, self.starts = CASES[case]
        self.heads, self.group, rows = heads, group, len(self.slots)
        self.sinks = RNG.standard_normal((heads, group, 1), np.float32)
        self.qkv = 3 * RNG.standard_normal((rows, heads * (group + 2) * DIM), np.float32)
        angles = RNG.uniform(0, 6, (rows, 1, DIM // 2))
        self.turns = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
        self.kept = RNG.standard_normal((2, max(self.slots) + 1, heads, self.places, DIM), np.float32)

    def attend(self, products):
        attention = TokenAttention(products, self.sinks, SCALE, DIM)
        return attention(self.qkv, self.kept, self.window, Tokens(self.slots, self.starts, self.turns))

    def wanted(self):
        """The cache and the result, by definition, in float64."""
        kept, out = self.kept.astype(np.float64), []
        vectors = self.qkv.astype(np.float64).reshape(len(self.slots), -1, DIM)
        for b, (slot, start) in enumerate(zip(self.slots, self.starts, strict=True)):
            low, high = vectors[b, :, : DIM // 2], vectors[b, :, DIM // 2 :]
            cos, sin = self.turns[:, b].astype(np.float64)
            turned = np.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)
            count = self.heads * self.group
            kept[0, slot, :, start % self.places] = turned[count : count + self.heads]
            kept[1, slot, :, start % self.places] = vectors[b, count + self.heads :]
            first = 0 if self.window is None else max(0, start + 1 - self.window)
            keys, values = kept[:, slot][:, :, np.arange(first, start + 1) % self.places]
            scores = np.einsum("kgd,ksd->kgs", turned[:count].reshape(self.heads, self.group, DIM), keys) * SCALE
            scores = np.concatenate([scores, self.sinks], axis=-1)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out.append(np.einsum("kgs,ksd->kgd", weights[..., :-1], values).ravel())
        return kept, np.array(out)


def error(found, wanted):
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("heads", "group"), [(8, 8), (2, 4), (3, 1), (2, 16)])
def test_matches_float64(products, monkeypatch, heads, group, case):
    monkeypatch.setattr(cpu_products, "MIN_WORK_TO_SHARE", 1)
    token = Token(heads, group, case)
    kept, wanted = token.wanted()
    assert products.prepare_attention(Heads(group, DIM)) is products.compiled
    assert error(token.attend(products), wanted) < 5e-6
    assert error(token.kept, kept) < 1e-6


def test_scores_far_apart(products):
    """Of hundreds, rising and falling from block to block, and a sink that outweighs all."""
    for slope in (1.0, -1.0):
        token = Token(2, 8, "several rows")
        token.kept[0] *= 20 * (1 + slope * np.linspace(-1, 1, token.places)[:, None]).astype(np.float32)
        token.sinks[1] = 4000
        _, wanted = token.wanted()
        assert error(token.attend(products), wanted) < 2e-5


def test_a_value_that_is_no_number_stays_in_its_row(products):
    token = Token(2, 8, "several rows")
    token.qkv[1, -1] = np.nan
    found = token.attend(products)
    assert np.isnan(found[1]).sum() == 8 and np.isfinite(found[[0, 2]]).all()


def test_heads_that_no_kernel_has():
    """numpy computes them."""
    products = Products(compiled=True)
    for heads in (Heads(3, DIM), Heads(8, 24), Heads(16, 1 << 20)):
        assert not products.prepare_attention(heads)
    token = Token(2, 3, "several rows")
    _, wanted = token.wanted()
    assert error(token.attend(products), wanted) < 5e-6
    products.close()


def test_neon_compiles(neon):
    assert neon.compiled(attention_module(Heads(8, DIM), neon.target))[:4] == b"\x7fELF"


class Recorded(Products):
    """Keeps the table of a call instead of making it."""

    def prepare_attention(self, heads):
        return True

    def attend(self, heads, table, multiply_adds):
        self.table = table


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "group"), [(8, 8), (2, 4), (3, 1), (2, 16)])
def test_neon_emulated(neon, heads, group):
    """Run by QEMU."""
    neon.load(attention_module(Heads(group, DIM), neon.target))
    for case in CASES:
        token, products = Token(heads, group, case), Recorded(compiled=False)
        _, wanted = token.wanted()
        out = token.attend(products)
        arrays = [token.sinks, token.qkv, token.turns, token.kept, out]
        table = [(np.zeros(1, np.int64), 0), *(placed(value, arrays) for value in products.table[1:])]
        assert error(neon.run(table, out), wanted) < 5e-6
        products.close()


def placed(value, arrays):
    """An address as an array and an offset into it; other values as they are."""
    for array in arrays:
        offset = value - cpu_products.address(array)
        if 0 <= offset < array.nbytes:
            return array, offset
    return value
