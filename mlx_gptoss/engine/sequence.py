"""A sequence's scheduling state, a planned step, and what it gave."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Literal

from ..backends.base import Row, Sampled, Snapshot
from ..errors import GptOssError
from .lookup import PromptLookup
from .pace import Piece
from .prefix import Node
from .request import Request


@dataclass(eq=False)
class Sequence:
    """The scheduling state of one request.

    max_new_tokens: maximum number of tokens it may generate.
    span_ends: positions where the prefix cache's spans of its prompt end.
    node: the prefix cache's node of the last span before `length`; None if the prompt is not cached any further.
    chain: snapshots that its slot is restored from before its next row.
    cached_tokens: prompt tokens taken from the prefix cache.
    slot: its slot; -1 without one.
    length: tokens in its slot after all planned rows.
    prefilled: tokens of the prompt that are computed; those in flight are not.
    chunk: tokens of its prefill chunk.
    stage: the next stage of its chunk; 0 unless a part of the chunk has been planned.
    planned: tokens that the planned rows sample.
    delivered: sampled tokens that have been read and belong to the request.
    in_flight: steps planned and not yet read that contain a row of it.
    ended: no more rows are planned, and results still in flight are dropped.
    lookup: proposes drafts; None for a request without drafts.
    drafted, accepted: drafts so far, and how many of them were accepted.
    last_token: the last token delivered.
    mask: tokens that may follow the last token delivered, for a request with a guide; None allows all.
    """

    request: Request
    max_new_tokens: int
    span_ends: tuple[int, ...] = ()
    node: Node | None = None
    chain: tuple[Snapshot, ...] = ()
    cached_tokens: int = 0
    slot: int = -1
    length: int = 0
    prefilled: int = 0
    chunk: int = 0
    stage: int = 0
    planned: int = 0
    delivered: int = 0
    in_flight: int = 0
    ended: bool = False
    lookup: PromptLookup | None = None
    drafted: int = 0
    accepted: int = 0
    last_token: int = -1
    mask: bytes | None = None

    @property
    def prefills(self) -> bool:
        """Whether a part of its prompt has not been planned."""
        return self.length < len(self.request.prompt)

    def next_span(self, node: Node) -> tuple[int, ...]:
        """The tokens of the span after a node's; () after the last one that the prefix cache keeps: one token at least
        has to be computed."""
        end = self.span_ends[bisect_right(self.span_ends, node.end)]
        return self.request.prompt[node.end : end] if end < len(self.request.prompt) else ()

    def save_at(self, end: int) -> tuple[int, ...]:
        """The positions up to `end`, where its next chunk ends, of which the prefix cache keeps snapshots."""
        if self.node is None:
            return ()
        ends = self.span_ends[bisect_right(self.span_ends, self.node.end) : bisect_right(self.span_ends, end)]
        return ends[:-1] if ends and ends[-1] == len(self.request.prompt) else ends

    @property
    def waits_for_result(self) -> bool:
        """Whether its next row depends on a result that has not been read.

        Drafts depend on the last token, and so does a guide's mask. Where the guide allows all tokens, the one in
        flight belongs to the request, and the next row samples ahead, without a mask. Its token may turn out not to be
        allowed: it is then dropped and sampled again (Scheduler._step_back). A sliding layer's ring can be stepped back
        by one token, so no more than one is sampled ahead, and the sampler's penalties cannot, so they wait.
        """
        if not self.in_flight or (self.lookup is None and self.request.guide is None):
            return False
        ahead = self.lookup is None and self.mask is None and not self.request.sampling.penalized
        return self.in_flight > 1 or not ahead


@dataclass(frozen=True)
class Step:
    """The rows of one step; sequences[i] is the sequence of rows[i].

    pieces: of the prompts; their rows are the last ones.
    saved: the prefix cache's nodes of the spans that the step completes (Scheduler.save_prefixes).
    restores: (slot, snapshots) pairs; each slot is restored from its snapshots before the step is submitted.
    """

    rows: tuple[Row, ...]
    sequences: tuple[Sequence, ...]
    pieces: tuple[Piece, ...] = ()
    restores: tuple[tuple[int, tuple[Snapshot, ...]], ...] = ()
    saved: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Output:
    """One token of a sequence. end_reason: why the sequence ended with it, or the error its guide raised; None if it
    goes on."""

    sequence: Sequence
    sampled: Sampled
    end_reason: Literal["stop", "length"] | GptOssError | None
