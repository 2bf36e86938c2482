"""Attention against float64: rows of different lengths, splits, rings, windows, chunks, keys and values in 8 bits.

Keys and values that no query may see are NaN, and so are outputs before a kernel writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mlx_gptoss.backends.cuda.kernels import attention as kernels
from mlx_gptoss.backends.cuda.quantized_kv import Packed, pack

SCALE = 0.125
# A GPU's exp2 (ex2.approx) and division are off by up to 2 units of 2^-23. Weights, their sum, what joins the splits of
# both and the quotient make 5 times that, 1.2e-6; its sums may be off by twice as much as numpy's, in another order.
TOLERANCES = {
    torch.float32: 2 * 2e-6 + 5 * 2 * 2**-23 if torch.cuda.is_available() else 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random(*shape: int, seed: int, dtype=torch.float32, device=None) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def nan(*shape: int, dtype=torch.float32, device=None) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def mixed_sinks(H: int) -> torch.Tensor:
    """Sinks float32 [H]: one that takes all the weight, one that takes none, and others that take a part."""
    sinks = random(H, seed=9) * 2
    sinks[0], sinks[1] = 1e4, -1e4
    return sinks


def oracle(q, keys, values, sinks, seen) -> torch.Tensor:
    """q [L, H, 64], keys and values [K, C, 64], seen bool [L, C] -> float64 [L, H, 64]"""
    (L, H, _), K = q.shape, keys.shape[0]
    k, v = keys.double().nan_to_num(), values.double().nan_to_num()
    scores = torch.einsum("lkgd,kcd->lkgc", q.double().view(L, K, H // K, 64) * SCALE, k)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    sink = sinks.double().view(1, K, H // K, 1).expand(L, -1, -1, -1)
    weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("lkgc,kcd->lkgd", weights, v).reshape(L, H, 64)


@dataclass
class Step:
    """One decoding step: B rows in other slots than their own number, NaN wherever a row has not been. packed: the
    cache is in 8 bits, and keys and values are what it holds."""

    positions: list[int]
    H: int
    K: int
    C: int
    dtype: torch.dtype
    device: torch.device
    packed: bool = False

    def __post_init__(self) -> None:
        B = len(self.positions)
        self.q = random(B, self.H, 64, seed=1, dtype=self.dtype, device=self.device)
        self.sinks = mixed_sinks(self.H).to(self.device)
        self.slots = torch.arange(B).roll(1).add(1).to(self.device, torch.int32)
        self.keys, self.values = (
            nan(B + 2, self.K, self.C, 64, dtype=self.dtype, device=self.device) for _ in range(2)
        )
        for slot, position in zip(self.slots.tolist(), self.positions, strict=True):
            written = min(position + 1, self.C)
            for seed, cache in enumerate((self.keys, self.values)):
                cache[slot, :, :written] = random(self.K, written, 64, seed=10 * slot + seed).to(cache)
        self.cached: list[torch.Tensor] | list[Packed] = [self.keys, self.values]
        if self.packed:
            self.cached = [pack(cache) for cache in (self.keys, self.values)]
            self.keys, self.values = (cache.dequantized(torch.float64) for cache in self.cached)

    def run(self, window: int | None) -> torch.Tensor:
        B, on = len(self.positions), torch.tensor(self.positions, dtype=torch.int32, device=self.device)
        out = nan(B, self.H * 64, dtype=self.dtype, device=self.device)
        scratch = None
        if window is None:
            scratch = kernels.decode_scratch(B, self.H, self.K, self.C, self.dtype, self.device).fill_(torch.nan)
        kernels.decode_attention(
            *(self.q, *self.cached, self.slots, on, self.sinks, SCALE, out, scratch), window=window
        )
        return out

    def wanted(self, window: int | None = None) -> torch.Tensor:
        rows = []
        for q, slot, position in zip(self.q, self.slots.tolist(), self.positions, strict=True):
            seen = torch.arange(self.C, device=self.device)[None] <= position
            if window is not None:  # position p is entry p % C
                seen = seen & ((position - torch.arange(self.C, device=self.device)) % self.C < window)[None]
            rows.append(oracle(q[None], self.keys[slot], self.values[slot], self.sinks, seen).view(-1))
        return torch.stack(rows)


@dtypes
@pytest.mark.parametrize(
    "programs, longest, packed",
    [(1, 8192, False), (24, 8192, False), (264, 8192, False), (24, 64, False), (1, 8192, True), (24, 8192, True)],
)
def test_decoding_splits_rows_of_very_different_lengths(monkeypatch, close, device, dtype, programs, longest, packed):
    """One split, two, and more than most rows have blocks; last, MAX_SPLIT makes more than PROGRAMS asks for."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    monkeypatch.setattr(kernels, "MAX_SPLIT", longest)
    step = Step([0, 299, 63, -1, 64, 31], H=8, K=2, C=300, dtype=dtype, device=device, packed=packed)
    out = step.run(window=None)
    close(out, step.wanted(), TOLERANCES[dtype])
    assert (out[3] == 0).all()


