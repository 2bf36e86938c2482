"""One decoding step: up to 64 tokens, one of each sequence, from the ids fed back on the device to the ids chosen.

All data is in buffers at fixed addresses; the host says only which slots take part, their positions and how they
sample. So on a GPU a step is one copy to the device and the replay of one CUDA graph. Six or seven kernels a
layer for one sequence, ten or eleven for more, and one more to write keys and values in 8 bits.

A sequence with drafts has a row for each of them: they write their keys before any row reads keys, and each sees those
up to its own position, so the drafts are verified as if they were decoded one after the other.

Legend: B rows (a power of two; those without a request are idle, at position -1), S slots, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Row
from .adapters import LowRank, Uses, expert_adapters
from .cache import Cache, FullCache, LayerCache, RingCache
from .kernels import attention, linear, moe, norm, qkv, quantized_kv, routing, sample, tiles
from .model import Block, GptOss, Norm

IDLE = -1
FEED_BACK = -1
NO_ADAPTER = -1


class Inputs:
    """The host's inputs of each row in one piece of memory, which one copy brings to the device.

    given int64: the token, or FEED_BACK for the one that the slot sampled last. keys int64: the start of the row's
    noise. slots, positions int32. adapters int32: -1 is none. temperatures float32: 0 is greedy.
    """

    given: Tensor
    keys: Tensor
    slots: Tensor
    positions: Tensor
    adapters: Tensor

    def __init__(self, rows: int, memory: Tensor) -> None:
        """memory: uint8 [32 * rows]"""
        wide, narrow = memory[: 16 * rows].view(torch.int64), memory[16 * rows :]
        self.given, self.keys = wide[:rows], wide[rows:]
        ints = narrow[: 12 * rows].view(torch.int32)
        self.slots, self.positions, self.adapters = ints[:rows], ints[rows : 2 * rows], ints[2 * rows :]
        self.temperatures: Tensor = narrow[12 * rows :].view(torch.float32)
        self.memory = memory

    @staticmethod
    def empty(rows: int, device: torch.device, *, pinned: bool = False) -> Inputs:
        """With every row idle."""
        inputs = Inputs(rows, torch.zeros(32 * rows, dtype=torch.uint8, device=device, pin_memory=pinned))
        inputs.positions.fill_(IDLE)
        inputs.adapters.fill_(NO_ADAPTER)
        return inputs

    def fill(self, rows: Sequence[Row], keys: Sequence[int], temperatures: Sequence[float]) -> None:
        """Fill the inputs on the host. Rows after the last one stay idle."""
        tokens = [FEED_BACK if row.tokens is None else row.tokens[0] for row in rows]
        for part, values in (
            (self.given, tokens),
            (self.keys, keys),
            (self.slots, [row.slot for row in rows]),
            (self.positions, [row.start for row in rows]),
            (self.adapters, [NO_ADAPTER if row.adapter is None else row.adapter for row in rows]),
            (self.temperatures, temperatures),
        ):
            part[: len(rows)] = torch.tensor(values, dtype=part.dtype)


@dataclass(frozen=True)
class Route:
    """Where the tokens go in a layer of E experts. scores: the router's, float32 [B, E]."""

    scores: Tensor
    groups: routing.Groups


