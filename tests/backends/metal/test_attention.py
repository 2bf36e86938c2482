"""Attention of one new token with cached keys, in one launch and in two, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from metal_numbers import narrow, wide

from mlx_gptoss.backends.mlx.kernels.attention import KEYS_PER_BLOCK, Attend, attend, can_attend
from mlx_gptoss.backends.mlx.quantized_kv import pack

FACTOR = 0.2


@dataclass(frozen=True)
class Case:
    """capacity: of a slot; in a ring of a window the places beyond it are the slack. slots: of the rows, of 4 in the
    cache. size: of the queries."""

    positions: tuple[int, ...]
    window: int | None = None
    capacity: int = 0
    bits: int = 16
    dtype: mx.Dtype = mx.float32
    kv_heads: int = 2
    group: int = 8
    dim: int = 64
    slots: tuple[int, ...] = (2, 0, 3)
    size: float = 1.0
    sink: float = 0.0

    def __str__(self) -> str:
        kind = "full" if self.window is None else f"window {self.window} in {self.capacity}"
        return f"{kind}, {self.positions}, {self.bits} bits, {str(self.dtype).rpartition('.')[2]}, size {self.size:g}"


BORDERS = (0, 1, 7, 31, 32, 33, 63, 127, 128, 255)
FULL = [
    *(Case((p,), dtype=mx.bfloat16) for p in BORDERS),
    *(Case((p,), dtype=mx.bfloat16) for p in (256, 257, 700)),  # two blocks and more
    Case((700, 3, 256), dtype=mx.bfloat16),
    Case((40, 255, 0)),
    Case((300,), bits=8),
    *(Case((p,), bits=8, dtype=mx.bfloat16) for p in (0, 33, 127)),
    Case((90, 5, 31), bits=8, dtype=mx.bfloat16),
    Case((70,), group=2),
]
SLIDING = [
    *(Case((p,), 128, 128, dtype=mx.bfloat16) for p in (0, 5, 126, 127, 128, 129, 1000, 100_003)),
    *(Case((p,), 128, 131, dtype=mx.bfloat16) for p in (127, 128, 129, 130, 131, 132, 262, 5001)),
    Case((4, 127, 700), 128, 131, dtype=mx.bfloat16),
    Case((500,), 300, 300, dtype=mx.bfloat16),  # two blocks
]
EXTREME = [
    *(Case((100,), size=size, sink=sink) for size in (1e-6, 40.0) for sink in (-60.0, 0.0, 60.0)),
    Case((700,), size=40.0, sink=60.0),
    Case((700,), bits=8, size=40.0),
]
MORE = [
    *(
        Case((p,), bits=bits, dtype=dtype, group=group, kv_heads=heads, dim=dim)
        for p in (0, 95, 300, 2048, 4097)
        for bits in (16, 8)
        for dtype in (mx.float32, mx.bfloat16, mx.float16)
        for group, heads, dim in ((8, 8, 64), (1, 3, 64), (5, 1, 32), (4, 2, 96))
        if bits == 16 or dim == 64
    ),
    *(Case((p, 1, 40), w, w + slack) for p in (9, 33, 64, 300) for w in (1, 8, 33) for slack in (0, 3)),
    *(Case((n * KEYS_PER_BLOCK + e,)) for n in (1, 2, 3) for e in (-2, -1, 0, 1)),
    Case((KEYS_PER_BLOCK * 40,)),  # more tiles than blocks
    Case((9000,), 8192, 8195),
]


def build(case: Case) -> tuple[list, list[np.ndarray], list[np.ndarray]]:
    """The arguments from vectors to sinks, and the rows' keys and values in the cache, float64 [K, C, dim] each.
    Places that no query may read hold NaN, those of a ring that are only too old hold large numbers."""
    rng = np.random.default_rng(sum(case.positions))
    B, K, D = len(case.positions), case.kv_heads, case.dim
    capacity = case.capacity or max(case.positions) + 3
    slots = case.slots[:B]
    vectors = narrow(rng.normal(size=(B, K * (case.group + 2), 1, D)) * case.size, case.dtype)
    kv = rng.normal(size=(2, 4, K, capacity, D))
    sinks = narrow(rng.normal(size=K * case.group) + case.sink, case.dtype)
    cached = [narrow(kv, case.dtype)]
    if case.bits == 8:
        cached = list(pack(cached[0]))
        whole = wide(mx.dequantize(*cached, group_size=64, bits=8))
    else:
        whole = wide(cached[0])
    hidden = np.ones((4, capacity), bool)
    for slot, position in zip(slots, case.positions, strict=True):
        hidden[slot, : position + 1] = False
    places = mx.array(hidden)[None, :, None, :, None]
    cached = [mx.where(places, mx.nan, a) if a.dtype != mx.uint32 else a for a in cached]
    old = np.zeros((4, capacity), bool)
    for slot, position in zip(slots, case.positions, strict=True):
        if case.window is not None:
            old[slot] = (position - np.arange(capacity)) % capacity >= case.window
    places = mx.array(old & ~hidden)[None, :, None, :, None]
    cached = [mx.where(places, mx.array(99.0, a.dtype), a) for a in cached] if old.any() else cached
    mx.eval(cached)
    indices = [mx.array(np.array(numbers, np.int32)) for numbers in (slots, case.positions)]
    return [vectors, [a.astype(case.dtype) if case.bits == 16 else a for a in cached], *indices, case.window, sinks], *(
        [whole[i][slot] for slot in slots] for i in (0, 1)
    )


def exact(case: Case, arguments: list, keys: list[np.ndarray], values: list[np.ndarray]) -> np.ndarray:
    q, sinks = wide(arguments[0]), wide(arguments[-1])
    out = np.zeros((len(q), len(sinks), 1, q.shape[-1]))
    for row, position in enumerate(case.positions):
        capacity = keys[row].shape[1]
        oldest = 0 if case.window is None else max(0, position - case.window + 1)
        places = [p % capacity for p in range(oldest, position + 1)]
        for head in range(len(sinks)):
            k, v = keys[row][head // case.group][places], values[row][head // case.group][places]
            scores = k @ q[row, head, 0] * FACTOR
            top = max(scores.max(), sinks[head])
            powers = np.exp(scores - top)
            out[row, head, 0] = powers @ v / (powers.sum() + np.exp(sinks[head] - top))
    return out


def check(run, close, case: Case) -> None:
    arguments, keys, values = build(case)
    (found,) = run(Attend(FACTOR), *arguments, max(case.positions) + 1)
    name = f"attention, {'full' if case.window is None else 'sliding'}, {case.bits}-bit K/V"
    # Large scores: an error of a score, relative to the score, is one of the result.
    close(name, found, exact(case, arguments, keys, values), case.dtype, factor=max(1.0, case.size * 2))


@pytest.mark.parametrize("case", [*FULL, *SLIDING, *EXTREME], ids=str)
def test_attention(run, close, case):
    check(run, close, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=str)
def test_more_heads_and_borders(run, close, case):
    check(run, close, case)


def test_launches(metal):
    """A second one joins the parts of a long context."""
    if metal is None:
        pytest.skip("MLX counts no launches")
    for positions, window, capacity, names in (
        ((200,), None, 0, ["attention"]),
        ((300,), None, 0, ["attention", "merge"]),
        ((9000,), 128, 131, ["attention"]),
    ):
        arguments, *_ = build(Case(positions, window, capacity))
        metal.launches.clear()
        Attend(FACTOR)(*arguments, positions[0] + 1)
        assert metal.launches == names


@pytest.mark.parametrize("case", [FULL[0], FULL[13], SLIDING[-2], FULL[17]], ids=str)
def test_the_twin_computes_the_same(close, case):
    case = Case(**vars(case) | {"dtype": mx.float32})
    arguments, keys, values = build(case)
    # MLX adds keys that are not seen with a weight of 0.
    arguments[1] = [mx.where(mx.isnan(a), 0, a) if a.dtype != mx.uint32 else a for a in arguments[1]]
    found = wide(attend(*arguments, FACTOR))
    name = f"attention, {'full' if case.window is None else 'sliding'}, {case.bits}-bit K/V (twin)"
    close(name, found, exact(case, arguments, keys, values), mx.float32)


def test_heads_that_the_kernel_takes():
    assert can_attend(64, 8, 64) and can_attend(8, 8, 64) and can_attend(4, 2, 64)
    assert not can_attend(64, 2, 64) and not can_attend(64, 8, 80)