@pytest.mark.parametrize("H, K", [(4, 4), (6, 2), (20, 1)])
def test_decoding_with_other_numbers_of_heads(close, device, H, K):
    step = Step([130, 5], H=H, K=K, C=140, dtype=torch.float32, device=device)
    close(step.run(window=None), step.wanted(), TOLERANCES[torch.float32])


@dtypes
@pytest.mark.parametrize("window, slack", [(8, 0), (128, 0), (8, 3), (128, 3)])
def test_rings_at_the_border(close, device, dtype, window, slack):
    """With slack, what a row does not see any more is there, and here NaN."""
    positions = [0, 1, window - 2, window - 1, window, window + 1, window + slack + 1, 1000, -1]
    step = Step(positions, H=8, K=2, C=window + slack, dtype=dtype, device=device)
    for slot, position in zip(step.slots.tolist(), positions, strict=True):
        for p in range(position - window - slack + 1, position - window + 1):
            if p >= 0:
                step.keys[slot, :, p % step.C], step.values[slot, :, p % step.C] = torch.nan, torch.nan
    out = step.run(window)
    close(out, step.wanted(window), TOLERANCES[dtype])
    assert (out[-1] == 0).all()


def test_a_sink_far_above_or_below_every_score(close, device):
    step = Step([200], H=4, K=2, C=256, dtype=torch.float32, device=device)
    out, wanted = step.run(window=None).view(4, 64), step.wanted().view(4, 64)
    assert (out[0] == 0).all()
    close(out[1], wanted[1], TOLERANCES[torch.float32])


def test_too_little_scratch_is_refused(device):
    step = Step([1], H=4, K=2, C=300, dtype=torch.float32, device=device)
    args = (step.q, step.keys, step.values, step.slots, step.slots, step.sinks, SCALE, step.q.view(1, -1))
    for scratch in (None, nan(4)):
        with pytest.raises(ValueError, match="decode_scratch"):
            kernels.decode_attention(*args, scratch, window=None)


def prefill(q, keys, values, sinks, window, first) -> torch.Tensor:
    out = nan(*q.shape, dtype=q.dtype, device=q.device)
    kernels.prefill_attention(q, keys, values, sinks, SCALE, out, window=window, first=first)
    return out


def visible(L: int, C: int, window: int | None, first: int, device) -> torch.Tensor:
    place, j = torch.arange(C - L, C, device=device)[:, None], torch.arange(C, device=device)
    seen = (j >= first) & (j <= place)
    return seen if window is None else seen & (place - j < window)


@dtypes
@pytest.mark.parametrize(
    "L, C, window, first",
    [(1, 1, None, 0), (1, 130, None, 0), (65, 65, None, 0), (40, 170, None, 0), (30, 80, None, 17)]
    + [(L, L + 16, 16, first) for L in (1, 15, 16, 17) for first in (0, 5, 16)]
    + [(2, 130, 128, 128), (140, 268, 128, 120), (10, 300, 128, 0)],
)
def test_prefill(close, device, dtype, L, C, window, first):
    q, sinks = random(L, 8, 64, seed=1, dtype=dtype, device=device), mixed_sinks(8).to(device)
    keys, values = (nan(2, C + 64, 64, dtype=dtype, device=device)[:, :C] for _ in range(2))
    seen = visible(L, C, window, first, device)
    ever = seen.any(dim=0)
    for seed, cache in enumerate((keys, values), start=2):
        cache[:, ever] = random(2, int(ever.sum()), 64, seed=seed).to(cache)
    out = prefill(q, keys, values, sinks, window, first)
    close(out, oracle(q, keys, values, sinks, seen), TOLERANCES[dtype])


@pytest.mark.parametrize("H, K", [(4, 4), (6, 2), (20, 1)])
def test_prefill_of_columns_and_transposed_heads(close, device, H, K):
    """q, k and v are views of the fused projection, and the output is a view of a wider tensor."""
    L, sinks = 35, mixed_sinks(H).to(device)
    qkv = random(L, H + 2 * K, 64, seed=1, device=device)
    q, k, v = qkv.split([H, K, K], dim=1)
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    wide = nan(L, H + 3, 64, device=device)
    kernels.prefill_attention(q, k, v, sinks, SCALE, wide[:, :H], window=None, first=0)
    close(wide[:, :H], oracle(q, k, v, sinks, visible(L, L, None, 0, device)), TOLERANCES[torch.float32])
    assert wide[:, H:].isnan().all()


