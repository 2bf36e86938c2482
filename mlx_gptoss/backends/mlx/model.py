"""gpt-oss, top-down. Every function gets what it needs as arguments; the cache is the only thing that changes.

Legend: B rows, L tokens, D hidden, H query heads, K kv heads, E experts, A active experts, I intermediate,
T = B * L tokens, W window, V vocabulary.
Reference: openai/gpt-oss, gpt_oss/torch/model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from ...config import ModelConfig
from .adapters import LowRank, add_experts, add_linear
from .cache import Cache, FullCache, LayerCache, RingCache, Span
from .elementwise import Elementwise, by_expert
from .kernels.choose import PLAIN, LayerKernels
from .layers import Attend, ExpertLinear, Linear, MappedRows, Matrix, query_blocks
from .quantized_kv import QuantizedKV
from .ranks import Ranks

MAX_PACKED_QUERIES = 8  # queries; with more, decoding an 8-bit cache first costs less than products with its codes


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings.

    frequencies: float32 [32], positions per radian (the freqs of mx.fast.rope).
    score_scale: 1/sqrt(64) times the squared YaRN concentration, which applies to both q and k.
    """

    frequencies: mx.array
    score_scale: float

    def __call__(self, x: mx.array, offsets: mx.array) -> mx.array:
        """x [B, heads, L, 64], offsets [B]"""
        dims = x.shape[-1]
        return mx.fast.rope(x, dims, traditional=False, base=None, scale=1.0, offset=offsets, freqs=self.frequencies)


