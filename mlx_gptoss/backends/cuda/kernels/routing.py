"""Which experts a token goes to: the router, its best scores, and pairs of token and expert sorted by expert.

Pair p is the (p % A)-th expert of token p // A. A decoding step of one token sorts nothing: each of its programs finds
the best experts by itself, with `top_experts`.

Legend: T tokens, E experts, A active experts of a token, P = T * A pairs, D hidden; BE is E or the next power of two,
BT the tokens or pairs of a program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..matrices import Matrix
from .dequant import outer_factor, weight_args, weight_tile
from .launch import launch, wait_for_inputs


@dataclass(frozen=True)
class Groups:
    """Pairs sorted by expert.

    order: int32 [P], the pairs; those of expert e are order[starts[e] : starts[e + 1]]
    starts: int32 [E + 1]
    weights: float32 [P], by pair: what the expert's result is multiplied by
    """

    order: Tensor
    starts: Tensor
    weights: Tensor

    def of_experts(self, experts: range) -> Groups:
        """The groups of a range of the experts; `order` and `weights` still have every pair."""
        return replace(self, starts=self.starts[experts.start : experts.stop + 1])


@triton.jit
def _router_kernel(
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
    """One expert's score for one token in each program. BK covers all of K, so that every load starts at once: latency
    is what this small product costs.

    x: [T, K]. norm: [K] or None. bias: [E]. out: float32 [T, E]. w, ..., OUTER: the matrix [E, K], see `weight_args`
    """
    wait_for_inputs()
    expert = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    rows = expert + tl.zeros((1,), tl.int64)
    k = tl.arange(0, BK)
    tokens = tl.load(x + row * K + k, mask=k < K, other=0).to(tl.float32)
    if norm is not None:
        factor = tl.rsqrt(tl.sum(tokens * tokens, 0) / K + eps)
        tokens *= tl.load(norm + k, mask=k < K, other=0).to(tl.float32) * factor
    weights = weight_tile(w, w_scale, w_bias, rows, None, 0, K, ELEMENT, SCALE, GROUP, 1, BK, tl.float32)
    score = tl.sum(weights * tokens[None, :], 1) * outer_factor(w_outer, rows, None, OUTER, 1)
    score += tl.load(bias + rows).to(tl.float32)
    tl.store(out + row * E + rows, score)


def router(
    x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, *, norm: Tensor | None = None, eps: float = 0.0
) -> None:
    """out float32 [T, E] = RMSNorm(x [T, D]) @ matrix [E, D]^T + bias [E]; norm [D] may be None, for no norm."""
    T, K = x.shape
    E = matrix.shape[0]
    BK = triton.next_power_of_2(K)
    launch(_router_kernel, (E, T), x, norm, bias, out, eps=eps, E=E, K=K, BK=BK, num_warps=4, **weight_args(matrix))


@triton.jit
def top_experts(logits, n, E: tl.constexpr, A: tl.constexpr, BE: tl.constexpr):
    """The A largest of logits[n], float32 [any, E]: their experts, int32 [A], best first, and the softmax over those A,
    float32 [A]."""
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


@triton.jit(do_not_specialize=["T"])
def _sort_pairs_kernel(
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
    """The best experts of up to BT tokens and a counting sort of their pairs, CHUNK experts at a time, in one program.

    logits: float32 [T, E]. positions: int32 [T]; a row at -1 is idle and gets no pairs
    order, starts, weights: written; see Groups
    """
    wait_for_inputs()
    t = tl.arange(0, BT)
    e = tl.arange(0, BE)
    a = tl.arange(0, A)
    token_mask = t < T
    busy = tl.load(positions + t, mask=token_mask, other=-1) >= 0
    left = tl.load(logits + t[:, None] * E + e[None, :], mask=token_mask[:, None] & (e < E)[None, :], other=0)
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
    tl.store(weights + pair, scores, mask=token_mask[:, None])
    experts = tl.where(busy[:, None], experts, -1).reshape(BT * A)
    target = tl.zeros((BT * A,), tl.int32)  # where each pair goes in `order`
    before = tl.zeros((), tl.int32)  # pairs of the chunks so far
    for e0 in tl.static_range(0, E, CHUNK):
        chunk = e0 + tl.arange(0, CHUNK)
        matches = (experts[:, None] == chunk[None, :]).to(tl.int32)  # [P, CHUNK]
        count = tl.sum(matches, 0)
        first = before + tl.cumsum(count, 0) - count
        tl.store(starts + chunk, first, mask=chunk < E)
        target += tl.sum(matches * (first[None, :] + tl.cumsum(matches, 0) - 1), 1)
        before += tl.sum(count, 0)
    tl.store(starts + E, before)
    tl.store(order + target, pair.reshape(BT * A), mask=experts >= 0)


def sort_pairs(logits: Tensor, positions: Tensor, active: int, groups: Groups) -> None:
    """Fill `groups` from router logits float32 [T, E], T <= 64, without the rows whose position, int32 [T], is -1."""
    T, E = logits.shape
    BE = triton.next_power_of_2(E)
    launch(
        _sort_pairs_kernel,
        (1,),
        *(logits, positions, groups.order, groups.starts, groups.weights, T),
        E=E,
        A=active,
        BE=BE,
        BT=max(2, triton.next_power_of_2(T)),
        CHUNK=min(32, BE),
        num_warps=8 if T > 16 else 4,
    )


def sort_many_pairs(logits: Tensor, active: int) -> Groups:
    """Groups from router logits float32 [T, E] of any number of tokens, none of them idle, by torch's own kernels and
    without a synchronization."""
    E = logits.shape[1]
    scores, experts = logits.topk(active, dim=-1)
    flat = experts.flatten()
    counts = torch.zeros(E + 1, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(0, flat + 1, torch.ones_like(flat, dtype=torch.int32))
    order = flat.argsort(stable=True).int()
    return Groups(order, counts.cumsum(0, dtype=torch.int32), scores.softmax(dim=-1).flatten())


@triton.jit
def find_block(starts, n, E: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    """The n-th block of at most BT pairs of one expert, as (expert, start, end) into Groups.order.

    Blocks are counted over the experts in order; past the last one, start >= end. starts: int32 [E + 1].
    """
    e = tl.arange(0, BE)
    first = tl.load(starts + e, mask=e < E, other=0)
    end = tl.load(starts + e + 1, mask=e < E, other=0)
    blocks = (end - first + BT - 1) // BT
    until = tl.cumsum(blocks, 0)
    match = (until > n) & (until - blocks <= n)  # one expert, or none
    expert = tl.sum(tl.where(match, e, 0), 0)
    start = tl.sum(tl.where(match, first + (n - until + blocks) * BT, 0), 0)
    return expert, start, tl.minimum(start + BT, tl.sum(tl.where(match, end, 0), 0))