class Buffers:
    """All buffers between a step's inputs and its outputs, for B rows.

    A step leaves its results in logits float32 [B, V], tokens int64 [B] and logprobs float32 [B].
    """

    x: Tensor
    normed: Tensor
    q: Tensor
    y: Tensor
    fresh: Tensor
    own_rows: Tensor
    hidden: Tensor
    parts: Tensor
    share: Tensor
    own_logits: Tensor
    tokens: Tensor
    logprobs: Tensor

    def __init__(self, model: GptOss, rows: int, capacity: int, device: torch.device, *, packed: bool = False) -> None:
        """packed: for full-attention layers that keep keys and values in 8 bits."""
        c = model.config
        D, pairs = c.hidden_size, rows * c.num_experts_per_tok

        def new(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.inputs: Inputs = Inputs.empty(rows, device)
        self.x, self.normed = new(rows, D), new(rows, D)
        self.q, self.y = new(rows, c.num_attention_heads, c.head_dim), new(rows, c.q_size)
        self.parts_of_out: list[int] = [_parts_of_out(model, block, rows) for block in model.blocks]
        self.partial: Tensor = new(max(self.parts_of_out), rows, D, dtype=torch.float32)
        heads = c.num_attention_heads, c.num_key_value_heads
        if packed:  # a layer's new keys and values, as a ring of one entry for each row
            self.fresh = new(2, rows, c.num_key_value_heads, 1, c.head_dim)
            self.own_rows = torch.arange(rows, dtype=torch.int32, device=device)
        self.attention: Tensor = attention.decode_scratch(rows, *heads, capacity, model.dtype, device)
        order, weights = new(pairs, dtype=torch.int32), new(pairs, dtype=torch.float32)
        self.routes: dict[int, Route] = {
            E: Route(new(rows, E, dtype=torch.float32), routing.Groups(order, new(E + 1, dtype=torch.int32), weights))
            for E in set(c.experts)
        }
        self.hidden, self.parts = new(pairs, c.intermediate_size), new(pairs, D)
        if not model.ranks.alone:
            self.share = new(rows, D)  # this rank's part of a sum
            self.own_logits = new(rows, len(model.ranks.shard.vocabulary), dtype=torch.float32)
        self.logits: Tensor = new(rows, c.vocab_size, dtype=torch.float32)
        self.draw: tuple[Tensor, ...] = sample.scratch(rows, c.vocab_size, device)
        self.tokens, self.logprobs = new(rows, dtype=torch.int64), new(rows, dtype=torch.float32)


class Decoder:
    """Steps of one model over one cache. last: int64 [S], what each slot sampled last, read and written here; of a slot
    with several rows, what any of them sampled.

    Steps with adapters have graphs of their own: for each adapter, and one with all of them for rows that differ. Steps
    without are what they are without any adapter loaded.
    """

    def __init__(self, model: GptOss, cache: Cache, last: Tensor, max_context: int) -> None:
        self._model = model
        self._cache = cache
        self._last = last
        self._capacity = max_context
        self._device = last.device
        positions = torch.arange(max_context, device=last.device)
        rotation = model.rotary.rotation(positions[None])
        self._table = (rotation.cos[0, 0].contiguous(), rotation.sin[0, 0].contiguous())  # [max_context, 32] each
        self._buffers: dict[int, Buffers] = {}
        self._graphs: dict[tuple[int, tuple[int, ...]], torch.cuda.CUDAGraph] = {}
        self._adapters = range(len(model.blocks[0].attention.qkv_adapters))

    def compile(self, rows: int) -> None:
        """Launch every step of up to `rows` rows once, every row idle. Inside `compiling()` nothing runs."""
        for count, used in self._steps(rows):
            self._run(self._idle_buffers(count), used)

    def prepare(self, rows: int) -> None:
        """Capture steps of up to `rows` rows now, instead of at the first such step."""
        for count, used in self._steps(rows):
            self._ready(count, used)

    def _steps(self, rows: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The rows and the adapters of every step of up to `rows` rows."""
        for power in range(_bucket(rows).bit_length()):
            for used in {(), *((index,) for index in self._adapters), tuple(self._adapters) if power else ()}:
                yield 1 << power, used

    def step(self, rows: Sequence[Row], keys: Sequence[int], temperatures: Sequence[float]) -> Buffers:
        """Start a step of at most 64 rows of one token each. Row i of the buffers is rows[i]'s until the next
        step of as many."""
        count = _bucket(len(rows))
        found = tuple(sorted({row.adapter for row in rows if row.adapter is not None}))
        used = found if len(found) < 2 else tuple(self._adapters)
        buffers = self._ready(count, used)
        on_gpu = self._device.type == "cuda"
        staged = Inputs.empty(count, torch.device("cpu"), pinned=on_gpu)
        staged.fill(rows, keys, temperatures)
        buffers.inputs.memory.copy_(staged.memory, non_blocking=on_gpu)
        if on_gpu:
            self._graphs[count, used].replay()
        else:
            self._run(buffers, used)
        return buffers

    def _ready(self, rows: int, used: tuple[int, ...] = ()) -> Buffers:
        """The buffers of a step, and on a GPU its graph. used: the adapters that the step computes."""
        buffers = self._idle_buffers(rows) if rows not in self._buffers else self._buffers[rows]
        if self._device.type == "cuda" and (rows, used) not in self._graphs:
            self._graphs[rows, used] = self._capture(buffers, used)
        return buffers

    def _idle_buffers(self, rows: int) -> Buffers:
        """The buffers of a step, with every row idle."""
        if rows not in self._buffers:
            self._buffers[rows] = Buffers(
                self._model, rows, self._capacity, self._device, packed=self._cache.pack is not None
            )
        self._buffers[rows].inputs.positions.fill_(IDLE)
        return self._buffers[rows]

    def _capture(self, buffers: Buffers, used: tuple[int, ...]) -> torch.cuda.CUDAGraph:
        """Every row is idle meanwhile, so neither the warm-up nor the capture changes the cache."""
        buffers.inputs.positions.fill_(IDLE)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._run(buffers, used)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device meanwhile
            self._run(buffers, used)
        return graph

    def _run(self, b: Buffers, used: tuple[int, ...]) -> None:
        """The step itself: launches only, the same for all inputs that use these adapters."""
        model, i = self._model, b.inputs
        uses = [(index, i.adapters == index) for index in used]
        linear.embed(i.given, self._last, i.slots, i.positions, model.embed, b.x)
        for block, layer, parts in zip(model.blocks, self._cache.layers, b.parts_of_out, strict=True):
            at, window = block.attention, layer.window if isinstance(layer, RingCache) else None
            self._project(b, block, layer, uses)
            attention.decode_attention(
                b.q, layer.keys, layer.values, i.slots, i.positions, at.sinks, at.scale, b.y, b.attention, window=window
            )
            delta = _delta(b.y, at.out_adapters, uses)
            partial = b.partial[:parts] if parts > 1 else None
            if partial is not None:
                linear.split_linear(b.y, at.out.matrices[0], partial)
                if delta is not None:
                    b.x += delta
            elif model.ranks.alone:
                linear.linear(b.y, at.out.matrices[0], b.x, bias=at.out.bias, residual=b.x)
                if delta is not None:
                    b.x += delta
            else:
                linear.linear(b.y, at.out.matrices[0], b.share, bias=at.out.bias, residual=delta)
                b.x += model.ranks.sum(b.share)
            self._mixture(b, block, uses, partial)
        x, gain, eps = self._normed(b, model.norm, ())
        own = b.logits if model.ranks.alone else b.own_logits
        linear.linear(x, model.lm_head.matrices[0], own, norm=gain, eps=eps)
        if not model.ranks.alone:
            b.logits.copy_(model.ranks.gather(own, b.logits.shape[-1]))
        sample.draw(b.logits, i.temperatures, i.keys, i.slots, i.positions, b.tokens, b.logprobs, self._last, b.draw)

    def _project(self, b: Buffers, block: Block, layer: LayerCache, uses: Uses) -> None:
        """Queries to b.q, keys and values to the cache."""
        at, i, packed = block.attention, b.inputs, isinstance(layer, FullCache) and layer.packed
        x, gain, eps = self._normed(b, block.attention_norm, uses)
        # An 8-bit scale needs the whole head, of which a program of this kernel has a part.
        slots, (keys, values) = (b.own_rows, b.fresh) if packed else (i.slots, layer.arrays[0])
        qkv.project_qkv(
            x,
            at.qkv.matrices,
            at.qkv.bias,
            self._table,
            slots,
            i.positions,
            b.q,
            keys,
            values,
            norm=gain,
            eps=eps,
            delta=_delta(x, at.qkv_adapters, uses),
        )
        if packed:
            quantized_kv.write_rows(b.fresh, layer.arrays, i.slots, i.positions)

    def _mixture(self, b: Buffers, block: Block, uses: Uses, partial: Tensor | None) -> None:
        """partial: parts of attention's output, which are still to be added to the residual stream, or None."""
        router, experts = block.mlp.router, block.mlp.experts
        x, gain, eps = self._normed(b, block.mlp_norm, uses, partial, block.attention.out.bias)
        route = b.routes[router.matrices[0].shape[0]]
        routing.router(x, router.matrices[0], router.bias, route.scores, norm=gain, eps=eps)
        if (delta := _delta(x, block.mlp.router_adapters, uses)) is not None:
            route.scores.add_(delta)
        adapters = tuple(expert_adapters(block.mlp.gate_up_adapters, block.mlp.down_adapters, uses))
        if gain is not None:
            moe.forward_one_token(b.x, route.scores, experts, b.hidden, gain, eps)
        else:
            routing.sort_pairs(route.scores, b.inputs.positions, experts.active, route.groups)
            if self._model.ranks.alone:
                moe.forward_grouped(b.x, x, route.groups, experts, b.hidden, b.parts, b.x, b.inputs.positions, adapters)
            else:
                b.parts.zero_()  # the other ranks' experts add nothing
                groups = route.groups.of_experts(experts.local_experts)
                moe.forward_grouped(None, x, groups, experts, b.hidden, b.parts, b.share, b.inputs.positions, adapters)
                b.x += self._model.ranks.sum(b.share)

    def _normed(
        self, b: Buffers, weights: Norm, uses: Uses, partial: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, float]:
        """The input of the next products, and the norm that they still have to apply. For one row the norm is folded
        into them; for several rows, with several ranks and with adapters it is a separate kernel, which first adds the
        product that is in parts, and its bias."""
        if len(b.x) == 1 and self._model.ranks.alone and not uses:
            return b.x, weights.weight, weights.eps
        norm.rms_norm(b.x, weights.weight, weights.eps, b.normed, partial=partial, bias=bias)
        return b.normed, None, 0.0


def _delta(x: Tensor, adapters: Sequence[LowRank | None], uses: Uses) -> Tensor | None:
    """What the adapters add to a product with x [B, D], [B, N]; None if they add nothing."""
    found = [low_rank.delta(x, rows) for index, rows in uses if (low_rank := adapters[index]) is not None]
    return sum(found[1:], start=found[0]) if found else None


def _parts_of_out(model: GptOss, block: Block, rows: int) -> int:
    """In how many parts the product with attention's output is computed. With several ranks a sum follows, not a norm
    that could add them up."""
    return tiles.split_k(rows, block.attention.out.matrices[0], model.dtype)[1] if model.ranks.alone else 1


def _bucket(rows: int) -> int:
    """The next power of two"""
    return 1 << (rows - 1).bit_length()
