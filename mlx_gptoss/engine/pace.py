"""Decides how much of a prompt a step computes while other sequences decode, so that their tokens do not stall.

A chunk of a prompt is computed a few stages at a time (backends.base.stage_count); each group of stages shares a step
with the decoding sequences. Stages cut a chunk between layers, so its results are bit for bit those of a chunk that
runs alone.

A step takes at least one stage, and otherwise as many as cost no more time than its decoding rows: a token waits for at
most two decoding steps, or for one step and one stage. If one stage costs more than a decoding step, steps without a
prompt follow until decoding has had as much time as the prompt. Each side gets about half of the time.

Estimates come from the measured cost of earlier steps. A token costs less in a large chunk than in a small one, on a
GPU several times less. So chunks of different sizes have estimates of their own, and what is known of small ones is an
upper bound for larger ones. Plain Python over numbers; the caller measures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

GAIN: Final = 0.5  # weight of a new measurement in a moving average
MAX_CHANGE: Final = 2.0  # the most that one measurement may change an estimate by: a pause is not the cost of a stage
FIXED_TOKENS: Final = 32  # a chunk costs about as much as this many tokens more: every weight is read once
REMEASURE: Final = 8  # steps with pieces after which one decodes alone, so that its cost stays known
MEASURE: Final = 4  # the same while this number of decoding rows has never been measured


@dataclass(frozen=True)
class Piece:
    """Some stages, first to end, of a chunk of a prompt."""

    tokens: int
    first: int
    end: int


class Pace:
    """Divides time between prompts and decoding. stages: number of stages of a chunk."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        # By _size_class: seconds per token of each stage; 0 before the first measurement
        self._stage_s: dict[int, list[float]] = {}
        self._decode_s: dict[int, float] = {}  # by decoding rows: seconds of a step that does nothing else
        self._owed_s = 0.0  # time that decoding gets before the next piece
        self._since_measured = 0  # steps with pieces since the last step that only decoded

    def begin_step(self, decoding: int, ready: int) -> float | None:
        """The budget for prefill in the next step, in seconds; None if the step should only decode.

        decoding: number of sequences that decode. ready: how many of them have a row in this step.
        """
        limit = REMEASURE if decoding in self._decode_s else MEASURE
        if self._owed_s > 0 or self._since_measured >= limit:
            if ready:  # otherwise they wait for a result, and get their step when it has been read
                self._owed_s = max(0.0, self._owed_s - self._decoding_s(ready))
                self._since_measured = 0
            return None
        self._since_measured += 1
        return self._decoding_s(decoding)

    def fit(self, tokens: int, first: int, budget_s: float, at_least_one: bool) -> tuple[Piece, float] | None:
        """Return the stages of a chunk of `tokens`, from `first` on, that fit into budget_s, and their estimated cost.

        at_least_one: take the first stage even if it does not fit. Returns None if no stage fits. A chunk of one token
        is not cut.
        """
        end, total = first, 0.0
        stage_s = self._known(_size_class(tokens))
        while end < self._stages:
            step = self._stages - end if tokens == 1 else 1
            costs = [self._weight(tokens) * known for known in stage_s[end : end + step]]
            if (0.0 in costs or total + sum(costs) > budget_s) and not (at_least_one and end == first):
                break
            total += sum(costs)
            end += step
        return None if end == first else (Piece(tokens, first, end), total)

    def chunk_tokens(self, decoding: int, least: int, most: int) -> int:
        """The size of a chunk that starts while `decoding` sequences decode: `least` tokens, doubled as long as the
        result is at most `most` and no stage is expected to take longer than a decoding step."""
        tokens, decoding_s = least, self._decoding_s(decoding)
        while 2 * tokens <= most:
            stage_s = self._known(_size_class(2 * tokens))
            if 0.0 in stage_s or max(stage_s) * self._weight(2 * tokens) > decoding_s:
                break
            tokens *= 2
        return tokens

    def spend(self, decoding: int, seconds: float) -> None:
        """Record that pieces of this estimated cost were planned in a step with `decoding` sequences."""
        self._owed_s = max(0.0, seconds - self._decoding_s(decoding))

    def record(self, rows: int, pieces: Iterable[Piece], seconds: float) -> None:
        """Update the estimates from a step with `rows` decoding rows and these pieces, which took `seconds`."""
        pieces = tuple(pieces)
        if pieces:
            self._record_pieces(pieces, max(seconds - self._decoding_s(rows), seconds / 10))
        elif rows:
            self._decode_s[rows] = _moved(self._decode_s.get(rows, 0.0), seconds)

    def _record_pieces(self, pieces: tuple[Piece, ...], seconds: float) -> None:
        """Scale the estimates of the stages by their common error."""
        weights: dict[tuple[int, int], int] = {}  # by size and stage
        for piece in pieces:
            for stage in range(piece.first, piece.end):
                place = _size_class(piece.tokens), stage
                weights[place] = weights.get(place, 0) + self._weight(piece.tokens)
        known = {size: list(self._known(size)) for size, _ in weights}
        mean = seconds / sum(weights.values())
        expected = sum(weight * (known[size][stage] or mean) for (size, stage), weight in weights.items())
        for size, stage in weights:
            before = known[size][stage]
            known[size][stage] = _moved(before, before * seconds / expected) if before else mean
        self._stage_s.update(known)

    def _known(self, size: int) -> list[float]:
        """The estimates of a size, or those of the next smaller one that has some: they are at least as high."""
        measured = max((each for each in self._stage_s if each <= size), default=None)
        return [0.0] * self._stages if measured is None else self._stage_s[measured]

    def _decoding_s(self, rows: int) -> float:
        """Seconds of a step of `rows` decoding rows, or of the nearest number of rows that was measured. 0 for no rows,
        and before the first measurement."""
        if not rows or not self._decode_s:
            return 0.0
        return self._decode_s[min(self._decode_s, key=lambda known: abs(known - rows))]

    @staticmethod
    def _weight(tokens: int) -> int:
        return tokens + FIXED_TOKENS


def _size_class(tokens: int) -> int:
    """Chunks of one class have the same estimates per token: those of up to 256 tokens, 512, 1024 and so on."""
    return max(8, (tokens - 1).bit_length())


def _moved(known: float, measured: float) -> float:
    """The moving average after a measurement; the measurement if it is the first."""
    if not known:
        return measured
    return known + GAIN * (min(max(measured, known / MAX_CHANGE), known * MAX_CHANGE) - known)
