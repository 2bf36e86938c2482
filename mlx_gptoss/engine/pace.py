"""Decides how much of a prompt a step computes while other sequences decode, so that their tokens do not stall.

A chunk of a prompt is computed a few stages at a time (backends.base.stage_count); each group of stages shares a step
with the decoding sequences. Stages cut a chunk between layers, so its results are bit for bit those of a chunk that
runs alone.

A step takes at least one stage, and otherwise as many as cost no more time than its decoding rows: a token waits for at
most two decoding steps, or for one step and one stage. If one stage costs more than a decoding step, steps without a
prompt follow until decoding has had as much time as the prompt. Each side gets about half of the time.

Estimates come from the measured cost of earlier steps. Plain Python over numbers; the caller measures.
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
        self._stage_s: list[float] = [0.0] * stages  # seconds per token of each stage; 0 before the first measurement
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
        while end < self._stages:
            step = self._stages - end if tokens == 1 else 1
            costs = [self._weight(tokens) * known for known in self._stage_s[end : end + step]]
            if (0.0 in costs or total + sum(costs) > budget_s) and not (at_least_one and end == first):
                break
            total += sum(costs)
            end += step
        return None if end == first else (Piece(tokens, first, end), total)

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
        weights = [0.0] * self._stages
        for piece in pieces:
            for stage in range(piece.first, piece.end):
                weights[stage] += self._weight(piece.tokens)
        mean = seconds / sum(weights)
        expected = sum(weight * (known or mean) for weight, known in zip(weights, self._stage_s, strict=True))
        for stage, weight in enumerate(weights):
            if weight:
                known = self._stage_s[stage]
                self._stage_s[stage] = _moved(known, known * seconds / expected) if known else mean

    def _decoding_s(self, rows: int) -> float:
        """Seconds of a step of `rows` decoding rows, or of the nearest number of rows that was measured. 0 for no rows,
        and before the first measurement."""
        if not rows or not self._decode_s:
            return 0.0
        return self._decode_s[min(self._decode_s, key=lambda known: abs(known - rows))]

    @staticmethod
    def _weight(tokens: int) -> int:
        return tokens + FIXED_TOKENS


def _moved(known: float, measured: float) -> float:
    """The moving average after a measurement; the measurement if it is the first."""
    if not known:
        return measured
    return known + GAIN * (min(max(measured, known / MAX_CHANGE), known * MAX_CHANGE) - known)
