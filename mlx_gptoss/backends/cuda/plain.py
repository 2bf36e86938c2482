"""Operations in PyTorch: the path of a CPU, and the reference of the kernels.

A product decodes its matrix block by block, in float32 and by the one formula of weights/tensor.py, into operands of
the activations' dtype. On a CPU, threads share the blocks.

Legend: as in layers.py; C keys, W window.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import ExpertAdapter, LowRank, add_linear
from .layers import Experts, Rotation
from .matrices import DenseMatrix, Matrix
from .quantized_kv import KeysOrValues, Packed, as_computed, pack

# Elements decoded at once. On a CPU the block stays in the cache until the product reads it.
CPU_BLOCK = 1 << 20
GPU_BLOCK = 1 << 24

# Attention scores in memory at once: 64 MB of float32 on a CPU, 256 MB on a GPU.
CPU_SCORES = 1 << 24
GPU_SCORES = 1 << 26


class TorchOperations:
    """threads: the number of threads that share a product's blocks.

    Decoding a block is a chain of small operations, some of which torch runs on one core. So threads share whole
    blocks, and each thread's operations stay on one core.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = _single_core_pool(threads) if threads > 1 else None

    def stored(self, matrix: Matrix) -> Matrix:
        """As it is."""
        return matrix

    def product(self, x: Tensor, matrix: Matrix, *, wide: bool = False) -> Tensor:
        """x [T, D] times a matrix [N, D], transposed -> [T, N] of x's dtype, or float32 if `wide`"""
        dtype, out = x.dtype, torch.float32 if wide else x.dtype
        if isinstance(matrix, DenseMatrix) and matrix.weight.dtype == out == dtype:
            return x @ matrix.weight.mT
        x = x.to(out)
        count, width = matrix.shape
        step = max(1, (CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK) // width)
        blocks = range(0, count, step)
        left = iter(blocks)  # the next free thread takes the next block
        y = x.new_empty((x.shape[0], count))  # of dtype `out`

        def work() -> None:
            with torch.inference_mode():
                for start in left:
                    rows = slice(start, start + step)
                    torch.mm(x, matrix.at(rows).decode(dtype).to(out).mT, out=y[:, rows])

        if self._pool is None or len(blocks) == 1:
            work()
        else:
            for done in [self._pool.submit(work) for _ in range(min(self._threads, len(blocks)))]:
                done.result()
        return y

    def rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x [B, L, heads * 64], whose pairs are (i, i + 32) of a head -> rotated [B, heads, L, 64]"""
        a, b = heads_of(x, 2 * rotation.cos.shape[-1]).float().chunk(2, dim=-1)
        return torch.cat([a * rotation.cos - b * rotation.sin, b * rotation.cos + a * rotation.sin], dim=-1).to(x.dtype)

    def pack(self, x: Tensor) -> Packed:
        """Keys or values [B, K, L, 64] in 8 bits"""
        return pack(x)

    def attend_one(
        self, q: Tensor, keys: KeysOrValues, values: KeysOrValues, mask: Tensor | None, sinks: Tensor, scale: float
    ) -> Tensor:
        """One query a row, [B, H, 1, 64], over keys [B, K, C, 64] where mask, bool [B, 1, 1, C], is true or None."""
        keys, values = as_computed(keys, q.dtype), as_computed(values, q.dtype)
        return _merge_heads(_attend(q, keys, values, mask, sinks, scale), q.dtype)

    def attend_causal(self, q: Tensor, keys: KeysOrValues, values: KeysOrValues, sinks: Tensor, scale: float) -> Tensor:
        """A block of queries at a time, each over the keys up to its end."""
        keys, values = as_computed(keys, q.dtype), as_computed(values, q.dtype)
        L, C = q.shape[2], keys.shape[2]
        size = _queries_at_a_time(q, C)
        parts = []
        for start in range(0, L, size):
            block = q[:, :, start : start + size]
            first, end = C - L + start, C - L + start + block.shape[2]
            i = torch.arange(first, end, device=q.device)[:, None]
            mask = torch.arange(end, device=q.device)[None, :] <= i
            parts.append(_attend(block, keys[:, :, :end], values[:, :, :end], mask, sinks, scale))
        return _merge_heads(torch.cat(parts, dim=2), q.dtype)

    def attend_sliding(self, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, scale: float, past: int) -> Tensor:
        """Work per token does not grow with L: of more than W queries, block n of W sees only the keys
        [n W, n W + 2 W)."""
        dtype, L = q.dtype, q.shape[2]
        W = keys.shape[2] - L
        if L <= W:
            seen = slice(W - past, None)
            return _merge_heads(_within_window(q, keys[:, :, seen], values[:, :, seen], sinks, scale, W), dtype)
        n = -(-L // W)
        pad = (0, 0, 0, n * W - L)
        q = _blocks(F.pad(q, pad), W)  # [n, H, W, 64]
        k, v = (_blocks(F.pad(a, pad), W) for a in (keys, values))  # [n + 1, K, W, 64]
        keys, values = (torch.cat([a[:-1], a[1:]], dim=2) for a in (k, v))  # [n, K, 2 W, 64]
        # Query i is at index W + i of its block's keys and sees the W keys up to itself.
        i, j = torch.arange(W, device=q.device)[:, None], torch.arange(2 * W, device=q.device)[None, :]
        mask = ((j > i) & (j <= i + W)).expand(n, 1, W, 2 * W)
        if past < W:  # the first block's oldest keys are before position 0
            exists = (torch.arange(n, device=q.device)[:, None] > 0) | (j >= W - past)
            mask = mask & exists[:, None, None, :]
        y = _attend(q, keys, values, mask, sinks, scale)  # [n, H, W, 64]
        return _merge_heads(y.transpose(0, 1).reshape(1, y.shape[1], n * W, y.shape[3])[:, :, :L], dtype)

    def mixture(self, x: Tensor, scores: Tensor, experts: Experts, adapters: Sequence[ExpertAdapter] = ()) -> Tensor:
        """Each expert in use is decoded once, for all tokens that chose it."""
        best, chosen = scores.topk(experts.active, dim=-1)  # [T, A]
        weights = best.softmax(dim=-1).flatten()
        order = chosen.flatten().argsort(stable=True)  # pairs of token and expert, by expert
        counts = chosen.flatten().bincount(minlength=scores.shape[-1])
        y = torch.zeros_like(x, dtype=torch.float32)
        start = 0
        for expert, count in enumerate(counts.tolist()):  # waits for a GPU
            if count and expert in experts.local_experts:
                index = expert - experts.local_experts.start
                pairs = order[start : start + count]
                tokens = pairs // experts.active
                added = [(_expert(each.gate_up, index), _expert(each.down, index), each.tokens) for each in adapters]
                uses = [(i, None if rows is None else rows[tokens]) for i, (_, _, rows) in enumerate(added)]
                gate_up = experts.gate_up.expert(index, self)(x[tokens])
                gate_up = add_linear(gate_up, x[tokens], [low_rank for low_rank, _, _ in added], uses)
                gate, up = gate_up.chunk(2, dim=-1)
                hidden = clamped_swiglu(gate, up, experts.limit, experts.alpha)
                out = experts.down.expert(index, self)(hidden)
                out = add_linear(out, hidden, [low_rank for _, low_rank, _ in added], uses)
                y.index_add_(0, tokens, out.float() * weights[pairs, None])
            start += count
        return y.to(x.dtype)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _expert(bank: LowRank | None, index: int) -> LowRank | None:
    return None if bank is None else LowRank(bank.a[index], bank.b[index])


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + 1), gate clamped from above and up on both sides."""
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def heads_of(x: Tensor, dim: int) -> Tensor:
    """[B, L, heads * dim] -> [B, heads, L, dim]"""
    return x.view(*x.shape[:-1], -1, dim).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor, scale: float) -> Tensor:
    """Softmax attention with one more column per head, the sink, which is dropped afterwards. Float32 throughout.

    q [B, H, L, 64], k and v [B, K, C, 64], mask bool [..., L, C], sinks [H] -> float32 [B, H, L, 64]
    """
    B, H, L, dim = q.shape
    K, C = k.shape[1:3]
    packed = (q.float() * scale).reshape(B, K, H // K * L, dim)  # the heads that share keys, as one matrix
    scores = (packed @ k.float().mT).view(B, H, L, C)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    sinks = sinks[:, None, None]
    top = torch.maximum(scores.amax(dim=-1, keepdim=True), sinks)  # [B, H, L, 1]
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True) + (sinks - top).exp()
    y = weights.view(B, K, H // K * L, C) @ v.float()
    return y.view(B, H, L, dim) / total


def _queries_at_a_time(q: Tensor, keys: int) -> int:
    """How many of the queries [B, H, L, 64] attend to `keys` keys at once, so that their scores stay small."""
    return max(1, (CPU_SCORES if q.device.type == "cpu" else GPU_SCORES) // (q.shape[1] * keys))


def _within_window(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float, window: int) -> Tensor:
    """Sliding attention of at most W queries [1, H, L, 64] over P past keys and their own, [1, K, P + L, 64], a part of
    the queries at a time: a window may be long (8192 in gpt-oss-puzzle)."""
    L = q.shape[2]
    P, size = k.shape[2] - L, _queries_at_a_time(q, k.shape[2])
    parts = []
    for first in range(0, L, size):
        end = min(first + size, L)
        start = max(0, P + first - window + 1)  # the oldest key that any of these queries sees
        i = torch.arange(P + first, P + end, device=q.device)[:, None]
        j = torch.arange(start, P + end, device=q.device)[None, :]
        mask, seen = (j > i - window) & (j <= i), slice(start, P + end)
        parts.append(_attend(q[:, :, first:end], k[:, :, seen], v[:, :, seen], mask, sinks, scale))
    return torch.cat(parts, dim=2)


def _merge_heads(y: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, L, 64] -> [B, L, H * 64]"""
    return y.to(dtype).transpose(1, 2).flatten(2)


def _blocks(x: Tensor, size: int) -> Tensor:
    """[1, heads, n * size, 64] -> [n, heads, size, 64]"""
    _, heads, length, dim = x.shape
    return x.reshape(heads, length // size, size, dim).transpose(0, 1)


def _single_core_pool(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads run their operations on one core. torch applies that setting to the calling thread and to
    all threads started later; for the latter it is reset at the end."""
    pool, barrier = ThreadPoolExecutor(threads, "gptoss-product"), Barrier(threads)

    def use_one_core() -> None:
        torch.set_num_threads(1)
        barrier.wait()  # so that each task runs on a thread of its own

    for done in [pool.submit(use_one_core) for _ in range(threads)]:
        done.result()
    torch.set_num_threads(threads)
    return pool
