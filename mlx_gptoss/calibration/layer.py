"""One layer of the network: its matrices are quantized one after the other, each for what the ones before it give.

Both models are computed side by side, in chunks of tokens: the original one, which says what each matrix should give,
and the one that is being made, whose activations are the inputs that it will see. Experts are independent of each other
and share the processor's cores.

Legend: T tokens, D hidden, H query heads, I intermediate, E experts, A experts a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import ModelConfig
from ..weights import codecs
from ..weights.checkpoint import CheckpointLike
from ..weights.params import Param
from .linear import Linear, Matrix, Pair, Target
from .memory import CHUNK, Memory, expert_bytes
from .moments import Moments, MomentSums
from .network import Floats, Integers, attend, rms_norm, route, swiglu
from .store import PartWriter

FILL_WEIGHT = np.float32(0.05)  # of tokens that other experts got, where few reached an expert

Progress = Callable[[int], None]  # parameters finished


@dataclass(frozen=True)
class Streams:
    """float32 [T, D] in the original model and in the one that is being made; on disk."""

    original: NDArray[Any]
    actual: NDArray[Any]

    def __len__(self) -> int:
        return len(self.original)


@dataclass(frozen=True)
class Routing:
    """Each token's experts and their shares, [T, A] each."""

    chosen: Integers
    share: Floats

    def of(self, expert: int) -> tuple[Integers, Floats]:
        """The tokens that an expert gets, in order, and its share of each."""
        tokens, place = np.nonzero(self.chosen == expert)
        return tokens, self.share[tokens, place]


@dataclass(frozen=True)
class _ExpertOutput:
    """What an expert adds to the streams: rows [n, D] for tokens [n], in each model."""

    original: tuple[Integers, Floats]
    actual: tuple[Integers, Floats]