@pytest.mark.parametrize("window", [None, 16])
def test_chunks_equal_the_whole(close, device, window):
    """A full layer passes all keys so far. A sliding one passes a window of past keys; those before position 0 are
    NaN."""
    L, sinks = 75, mixed_sinks(4).to(device)
    q = random(L, 4, 64, seed=1, device=device)
    k, v = (random(2, L, 64, seed=seed, device=device) for seed in (2, 3))
    whole, parts, start = prefill(q, k, v, sinks, window, 0), [], 0
    for end in (9, 14, 50, 75):
        past = start if window is None else min(start, window)
        before = past if window is None else window
        band = [torch.cat([nan(2, before - past, 64, device=device), x[:, start - past : end]], dim=1) for x in (k, v)]
        parts.append(prefill(q[start:end], *band, sinks, window, before - past))
        start = end
    close(torch.cat(parts), whole, TOLERANCES[torch.float32])


@pytest.fixture
def gpu(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("torch finds no GPU")
    return device


def captured(work) -> torch.cuda.CUDAGraph:
    work()  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def milliseconds(work, repeats: int = 30) -> float:
    """The median."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


@pytest.mark.cuda
@pytest.mark.parametrize("S, C", [(16, 8192), (33, 131072)])
def test_decoding_at_real_sizes(gpu, close, record_property, S, C):
    """All rows at once, in a graph that is replayed at other positions, then each row alone; records the GB/s of the
    latter. 33 slots of 131072 entries have more than 2**31 elements, and exceed every GPU's cache."""
    keys, values = (torch.randn(S, 8, C, 64, dtype=torch.bfloat16, device=gpu) for _ in range(2))
    q, sinks = torch.randn(S, 64, 64, dtype=torch.bfloat16, device=gpu), torch.randn(64, device=gpu)
    slots = torch.arange(S, dtype=torch.int32, device=gpu)
    positions, out = torch.full_like(slots, C - 1), torch.empty_like(q).view(S, -1)

    def step(rows: slice, scratch: torch.Tensor) -> None:
        some = q[rows], keys, values, slots[rows], positions[rows], sinks, SCALE, out[rows], scratch
        kernels.decode_attention(*some, window=None)

    def check(graph: torch.cuda.CUDAGraph) -> None:
        out.fill_(torch.nan)
        graph.replay()
        for row in (0, 1, S - 1):
            seen = torch.arange(C, device=gpu)[None] <= positions[row]
            close(out[row].view(1, 64, 64), oracle(q[row, None], keys[row], values[row], sinks, seen), 1.5e-2)
        assert out.isfinite().all()

    together, alone = (kernels.decode_scratch(B, 64, 8, C, torch.bfloat16, gpu).fill_(torch.nan) for B in (S, 1))
    graph = captured(lambda: step(slice(S), together))
    for last in (C - 1, 100, 1000):
        positions[1:] = last
        check(graph)
    positions.fill_(C - 1)
    graph = captured(lambda: [step(slice(row, row + 1), alone) for row in range(S)])
    check(graph)
    record_property("GB/s", (keys.nbytes + values.nbytes) / milliseconds(graph.replay) / 1e6)


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 128])
def test_prefill_at_real_sizes(gpu, close, record_property, window):
    """8192 tokens after a long context, or after a window: some queries against float64. Records the TFLOP/s."""
    L = 8192
    C = 131072 if window is None else L + window
    q = torch.randn(L, 64, 64, dtype=torch.bfloat16, device=gpu)
    k, v = (torch.randn(8, C, 64, dtype=torch.bfloat16, device=gpu) for _ in range(2))
    sinks, out = torch.randn(64, device=gpu), nan(L, 64, 64, dtype=torch.bfloat16, device=gpu)
    took = milliseconds(
        lambda: kernels.prefill_attention(q, k, v, sinks, SCALE, out, window=window, first=0), repeats=5
    )
    some = torch.tensor([0, 1, 15, 16, 127, 128, 4095, 8190, 8191], device=gpu)
    seen = visible(L, C, window, 0, gpu)
    close(out[some], oracle(q[some], k, v, sinks, seen[some]), 1.5e-2)
    assert out.isfinite().all()
    record_property("TFLOP/s", int(seen.sum()) * 64 * 4 * 64 / took / 1e9)