@dataclass(frozen=True)
class Attention:
    """qkv: D -> (H + 2 K) * 64; out: H * 64 -> D; sinks [H] in the activation dtype. H and K are this rank's.

    attend: layers.fused, or a function that replaces it. max_scores: maximum attention scores, H * queries * keys,
    that a full-attention layer computes at once; None if `attend` itself bounds them. packed_by_row: an 8-bit cache is
    read by products of one row (QuantizedKV.weighted), and decoded first for several tokens. kernels: the custom ones.
    qkv_adapters, out_adapters: what each adapter adds to qkv and out.
    """

    config: ModelConfig
    qkv: Linear
    out: Linear
    sinks: mx.array
    rotary: Rotary
    ranks: Ranks
    attend: Attend
    max_scores: int | None
    packed_by_row: bool = False
    kernels: LayerKernels = PLAIN
    qkv_adapters: tuple[LowRank | None, ...] = ()
    out_adapters: tuple[LowRank | None, ...] = ()

    def __call__(self, x: mx.array, base: mx.array, cache: LayerCache, span: Span) -> mx.array:
        """x [B, L, D], and the residual plus out.bias, [B, L, D] -> residual + attention of x, [B, L, D]"""
        heads = self._heads(x, cache, span)
        if self.ranks.alone:
            return add_linear(self.out.plus(base, heads), heads, self.out_adapters, span)
        return base + self._product(heads, span)

    def with_norm(
        self, x: mx.array, base: mx.array, cache: LayerCache, span: Span, weight: mx.array
    ) -> tuple[mx.array, mx.array]:
        """As __call__, and the RMSNorm of that by weight [D], with the custom kernel add_norm."""
        assert self.kernels.add_norm is not None
        return self.kernels.add_norm(self._product(self._heads(x, cache, span), span), base, weight)

    def _product(self, heads: mx.array, span: Span) -> mx.array:
        """heads [B, L, H * 64] -> all ranks' output projection without its bias, [B, L, D]"""
        return self.ranks.sum(add_linear(self.out.plus(None, heads), heads, self.out_adapters, span))

    def _heads(self, x: mx.array, cache: LayerCache, span: Span) -> mx.array:
        """x [B, L, D] -> attention of x, [B, L, H * 64]"""
        B, L, _ = x.shape
        x = add_linear(self.qkv(x), x, self.qkv_adapters, span)
        if L == 1 and self.kernels.attend is not None and not span.saves_inside:
            vectors = self._rotated_token(x, span)
            cached, window = cache.write(self._split(vectors)[1], span), getattr(cache, "window", None)
            y = self.kernels.attend(vectors, cached, span.rows, span.offsets, window, self.sinks, span.end)
            return y.reshape(B, 1, self.config.q_size)
        q, kv = self._rotated(x, span)
        if isinstance(cache, RingCache) and (1 + cache.slack < L or span.saves_inside):
            y = self._sliding(q, *cache.extend(kv, span), past=min(span.starts[0], cache.window))
        else:
            mask = span.seen if isinstance(cache, FullCache) else span.rings[cache.window].seen
            found = cache.update(kv, span)
            if isinstance(found, QuantizedKV):
                y = self._attend_quantized(q, found, mask)
            elif isinstance(cache, FullCache) and L > 1:
                y = self._causal(q, *found)
            else:
                y = self._attend(q, *found, mask)
        return (y if L == 1 else y.swapaxes(1, 2)).reshape(B, L, self.config.q_size)

    def _rotated(self, x: mx.array, span: Span) -> tuple[mx.array, mx.array]:
        """x [B, L, (H + 2 K) * 64] -> queries [B, H, L, 64]; keys and values [2, B, K, L, 64]"""
        B, L, _ = x.shape
        H, K, dim = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        if L == 1:
            return self._split(self._rotated_token(x, span))
        x = x.reshape(B, L, H + 2 * K, dim).swapaxes(1, 2)  # [B, H + 2 K, L, 64]
        qk = self.rotary(x[:, : H + K], span.offsets)
        return qk[:, :H], mx.stack([qk[:, H:], x[:, H + K :]])

    def _rotated_token(self, x: mx.array, span: Span) -> mx.array:
        """x [B, 1, (H + 2 K) * 64] -> queries, keys and, by 0, values rotated in one launch, [B, H + 2 K, 1, 64]"""
        dim = self.config.head_dim
        return self.rotary(x.reshape(-1, 1, 1, dim), span.rotations).reshape(len(x), -1, 1, dim)

    def _split(self, vectors: mx.array) -> tuple[mx.array, mx.array]:
        """As _rotated, of what _rotated_token returns."""
        (B, _, _, dim), K = vectors.shape, self.config.num_key_value_heads
        q, kv = mx.split(vectors, [self.config.num_attention_heads], axis=1)
        return q, kv.reshape(2, 1, K, 1, dim) if B == 1 else kv.reshape(B, 2, K, 1, dim).swapaxes(0, 1)

    def _sliding(self, q: mx.array, keys: mx.array, values: mx.array, past: int) -> mx.array:
        """Sliding attention of one slot's L new queries over W past and L new keys, of which `past` past ones exist.

        Work per token does not grow with L: of more than W queries, block n of W sees only the keys [n W, n W + 2 W).
        """
        L = q.shape[2]
        W = keys.shape[2] - L
        if L <= W:
            return self._within_window(q, keys[:, :, W - past :], values[:, :, W - past :], W)
        n = -(-L // W)
        pad = [(0, 0), (0, 0), (0, n * W - L), (0, 0)]
        q = _blocks(mx.pad(q, pad), W)  # [n, H, W, 64]
        k, v = (_blocks(mx.pad(a, pad), W) for a in (keys, values))  # [n + 1, K, W, 64]
        keys, values = (mx.concatenate([a[:-1], a[1:]], axis=2) for a in (k, v))  # [n, K, 2 W, 64]
        # Query i is at index W + i of its block's keys and sees the W keys up to itself.
        i, j = mx.arange(W)[:, None], mx.arange(2 * W)[None, :]
        mask = mx.broadcast_to((j > i) & (j <= i + W), (n, 1, W, 2 * W))
        if past < W:  # the first block's oldest keys are before position 0
            exists = (mx.arange(n)[:, None] > 0) | (j >= W - past)
            mask = mask & exists[:, None, None, :]
        y = self._attend(q, keys, values, mask)  # [n, H, W, 64]
        return y.swapaxes(0, 1).reshape(1, y.shape[1], n * W, y.shape[3])[:, :, :L]

    def _within_window(self, q: mx.array, keys: mx.array, values: mx.array, window: int) -> mx.array:
        """Sliding attention of at most W queries over P past keys and their own, with as many queries at a time as
        max_scores allows: a window may be long (8192 in gpt-oss-puzzle)."""
        L = q.shape[2]
        P = keys.shape[2] - L
        parts = []
        for first, end in query_blocks(q, keys, self.max_scores):
            start = max(0, P + first - window + 1)  # the oldest key that any of these queries sees
            i, j = mx.arange(P + first, P + end)[:, None], mx.arange(start, P + end)[None, :]
            mask = ((j > i - window) & (j <= i))[None, None]
            seen = slice(start, P + end)
            parts.append(self._attend(q[:, :, first:end], keys[:, :, seen], values[:, :, seen], mask))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def _causal(self, q: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Causal attention of one slot's last L positions, with as many queries at a time as max_scores allows."""
        L = q.shape[2]
        start = keys.shape[2] - L
        parts = [
            self._attend(q[:, :, first:end], keys[:, :, : start + end], values[:, :, : start + end], "causal")
            for first, end in query_blocks(q, keys, self.max_scores)
        ]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def _attend_quantized(self, q: mx.array, cached: QuantizedKV, mask: mx.array | None) -> mx.array:
        """Attention over keys and values in 8 bits. For few queries, scores are products with the codes; for a prompt,
        decoding first costs less."""
        B, H, L, dim = q.shape
        most = 1 if self.packed_by_row else MAX_PACKED_QUERIES
        if most < L:
            return self._causal(q, *cached.dequantized(q.dtype))
        grouped = (B, self.config.num_key_value_heads, -1)
        scores = cached.scores((q.astype(mx.float32) * self.rotary.score_scale).reshape(*grouped, dim))
        scores = scores.reshape(B, H, L, -1)
        if L > 1:
            end = scores.shape[-1]
            mask = mx.arange(end) <= mx.arange(end - L, end)[:, None]
        if mask is not None:
            scores = mx.where(mask, scores, -mx.inf)
        # The sink is one more score in the denominator.
        sinks = self.sinks.astype(mx.float32)[:, None, None]
        weights = mx.exp(scores - mx.logaddexp(mx.logsumexp(scores, axis=-1, keepdims=True), sinks))
        y = cached.weighted(weights.reshape(*grouped, scores.shape[-1]), by_row=self.packed_by_row)
        return y.reshape(B, H, L, dim).astype(q.dtype)

    def _attend(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
        return self.attend(q, k, v, self.rotary.score_scale, mask, self.sinks)


@dataclass(frozen=True)
class MixtureOfExperts:
    """router: D -> E; gate_up: D -> 2 I per expert, gate rows first; down: I -> D per expert.
    bias [E, 2 I + D]: of both, so that those of a token's experts are fetched at once; float32 if the products are.
    own: the router's numbers of this rank's experts, which are those held here. min_pairs_to_sort: token-expert pairs
    from which sorting them by expert is faster. kernels: the custom ones. router_adapters, gate_up_adapters,
    down_adapters: what each adapter adds to them."""

    config: ModelConfig
    router: Linear
    gate_up: ExpertLinear
    down: ExpertLinear
    bias: mx.array
    own: range
    elementwise: Elementwise
    ranks: Ranks
    min_pairs_to_sort: int
    kernels: LayerKernels = PLAIN
    router_adapters: tuple[LowRank | None, ...] = ()
    gate_up_adapters: tuple[LowRank | None, ...] = ()
    down_adapters: tuple[LowRank | None, ...] = ()

    def __call__(
        self, x: mx.array, residual: mx.array, span: Span, next_bias: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """x, residual [B, L, D] -> residual + the experts' outputs for x, and the same plus next_bias [D] if there is
        one, [B, L, D] each"""
        shape, D = x.shape, x.shape[-1]
        x, residual = x.reshape(-1, D), residual.reshape(-1, 1, 1, D)
        few = len(x) * (active := self.config.num_experts_per_tok) < self.min_pairs_to_sort
        if few and self.kernels.experts is not None:
            y, base = self.kernels.mix(x, residual.reshape(-1, D), self.router(x), active, next_bias)
            return y.reshape(shape), None if base is None else base.reshape(shape)
        chosen, logits = self._route(x, span)  # [T, A] each
        if few and self.ranks.alone:
            outputs, bias = self._unsorted(x, chosen, span)
            y, base = self.elementwise.combine_chosen(residual, outputs, bias, logits, next_bias)
            return y.reshape(shape), None if base is None else base.reshape(shape)
        weights = mx.softmax(logits, axis=-1, precise=True)
        experts, weights = self.ranks.local_experts(chosen, weights, self.own)
        if few:
            outputs, bias = self._unsorted(x, experts, span)
        else:
            outputs, bias = self._sorted(x, chosen, span), self.bias[:, -D:][experts[..., None]]
        parts = by_expert(outputs, bias, weights[..., None, None])
        if self.ranks.alone:
            y = self.elementwise.combine(residual, *parts).reshape(shape)
        else:
            y = self.ranks.sum(self.elementwise.combine(mx.zeros_like(residual), *parts))
            y = (residual + y).reshape(shape)
        return y, None if next_bias is None else y + next_bias

    def _route(self, x: mx.array, span: Span) -> tuple[mx.array, mx.array]:
        """The A experts with the largest router logits, and these logits, [T, A] each."""
        active = self.config.num_experts_per_tok
        logits = add_linear(self.router(x), x, self.router_adapters, span)  # [T, E]
        experts = mx.argpartition(logits, kth=-active, axis=-1)[..., -active:]
        return experts, mx.take_along_axis(logits, experts, axis=-1)

    def _unsorted(self, x: mx.array, experts: mx.array, span: Span) -> tuple[mx.array, mx.array]:
        """The outputs of each token's experts [T, A] without biases, and their biases, [T, A, 1, D] each."""
        T, intermediate = x.shape[0], (self.bias.shape[-1] - x.shape[-1]) // 2
        biases = mx.take(self.bias, experts[..., None], axis=0)  # [T, A, 1, 2 I + D]
        gate_bias, up_bias, down_bias = mx.split(biases, [intermediate, 2 * intermediate], axis=-1)
        tokens, pairs, each = span.tokens, span.pairs, x[:, None, None]
        if len(tokens) > T:  # the last positions of the last layer
            tokens, pairs = tokens[:T], pairs[:T]
        y = self.gate_up(each, experts, tokens)
        y = add_experts(y, each, self.gate_up_adapters, span, experts, tokens, pairs)
        hidden = self._swiglu(y, gate_bias, up_bias)
        y = self.down(hidden, experts, pairs)
        return add_experts(y, hidden, self.down_adapters, span, experts, pairs, pairs), down_bias

    def _sorted(self, x: mx.array, chosen: mx.array, span: Span) -> mx.array:
        """The experts' outputs without biases, [T, A, 1, D], with the T * A pairs sorted by expert, so that the rows of
        each are adjacent. Zeros where another rank has the expert."""
        (T, A), pairs = chosen.shape, chosen.flatten()
        order = self.ranks.local_pairs(mx.argsort(pairs), pairs, self.own)
        if not order.size:
            return mx.zeros((T, A, 1, x.shape[-1]), dtype=x.dtype)
        experts = pairs[order] - self.own.start
        rows = order // A
        each = x[rows][:, None]
        y = self.gate_up(each, experts, None)  # [pairs, 1, 2 I]
        y = add_experts(y, each, self.gate_up_adapters, span, experts, rows=rows)
        hidden = self._swiglu(y, *mx.split(self.bias[:, : -x.shape[-1]][experts][:, None], 2, axis=-1))
        y = add_experts(self.down(hidden, experts, None), hidden, self.down_adapters, span, experts, rows=rows)
        if self.ranks.alone:
            return y[mx.argsort(order)].reshape(T, A, 1, -1)
        return mx.zeros((T * A, x.shape[-1]), dtype=x.dtype).at[order].add(y[:, 0]).reshape(T, A, 1, -1)

    def _swiglu(self, gate_up: mx.array, gate_bias: mx.array, up_bias: mx.array) -> mx.array:
        """gate_up [..., 2 I], biases [..., I] -> [..., I]"""
        gate, up = mx.split(gate_up, 2, axis=-1)
        limit, alpha = self.config.swiglu_limit, self.config.swiglu_alpha
        return self.elementwise.swiglu(gate, up, gate_bias, up_bias, limit, alpha)


@dataclass(frozen=True)
class Block:
    config: ModelConfig
    attention_norm: mx.array
    attention: Attention
    mlp_norm: mx.array
    mlp: MixtureOfExperts

    def attend(
        self, x: mx.array, base: mx.array | None, cache: LayerCache, span: Span, last: int
    ) -> tuple[mx.array, mx.array | None]:
        """x [B, L, D], and x plus the bias of the output projection unless it is not yet computed -> [B, last, D], of
        the last positions; and its norm, if a custom kernel has it"""
        normed = mx.fast.rms_norm(x, self.attention_norm, self.config.rms_norm_eps)
        if base is None:
            base = x if self.attention.out.bias is None else x + self.attention.out.bias
        if span.length == 1 and self.attention.kernels.add_norm is not None:
            return self.attention.with_norm(normed, base, cache, span, self.mlp_norm)
        y = self.attention(normed, base, cache, span)
        return y if last == span.length else y[:, -last:], None

    def mix(
        self, x: mx.array, normed: mx.array | None, span: Span, next_bias: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """x [B, L, D], and its norm unless it is not yet computed -> the same shape, through the experts; and the same
        plus next_bias"""
        if normed is None:
            normed = mx.fast.rms_norm(x, self.mlp_norm, self.config.rms_norm_eps)
        return self.mlp(normed, x, span, next_bias)


@dataclass(frozen=True)
class GptOss:
    """One loaded model. dtype: of activations and KV cache. load_rest: loads the rows of lm_head that are not resident
    (Limits.resident_vocab); None if all are. mask_heads: as of Span.of."""

    config: ModelConfig
    dtype: mx.Dtype
    embed: Matrix | MappedRows
    blocks: tuple[Block, ...]
    norm: mx.array
    lm_head: Linear
    load_rest: Callable[[], Linear] | None
    mask_heads: int
    elementwise: Elementwise
    ranks: Ranks

    def __call__(self, ids: mx.array, cache: Cache, span: Span, last: int) -> mx.array:
        """ids [B, L] -> hidden states before the final norm, [B, last, D]. The last layer computes only the last
        positions."""
        return self.run(range(2 * len(self.blocks)), self.embed.rows(ids, self.dtype), cache, span, last)

    def run(self, stages: range, x: mx.array, cache: Cache, span: Span, last: int) -> mx.array:
        """x [B, L, D] through consecutive stages: stage 2 n is the attention of layer n, stage 2 n + 1 its experts.
        Returns [B, L, D], or [B, last, D] after the last layer."""
        # When decoding, x plus the bias of the next attention's output projection, and the norm of x. A chunk
        # of several tokens may be computed in stages, and what is handed from one to the next is x.
        base = normed = None
        decodes = span.length == 1
        for stage in stages:
            block, layer_cache = self.blocks[stage // 2], cache.layers[stage // 2]
            if stage % 2:
                following = self.blocks[stage // 2 + 1].attention.out if decodes and stage + 1 in stages else None
                x, base = block.mix(x, normed, span, None if following is None else following.bias)
                normed = None
            else:
                x, normed = block.attend(x, base, layer_cache, span, last if block is self.blocks[-1] else span.length)
        return x

    def logits(self, x: mx.array) -> mx.array:
        """Hidden states [..., D] -> float32 logits [..., V], of the resident part of the vocabulary"""
        y = self.lm_head(mx.fast.rms_norm(x, self.norm, self.config.rms_norm_eps))
        return self.ranks.gather(y, self.config.vocab_size).astype(mx.float32)

    def all_logits(self, x: mx.array) -> mx.array:
        """Logits of the whole vocabulary, for evaluation."""
        if self.load_rest is None:
            return self.logits(x)
        return mx.concatenate([self.logits(x), replace(self, lm_head=self.load_rest()).logits(x)], axis=-1)


def _blocks(x: mx.array, size: int) -> mx.array:
    """[1, heads, n * size, 64] -> [n, heads, size, 64]"""
    _, heads, length, dim = x.shape
    return x.reshape(heads, length // size, size, dim).swapaxes(0, 1)