class Layer:
    """Calibrates one layer.

    lengths: tokens of each window of text. scratch: makes an array [T, width] on disk.
    """

    def __init__(
        self,
        source: CheckpointLike,
        target: Target,
        writer: PartWriter,
        index: int,
        lengths: Sequence[int],
        memory: Memory,
        scratch: Callable[[str, int], NDArray[Any]],
        progress: Progress,
    ) -> None:
        self._source, self._target, self._writer = source, target, writer
        self._config: ModelConfig = source.config
        self._index, self._lengths, self._memory = index, lengths, memory
        self._scratch, self._progress = scratch, progress
        self._params: dict[str, Param] = {param.kind: param for param in source.params if param.layer == index}

    def run(self, before: Streams, after: Streams) -> None:
        """Quantize the layer's matrices. before: its input. after: its output, filled in."""
        self._attention(before, after)
        normed = Streams(*(self._scratch(f"normed-{name}", before.original.shape[1]) for name in ("a", "b")))
        routing = self._router(after, normed)
        self._experts(normed, routing, after)

    # ---- attention

    def _attention(self, before: Streams, after: Streams) -> None:
        """after = before + attention, in both models."""
        config, norm, sinks = self._config, self._vector("attention_norm.weight"), self._vector("attention.sinks")
        sums = self._sums(config.hidden_size)
        for rows in _chunks(len(before)):
            sums.add(*(self._normed(stream[rows], norm) for stream in (before.original, before.actual)))
        moments = sums.moments()
        heads = [self._finish(f"attention.{name}", moments) for name in "qkv"]
        mixed = Streams(*(self._scratch(f"mixed-{name}", config.q_size) for name in ("a", "b")))
        sums = self._sums(config.q_size)
        for rows in self._windows():
            for stream, out, side in ((before.original, mixed.original, 0), (before.actual, mixed.actual, 1)):
                x = self._normed(stream[rows], norm)
                q, k, v = (((pair.original, pair.actual)[side])(x) for pair in heads)
                out[rows] = attend(q, k, v, sinks, [len(x)], config, config.windows[self._index])
            sums.add(mixed.original[rows], np.asarray(mixed.actual[rows]))
        output = self._finish("attention.o", sums.moments())
        for rows in _chunks(len(before)):
            after.original[rows] = before.original[rows] + output.original(mixed.original[rows])
            after.actual[rows] = before.actual[rows] + output.actual(mixed.actual[rows])

    def _windows(self) -> Iterator[slice]:
        start = 0
        for length in self._lengths:
            yield slice(start, start + length)
            start += length

    # ---- router and experts

    def _router(self, streams: Streams, normed: Streams) -> tuple[Routing, Routing]:
        """The routing of all tokens in both models. normed: the experts' inputs, filled in."""
        config, norm = self._config, self._vector("mlp_norm.weight")
        sums = self._sums(config.hidden_size)
        for rows in _chunks(len(streams)):
            normed.original[rows] = self._normed(streams.original[rows], norm)
            normed.actual[rows] = self._normed(streams.actual[rows], norm)
            sums.add(np.asarray(normed.original[rows]), np.asarray(normed.actual[rows]))
        router = self._finish("router", sums.moments())
        return (
            self._route(router.original, normed.original),
            self._route(router.actual, normed.actual),
        )

    def _route(self, router: Linear, x: NDArray[Any]) -> Routing:
        parts = [route(router(x[rows]), self._config.num_experts_per_tok) for rows in _chunks(len(x))]
        return Routing(np.concatenate([chosen for chosen, _ in parts]), np.concatenate([share for _, share in parts]))

    def _experts(self, normed: Streams, routing: tuple[Routing, Routing], after: Streams) -> None:
        """Add the experts' outputs to both streams, expert by expert in their order, so that sums are reproducible."""
        matrices = {name: self._matrix(f"experts.{name}") for name in ("gate", "up", "down")}
        experts = self._config.experts[self._index]
        size = sum(self._params[f"experts.{name}.weight"].size for name in matrices) // experts
        with ThreadPoolExecutor(self._memory.workers) as pool:
            pending: deque[tuple[int, Future[_ExpertOutput]]] = deque()  # with the memory of each

            def finish_one() -> None:
                self._add(pending.popleft()[1].result(), after)
                self._progress(size)

            try:
                for expert in range(experts):
                    counts = [int((one.chosen == expert).sum()) for one in routing]
                    needed = expert_bytes(self._config, max(*counts, self._config.hidden_size))
                    while pending and sum(one for one, _ in pending) + needed > self._memory.experts_bytes:
                        finish_one()
                    pending.append((needed, pool.submit(self._expert, expert, matrices, normed, routing)))
                while pending:
                    finish_one()
            finally:
                for _, left in pending:
                    left.cancel()

    @staticmethod
    def _add(output: _ExpertOutput, after: Streams) -> None:
        for stream, (tokens, rows) in ((after.original, output.original), (after.actual, output.actual)):
            stream[tokens] += rows

    def _expert(
        self, expert: int, matrices: dict[str, Matrix], normed: Streams, routing: tuple[Routing, Routing]
    ) -> _ExpertOutput:
        """Quantize one expert for the tokens that it gets in the model that is being made."""
        own, shares = routing[1].of(expert)
        tokens, weights = _with_fill(own, shares**2, len(normed), self._config.hidden_size)
        in_original, original_shares = routing[0].of(expert)
        every = np.union1d(in_original, tokens)
        gate, up, down = (matrices[name] for name in ("gate", "up", "down"))
        calibrated = gate.is_calibrated or up.is_calibrated
        moments = self._input_moments(normed, tokens, weights) if calibrated else None
        inner = [self._expert_pair(matrix, moments, expert) for matrix in (gate, up)]
        hidden = self._hidden(normed.original, every, inner[0].original, inner[1].original)
        actual = self._hidden(normed.actual, tokens, inner[0].actual, inner[1].actual)
        moments = None
        if down.is_calibrated:
            sums = self._sums(self._config.intermediate_size)
            places = np.searchsorted(every, tokens)
            for rows in _chunks(len(tokens)):
                sums.add(hidden[places[rows]], actual[rows], weights[rows])
            moments = sums.moments()
        outer = self._expert_pair(down, moments, expert)
        first = _outputs(outer.original, hidden, np.searchsorted(every, in_original), original_shares)
        second = _outputs(outer.actual, actual, np.arange(len(own)), shares)
        return _ExpertOutput((in_original, first), (own, second))

    def _input_moments(self, normed: Streams, tokens: Integers, weights: Floats) -> Moments:
        sums = self._sums(self._config.hidden_size)
        for rows in _chunks(len(tokens)):
            part = tokens[rows]
            sums.add(normed.original[part], normed.actual[part], weights[rows])
        return sums.moments()

    def _hidden(self, x: NDArray[Any], tokens: Integers, gate: Linear, up: Linear) -> Floats:
        """The input of `down` for these tokens, [n, I]"""
        config = self._config
        out = np.empty((len(tokens), len(gate.weight)), np.float32)
        for rows in _chunks(len(tokens)):
            part = x[tokens[rows]]
            out[rows] = swiglu(gate(part), up(part), config.swiglu_limit, config.swiglu_alpha)
        return out

    # ---- matrices and vectors

    def _sums(self, width: int) -> MomentSums:
        return MomentSums(width, matmul=self._target.matmul)

    def _finish(self, name: str, moments: Moments) -> Pair:
        matrix = self._matrix(name)
        original = matrix.original()
        pair = Pair(original, matrix.finish(original, moments))
        self._progress(self._params[f"{name}.weight"].size)
        return pair

    @staticmethod
    def _expert_pair(matrix: Matrix, moments: Moments | None, expert: int) -> Pair:
        original = matrix.original(expert)
        return Pair(original, matrix.finish(original, moments, expert))

    def _matrix(self, name: str) -> Matrix:
        weight, bias = self._params[f"{name}.weight"], self._params[f"{name}.bias"]
        return Matrix(self._source, self._target, self._writer, weight, bias)

    def _vector(self, kind: str) -> Floats:
        return codecs.dequantize(self._source.read(self._params[kind].name))

    def _normed(self, x: NDArray[Any], weight: Floats) -> Floats:
        return rms_norm(np.asarray(x), weight, self._config.rms_norm_eps)


def _outputs(down: Linear, hidden: Floats, places: Integers, shares: Floats) -> Floats:
    """Each token's share of its output, [n, D]. places: the rows of `hidden` [.., I] that belong to the tokens."""
    out = np.empty((len(places), len(down.weight)), np.float32)
    for rows in _chunks(len(places)):
        out[rows] = down(hidden[places[rows]]) * shares[rows, None]
    return out


def _with_fill(own: Integers, weights: Floats, total: int, wanted: int) -> tuple[Integers, Floats]:
    """Tokens and weights that an expert is quantized for: its own, and before there are `wanted` of them, others evenly
    spaced in the text at a small weight."""
    missing = min(wanted - len(own), total - len(own))
    if missing <= 0:
        return own, weights
    others = np.setdiff1d(np.linspace(0, total - 1, min(total, missing + len(own))).astype(np.intp), own)
    usual = weights.mean() if len(own) else np.float32(1)
    fill = np.full(len(others), FILL_WEIGHT * usual, np.float32)
    return np.concatenate([own, others]), np.concatenate([weights, fill])


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))
