"""Which experts a token goes to: the router, the best of its scores, and pairs of token and expert sorted by expert.

Pair p belongs to token p // A. A step of one token needs no sorting: its programs find the best experts themselves.

Legend: T tokens, E experts, A active experts, P = T * A pairs, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layers import Matrix
from .dequant import outer_factor, weight_args, weight_tile
from .launch import launch

SORTED_AT_ONCE = 64  # tokens that one program sorts; more are sorted by torch


@dataclass(frozen=True)
class Groups:
    """Pairs by expert: order int32 [P] lists them, expert e's at starts[e]..starts[e + 1], int32 [E + 1]; weights
    float32 [P] are each pair's own."""

    order: Tensor
    starts: Tensor
    weights: Tensor

    def held(self, experts: range) -> Groups:
        """Those of a range of the experts."""
        return replace(self, starts=self.starts[experts.start : experts.stop + 1])


@triton.jit
def _router(
    x,
    norm,
    bias,
    out,
    w,
    w_scale,
    w_bias,
    w_outer,
    eps,
    E: tl.constexpr,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUTER: tl.constexpr,
    BK: tl.constexpr,
):
    """A program an expert and token, all loads at once: latency is what this small product costs."""
    expert = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    rows = expert + tl.zeros((1,), tl.int64)
    k = tl.arange(0, BK)
    tokens = tl.load(x + row * K + k, mask=k < K, other=0).to(tl.float32)
    if norm is not None:
        factor = tl.rsqrt(tl.sum(tokens * tokens, 0) / K + eps)
        tokens *= tl.load(norm + k, mask=k < K, other=0).to(tl.float32) * factor
    weights = weight_tile(w, w_scale, w_bias, rows, rows >= 0, 0, K, ELEMENT, SCALE, GROUP, 1, BK, tl.float32)
    score = tl.sum(weights * tokens[None, :], 1) * outer_factor(w_outer, rows, rows >= 0, OUTER, 1)
    score += tl.load(bias + rows).to(tl.float32)
    tl.store(out + row * E + rows, score)


def router(
    x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, *, norm: Tensor | None = None, eps: float = 0.0
) -> None:
    """out float32 [T, E] = RMSNorm(x [T, D]) @ matrix [E, D]^T + bias [E]; without norm, x as it is."""
    T, K = x.shape
    E = matrix.shape[0]
    BK = triton.next_power_of_2(K)
    launch(_router, (E, T), x, norm, bias, out, eps=eps, E=E, K=K, BK=BK, num_warps=4, **weight_args(matrix))


@triton.jit
def best_of(logits, n, E: tl.constexpr, A: tl.constexpr, BE: tl.constexpr):
    """The A largest of logits[n, :E]: experts int32 [A], likeliest first, and the softmax over those, float32 [A]."""
    e = tl.arange(0, BE)
    left = tl.load(logits + n * E + e, mask=e < E, other=-float("inf"))
    a = tl.arange(0, A)
    experts = tl.zeros((A,), tl.int32)
    scores = tl.zeros((A,), tl.float32)
    for i in tl.static_range(A):
        best = tl.argmax(left, 0)
        experts = tl.where(a == i, best.to(tl.int32), experts)
        scores = tl.where(a == i, tl.max(left, 0), scores)
        left = tl.where(e == best, -float("inf"), left)
    scores = tl.exp(scores - tl.max(scores, 0))
    return experts, scores / tl.sum(scores, 0)


@triton.jit
def _sort(
    logits,
    positions,
    order,
    starts,
    weights,
    T,
    E: tl.constexpr,
    A: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: the best experts of up to BT tokens, and a counting sort of their pairs."""
    t = tl.arange(0, BT)
    e = tl.arange(0, BE)
    a = tl.arange(0, A)
    here = t < T
    busy = tl.load(positions + t, mask=here, other=-1) >= 0
    left = tl.load(logits + t[:, None] * E + e[None, :], mask=here[:, None] & (e < E)[None, :], other=0)
    left = tl.where((e < E)[None, :], left, -float("inf"))
    experts = tl.full((BT, A), E, tl.int32)
    scores = tl.full((BT, A), -float("inf"), tl.float32)
    for i in tl.static_range(A):
        best = tl.argmax(left, 1)
        experts = tl.where((a == i)[None, :], best.to(tl.int32)[:, None], experts)
        scores = tl.where((a == i)[None, :], tl.max(left, 1)[:, None], scores)
        left = tl.where(e[None, :] == best[:, None], -float("inf"), left)
    scores = tl.exp(scores - tl.max(scores, 1)[:, None])
    scores /= tl.sum(scores, 1)[:, None]
    pair = t[:, None] * A + a[None, :]
    tl.store(weights + pair, scores, mask=here[:, None])
    experts = tl.where(busy[:, None], experts, -1).reshape(BT * A)
    place = tl.zeros((BT * A,), tl.int32)
    before = tl.zeros((), tl.int32)
    for e0 in tl.static_range(0, E, CHUNK):
        some = e0 + tl.arange(0, CHUNK)
        mine = (experts[:, None] == some[None, :]).to(tl.int32)  # [P, CHUNK]
        count = tl.sum(mine, 0)
        first = before + tl.cumsum(count, 0) - count
        tl.store(starts + some, first, mask=some < E)
        place += tl.sum(mine * (first[None, :] + tl.cumsum(mine, 0) - 1), 1)
        before += tl.sum(count, 0)
    tl.store(starts + E, before)
    tl.store(order + place, pair.reshape(BT * A), mask=experts >= 0)


def sort(logits: Tensor, positions: Tensor, active: int, groups: Groups) -> None:
    """Fill `groups` from router logits float32 [T, E], T <= 64, without the rows whose position is -1."""
    T, E = logits.shape
    BE = triton.next_power_of_2(E)
    launch(
        _sort,
        (1,),
        *(logits, positions, groups.order, groups.starts, groups.weights, T),
        E=E,
        A=active,
        BE=BE,
        BT=max(2, triton.next_power_of_2(T)),
        CHUNK=min(32, BE),
        num_warps=8 if T > 16 else 4,
    )


def sort_many(logits: Tensor, active: int) -> Groups:
    """The same for any number of tokens, all of them busy; the host is not waited for."""
    E = logits.shape[1]
    scores, experts = logits.topk(active, dim=-1)
    flat = experts.flatten()
    counts = torch.zeros(E + 1, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(0, flat + 1, torch.ones_like(flat, dtype=torch.int32))
    order = flat.argsort(stable=True).int()
    return Groups(order, counts.cumsum(0, dtype=torch.int32), scores.softmax(dim=-1).flatten())


@triton.jit
def group_of(starts, n, E: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    """The n-th tile of at most BT pairs of one expert: (expert, first, end) into `order`; first >= end past the last
    tile."""
    e = tl.arange(0, BE)
    first = tl.load(starts + e, mask=e < E, other=0)
    end = tl.load(starts + e + 1, mask=e < E, other=0)
    tiles = (end - first + BT - 1) // BT
    until = tl.cumsum(tiles, 0)
    mine = (until > n) & (until - tiles <= n)  # one expert, or none
    expert = tl.sum(tl.where(mine, e, 0), 0)
    start = tl.sum(tl.where(mine, first + (n - until + tiles) * BT, 0), 0)
    return expert, start, tl.minimum(start + BT, tl.sum(tl.where(mine, end, 0), 0))
