"""Memory of the MLX backend: within the plan, constant over a long run."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import psutil
import pytest

from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits, Row, snapshot_space
from mlx_gptoss.config import TINY
from mlx_gptoss.loading.memory import RUNTIME_BYTES, plan_memory
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.synthetic import Synthetic

GREEDY = Sampling(temperature=0)
MB = 1 << 20
# A cache larger than everything else: 16 kB per token in each of two full layers.
CACHE_HEAVY = replace(TINY, num_attention_heads=32, num_key_value_heads=32)
SCORES = 24 * 4 * backend.MAX_SCORES_CPU  # a CPU has several parts of a prompt's attention, and its steps, at once


def generate(runner, prompt: tuple[int, ...], tokens: int, chunk: int, after=lambda step: None) -> list[int]:
    """Greedy tokens, double-buffered as in the engine."""
    for start in range(0, len(prompt), chunk):
        piece = prompt[start : start + chunk]
        ends = start + len(piece) == len(prompt)
        ahead = runner.submit([Row(0, start, piece, GREEDY if ends else None, prompt if ends else None)])
        if not ends:
            ahead.wait()
    ids = []
    for step in range(tokens):
        pending, ahead = ahead, runner.submit([Row(0, len(prompt) + step, None, GREEDY)])
        ids.append(pending.wait()[0].token)
        after(step)
    ahead.wait()
    return ids


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_the_peak_stays_within_the_plan(kv_bits):
    weights = Synthetic(CACHE_HEAVY, "mlx-4bit")
    plan = plan_memory(
        weights.config, weights.size_bytes, 10**12, activation_bytes=4, context=1000, chunk=256, kv_bits=kv_bits
    )
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    runner = backend.load(weights, device="cpu", dtype=None, limits=Limits(1, 1000, 256, kv_bits=kv_bits))
    generate(runner, tuple(range(256)) * 3, 222, 256)
    peak = runner.peak_memory() - before
    cache = 990 * plan.kv_bytes_per_token
    runner.close()
    assert cache + weights.size_bytes < peak < plan.needed_bytes - RUNTIME_BYTES + SCORES


def test_what_snapshots_inside_of_a_chunk_take():
    """Until the next step, no more than the plan counts; each snapshot is one copy, as at the end of a chunk."""
    limits, length = Limits(2, 600, 512), 512
    runner = backend.load(Synthetic(CACHE_HEAVY, "mlx-4bit"), device="cpu", dtype=None, limits=limits)
    tokens, points = tuple(range(256)) * 2, tuple(range(128, length + 1, 128))
    runner.submit([Row(1, length, (1,))]).wait()  # the cache has its full size
    used = []
    for save_at in ((), points):
        runner.submit([Row(0, 0, tokens, save_at=save_at)]).wait()
        mx.clear_cache()
        used.append(mx.get_active_memory())
    kept = used[1] - used[0]
    assert 0.9 * snapshot_space(CACHE_HEAVY, length, 1, 4) < kept <= snapshot_space(CACHE_HEAVY, length, 2, 4)
    saved = [runner.save(0, end - 128, end) for end in points]
    taken = mx.get_active_memory() - used[1]
    assert abs(taken - sum(each.nbytes for each in saved)) < MB
    runner.submit([Row(1, length + 1, (1,))]).wait()
    assert abs(mx.get_active_memory() - used[0] - taken) < MB
    runner.close()


def flat(tokens: int) -> None:
    """Greedy decoding adds nothing but the cache's growth, to MLX's memory and to the process's."""
    runner = backend.load(Synthetic(TINY, "mlx-4bit"), device="cpu", dtype=None, limits=Limits(1, tokens + 100, 256))
    process, seen = psutil.Process(), []

    def look(step: int) -> None:
        if step % (tokens // 10) == 0:
            cache = sum(array.nbytes for array in runner._cache.arrays)
            seen.append((mx.get_active_memory() - cache, process.memory_info().rss - cache))

    generate(runner, (1, 2, 3), tokens, 256, look)
    runner.close()
    (active, resident), last = seen[2], seen[-1]
    assert last[0] - active < MB
    assert last[1] - resident < 16 * MB


def test_a_run_stays_flat():
    flat(1000)


@pytest.mark.slow
def test_a_long_run_stays_flat():
    flat(10_000)


def test_mlx_keeps_no_more_freed_buffers_than_a_prefill_step_needs(mini, monkeypatch):
    set_to = []
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: set_to.append(limit) or 12345)
    limits = Limits(1, 64, 64)
    runner = backend.load(checkpoints.open(mini / "mxfp4"), device="cpu", dtype=None, limits=limits)
    assert len(set_to) == 1 and 0 < set_to[0] < 16 * MB
    runner.close()
    assert set_to[1:] == [12345]


def memory_of_50_overlapping_steps(slots: int) -> float:
    """Bytes that they allocate at most at once, over the size of the cache."""
    context = 2048
    limits = Limits(slots, context, 256)
    runner = backend.load(Synthetic(CACHE_HEAVY, "mlx-4bit"), device="cpu", dtype=None, limits=limits)
    for slot in range(slots):
        runner.submit([Row(slot, context - 1, (5,), GREEDY, (5,))]).wait()  # the cache has its full size
    cache = sum(array.nbytes for array in runner._cache.arrays)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    pending = None
    for step in range(50):
        ahead = runner.submit([Row(slot, context - 50 + step, None, GREEDY) for slot in range(slots)])
        if pending is not None:
            pending.wait()
        pending = ahead
    pending.wait()
    more = mx.get_peak_memory() - before
    runner.close()
    return more / cache


@pytest.mark.parametrize("slots", [1, 3])
def test_50_overlapping_steps_need_no_second_cache(slots, monkeypatch):
    """A step is submitted while the one before it runs, and keys and values are written in place all the same: each
    layer's reader of the last step has ended by then. `selftest` has the same check for a Mac's GPU."""
    from mlx_gptoss.backends.mlx import cache as cache_module
    from mlx_gptoss.backends.mlx.host_step import HostBlock

    in_place = memory_of_50_overlapping_steps(slots)
    write, held = cache_module._write, []

    def write_to_a_copy(cache, *rest):
        """What somebody holds, here the last steps' of every layer, is not written in place."""
        held[:] = [*held[-15:], cache.reshape(-1)]
        return write(cache, *rest)

    in_numpy = HostBlock.attend

    def hold_a_copy(block, x, base, cache, *rest):
        found = in_numpy(block, x, base, cache, *rest)
        held[:] = [*held[-15:], cache.arrays[0] + 0]
        mx.eval(held)
        return found

    monkeypatch.setattr(cache_module, "_write", write_to_a_copy)
    monkeypatch.setattr(HostBlock, "attend", hold_a_copy)
    assert in_place < 0.2 < 0.4 < memory_of_50_overlapping_steps(slots)
