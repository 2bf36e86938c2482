"""Decides how much of a prompt a step computes while other sequences decode, so that their tokens do not stall.

A chunk of a prompt is computed a few stages at a time (backends.base.stage_count); each group of stages shares a step
with the decoding sequences. Stages cut a chunk between layers, so its results are bit for bit those of a chunk that
runs alone.

A step takes at least one stage, and otherwise as many as cost no more time than its decoding rows: a token waits for at
most two decoding steps, or for one step and one stage. If one stage costs more than a decoding step, steps without a
prompt follow until decoding has had as much time as the prompt. Each side gets about half of the time.

Estimates come from the measured cost of earlier steps. A token costs less in a large chunk than in a small one, on a
GPU several times less, so chunks of different sizes have estimates of their own. Plain Python over numbers; the caller
measures.
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
        stage_s = self._stage_s.get(_size_class(tokens), [0.0] * self._stages)
        while end < self._stages:
            step = self._stages - end if tokens == 1 else 1
            costs = [self._weight(tokens) * known for known in stage_s[end : end + step]]
            if (0.0 in costs or total + sum(costs) > budget_s) and not (at_least_one and end == first):
                break
            total += sum(costs)
            end += step
        return None if end == first else (Piece(tokens, first, end), total)

    def chunk_tokens(self, decoding: int, least: int, most: int) -> int:
        """The size of a chunk beside `decoding` sequences: `least` tokens, doubled while that is at most `most` and no
        stage takes longer than a decoding step.

        What is known of smaller chunks bounds the cost of a larger one from above.
        """
        tokens, decoding_s = least, self._decoding_s(decoding)
        while 2 * tokens <= most:
            measured = [size for size in self._stage_s if size <= _size_class(2 * tokens)]
            stage_s = self._stage_s[max(measured)] if measured else [0.0]
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
        """Scale the estimates of the stages by their common error. The first estimates of a size are those of the
        nearest one, all scaled by it."""
        computed = [(piece.tokens, stage) for piece in pieces for stage in range(piece.first, piece.end)]
        guesses = {_size_class(tokens): self._nearest(_size_class(tokens)) for tokens, _ in computed}
        mean = seconds / sum(self._weight(tokens) for tokens, _ in computed)
        error = seconds / sum(self._weight(tokens) * (guesses[_size_class(tokens)][n] or mean) for tokens, n in computed)
        for size, guess in guesses.items():
            stages = {stage for tokens, stage in computed if _size_class(tokens) == size}
            if size in self._stage_s:
                moved = [_moved(s, s * error) if stage in stages else s for stage, s in enumerate(guess)]
            else:
                moved = [s * error for s in guess]
            self._stage_s[size] = [s or (mean if stage in stages else 0.0) for stage, s in enumerate(moved)]

    def _nearest(self, size: int) -> list[float]:
        """The estimates of this size, or of the next smaller or else the next larger one that has some."""
        known = sorted(self._stage_s, key=lambda each: (each > size, abs(each - size)))
        return self._stage_s[known[0]] if known else [0.0] * self._stages

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
    """Chunks of the same class cost about the same per token: those up to 64, 128, 256 and so on."""
    return max(6, (tokens - 1).bit_length())


def _moved(known: float, measured: float) -> float:
    """The moving average after a measurement; the measurement if it is the first."""
    if not known:
        return measured
    return known + GAIN * (min(max(measured, known / MAX_CHANGE), known * MAX_CHANGE) - known)
