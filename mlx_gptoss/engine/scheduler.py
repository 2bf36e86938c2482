"""Decides which rows go into the next step. Scheduling policy over ints: no device, no threads, no clock.

A sequence waits for a slot (first come, first served), prefills its prompt in chunks, decodes one token a step, and
ends. While others decode, a chunk is computed in pieces (pace.py). Steps are planned before the results of the previous
step are known, so a sequence may end while a later row of it is in flight. Its slot is freed only when no step in
flight uses it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal

from ..backends.base import Limits, Row, Sampled
from ..errors import GptOssError, InvalidRequest
from .lookup import PromptLookup
from .pace import Pace, Piece
from .prefix import MAX_SPAN, Node, PrefixCache, span_ends
from .request import Guide, Request
from .sequence import Output, Sequence, Step

MAX_READS = 8  # snapshots that one sequence may read from files in one step


def max_new_tokens(request: Request, limits: Limits) -> int:
    """Number of tokens `request` may generate: its max_tokens, or what its prompt leaves of the context.

    Raises InvalidRequest if the prompt fills the context.
    """
    left = limits.max_context - len(request.prompt)
    if left < 1:
        raise InvalidRequest(
            f"the prompt has {len(request.prompt)} tokens and the context holds {limits.max_context}, so there is no "
            "room for an answer; shorten the prompt or load the model with a larger max_context"
        )
    return min(request.max_tokens, left)


class Scheduler:
    """Plans steps and processes their results.

    The caller submits every planned step, in order, and passes each one to exactly one of process_results() and
    fail().

    release: called with the slot of a sequence that has ended, once no step in flight uses the slot.
    prefix: the prefix cache; None disables it.
    stages: number of stages of a forward pass (backends.base.stage_count).
    """

    def __init__(
        self,
        limits: Limits,
        release: Callable[[int], None],
        prefix: PrefixCache | None = None,
        stages: int = 1,
    ) -> None:
        self._limits = limits
        self._release = release
        self._prefix = prefix
        self._stages = stages
        self._pace = Pace(stages)
        self._free = deque(range(limits.slots))
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._decoding: list[Sequence] = []

    @property
    def counts(self) -> tuple[int, int]:
        """Number of sequences that have a slot, and of those that wait for one."""
        return self._limits.slots - len(self._free), len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether no row can be planned until a request is added or a slot is freed."""
        return not (self._decoding or self._prefilling or (self._waiting and self._free))

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises InvalidRequest if its prompt fills the context, and whatever its guide raises.

        A request with penalties gets no drafts: they depend on every earlier token, so the tokens after a draft cannot
        be sampled in the same step.
        """
        drafting = self._limits.drafts > 0 and not request.sampling.penalized
        limit = max_new_tokens(request, self._limits)
        sequence = Sequence(request, limit, lookup=PromptLookup(request.prompt) if drafting else None)
        if self._prefix is not None:
            sequence.span_ends = span_ends(request.prompt, request.message_ends, self._max_span)
            sequence.node = self._prefix.root_of(None if request.adapter is None else request.adapter.digest)
        if request.guide is not None:
            sequence.mask = request.guide.mask()
        self._waiting.append(sequence)
        return sequence

    def end(self, sequence: Sequence) -> None:
        """Plan no more rows of this sequence and drop its results in flight. Ending it twice does nothing."""
        if sequence.ended:
            return
        sequence.ended = True
        for queue in (self._waiting, self._prefilling, self._decoding):
            if sequence in queue:
                queue.remove(sequence)
        self._free_slot(sequence)

    def plan(self) -> Step | None:
        """The next step: a row for every decoding sequence, and up to Limits.chunk prompt tokens. None if there is
        nothing to compute before another result is read."""
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.popleft()
            self._prefilling.append(sequence)
        # Decoding rows are planned before prefill rows: the latter add sequences that decode from the next step on.
        decoding = len(self._decoding)
        sequences = [sequence for sequence in self._decoding if not sequence.waits_for_result]
        rows = [self._decode_row(sequence) for sequence in sequences]
        if sequences:
            self._decoding = [sequence for sequence in self._decoding if sequence.planned < sequence.max_new_tokens]
        served = self._next_pieces(decoding, len(rows))
        restores = [(sequence.slot, sequence.chain) for sequence, _ in served if sequence.chain]
        for sequence, piece in served:
            sequence.chain = ()
            sequences.append(sequence)
            rows.append(self._prefill_row(sequence, piece))
        self._queue_again([sequence for sequence, _ in served], had_turns=1 if decoding else len(served))
        if not rows:
            return None
        for sequence in sequences:
            sequence.in_flight += 1
        return Step(tuple(rows), tuple(sequences), tuple(piece for _, piece in served), tuple(restores))

    def record_cost(self, step: Step, seconds: float) -> None:
        """Learn what a step has cost, for the size of later ones."""
        self._pace.record(len(step.rows) - len(step.pieces), step.pieces, seconds)

    def save_prefixes(self, step: Step) -> None:
        """Save the spans that a step completes in the prefix cache. Call it after submitting the step and before the
        next one."""
        for sequence, row in zip(step.sequences, step.rows, strict=True):
            if sequence.ended or (row.stages is not None and row.stages[1] < self._stages):
                continue
            for _ in row.save_at:
                if self._prefix is None or sequence.node is None:
                    break
                sequence.node = self._prefix.add(sequence.node, sequence.next_span(sequence.node), row.slot)
                step.saved.extend([sequence.node] if sequence.node else [])

    def process_results(self, step: Step, results: Iterable[Sampled | None]) -> list[Output]:
        """The tokens of a step that has been computed. Tokens of ended sequences are dropped."""
        outputs = []
        for sequence, row, result in zip(step.sequences, step.rows, results, strict=True):
            sequence.in_flight -= 1
            if row.tokens and not sequence.delivered:
                complete = row.stages is None or row.stages[1] == self._stages
                sequence.prefilled = row.start + (len(row.tokens) if complete else 0)
            if sequence.ended:
                self._free_slot(sequence)
            elif row.sampling is not None:
                outputs += self._deliver_all(sequence, row, result)
        return outputs

    def fail(self, step: Step) -> None:
        """End the sequences of a step that raised an exception, and drop what the prefix cache saved of it."""
        for node in step.saved:
            assert self._prefix is not None
            self._prefix.drop(node)
        for sequence in step.sequences:
            sequence.in_flight -= 1
            if sequence.ended:
                self._free_slot(sequence)
            else:
                self.end(sequence)

    def _deliver_all(self, sequence: Sequence, row: Row, sampled: Sampled | None) -> list[Output]:
        """The tokens a row sampled (the accepted drafts included), up to the one that ends the sequence, or to one that
        the guide does not allow."""
        if sampled is None:
            raise RuntimeError(f"the runner sampled no token for slot {sequence.slot}, whose row asked for one")
        sequence.drafted += len(row.drafts)
        sequence.accepted += len(sampled.accepted)
        sequence.length += len(sampled.accepted)
        outputs: list[Output] = []
        for place, token in enumerate((sampled, *sampled.accepted)):
            if row.mask is None and not _is_allowed(token.token, sequence.mask):
                sequence.accepted -= len(sampled.accepted) - max(place - 1, 0)
                self._step_back(sequence, row.start + place)
                break
            outputs.append(self._deliver(sequence, token))
            if sequence.ended:
                break
        return outputs

    def _step_back(self, sequence: Sequence, position: int) -> None:
        """Drop the tokens sampled after the last one delivered, which is at `position`: the next row feeds it again."""
        sequence.length, sequence.planned = position, sequence.delivered
        if sequence not in self._decoding:
            self._decoding.append(sequence)

    def _deliver(self, sequence: Sequence, sampled: Sampled) -> Output:
        """Count one token, and end the sequence if it is the last."""
        request = sequence.request
        sequence.delivered += 1
        sequence.last_token = sampled.token
        if sequence.lookup is not None:
            sequence.lookup.add(sampled.token)
            sequence.planned = sequence.delivered
        ends = None if request.guide is None else request.guide.ends_with(sampled.token)
        end_reason: Literal["stop", "length"] | GptOssError | None = None
        if ends or (ends is None and sampled.token in request.stop_ids):
            end_reason = "stop"
        elif sequence.delivered == sequence.max_new_tokens:
            end_reason = "length"
        elif request.guide is not None:
            end_reason = _advance_guide(sequence, request.guide, sampled.token)
        if end_reason:
            self.end(sequence)
        return Output(sequence, sampled, end_reason)

    def _next_pieces(self, decoding: int, ready: int) -> list[tuple[Sequence, Piece]]:
        """The sequences that prefill in this step, each with the piece of its chunk that it computes. decoding: number
        of sequences that decode; ready: of those with a row in this step.

        While others decode, these are the pieces that the pace allows; otherwise as many whole chunks as fit
        into Limits.chunk. A chunk is never shortened to fill a step, and a piece ends between two layers. The first one
        in the queue always fits, so no sequence starves.
        """
        budget_s = self._pace.begin_step(decoding, ready) if decoding and self._prefilling else 0.0
        if budget_s is None:
            return []
        served: list[tuple[Sequence, Piece]] = []
        spent_s = 0.0
        for sequence, tokens in self._chunks(decoding):
            if not decoding:
                served.append((sequence, Piece(tokens, sequence.stage, self._stages)))
                continue
            fitting = self._pace.fit(tokens, sequence.stage, budget_s - spent_s, at_least_one=not served)
            if fitting is None:
                break
            served.append((sequence, fitting[0]))
            spent_s += fitting[1]
        if decoding:
            self._pace.spend(decoding, spent_s)
        for sequence, _ in served:
            self._prefilling.remove(sequence)
        return served

    def _queue_again(self, served: list[Sequence], had_turns: int) -> None:
        """Put the sequences that were served and go on into the queue: the first had_turns of them at its end, so that
        a long prompt does not delay the short ones behind it. The others, which took what those left of the time, keep
        their place."""
        first, others = served[:had_turns], served[had_turns:]
        self._prefilling.extend(sequence for sequence in first if sequence.prefills)
        self._prefilling.extendleft(sequence for sequence in reversed(others) if sequence.prefills)

    def _chunks(self, decoding: int) -> Iterator[tuple[Sequence, int]]:
        """The sequences whose next chunk may be computed in this step, with its number of tokens.

        Limits.chunk bounds the tokens of all chunks that are begun, since their hidden states are kept. If another
        sequence computes and caches the same span, the sequence waits and takes it from the cache.
        """
        begun = [sequence for sequence in self._prefilling if sequence.stage]
        budget = self._limits.chunk - sum(sequence.chunk for sequence in begun)
        computed = {self._span(sequence) for sequence in begun}
        for sequence in list(self._prefilling):
            if not sequence.stage:
                if not self._use_prefix_cache(sequence):
                    continue
                left = len(sequence.request.prompt) - sequence.length
                size = min(self._chunk_tokens(decoding, budget), left)
                span = self._span(sequence)
                if size > budget or (span is not None and span in computed):
                    continue
                budget -= size
                computed.add(span)
                sequence.chunk = size
            yield sequence, sequence.chunk

    def _chunk_tokens(self, decoding: int, budget: int) -> int:
        """Maximum tokens of a chunk that begins now. budget: what is left of Limits.chunk.

        With the prefix cache, whose snapshots are the same up to rounding in any chunks, it depends on whether others
        decode. Without it, what a prompt computes depends on the prompt alone, not on what else is running.
        """
        if self._prefix is None or not decoding:
            return self._limits.chunk
        return self._pace.chunk_tokens(decoding, self._max_span, budget // 2)

    def _span(self, sequence: Sequence) -> tuple[Node, tuple[int, ...]] | None:
        """Where the prefix cache keeps the next span of a sequence; None if it does not."""
        if sequence.node is None or not (span := sequence.next_span(sequence.node)):
            return None
        return sequence.node, span

    def _use_prefix_cache(self, sequence: Sequence) -> bool:
        """Continue from the longest cached prefix of the prompt. False if more snapshots are still to be read from
        files: MAX_READS a step, so that other sequences are not delayed."""
        node, reads = sequence.node, 0
        if node is None or self._prefix is None:
            return True
        while reads < MAX_READS and (span := sequence.next_span(node)):
            known = node.children.get(span)
            reads += known is not None and known.snapshot is None
            child = self._prefix.child(node, span)
            if child is None:
                break
            node = child
        chain = tuple(ancestor.snapshot for ancestor in node.path if ancestor.snapshot is not None)
        if node.end > sequence.length and sum(snapshot.end - snapshot.start for snapshot in chain) == node.end:
            sequence.cached_tokens += node.end - sequence.length
            sequence.node, sequence.length, sequence.chain = node, node.end, chain
        return reads < MAX_READS

    @property
    def _max_span(self) -> int:
        """Maximum tokens of the prefix cache's spans."""
        return min(MAX_SPAN, self._limits.chunk)

    def _prefill_row(self, sequence: Sequence, piece: Piece) -> Row:
        """The row for a piece of the next chunk of the prompt. The last one of the last chunk samples the first
        token."""
        request, start = sequence.request, sequence.length
        end = start + piece.tokens
        row = Row(
            sequence.slot,
            start,
            request.prompt[start:end],
            stages=None if (piece.first, piece.end) == (0, self._stages) else (piece.first, piece.end),
            adapter=request.adapter_index,
            save_at=sequence.save_at(end),
        )
        sequence.stage = piece.end % self._stages
        if sequence.stage:
            return row
        sequence.length = end
        if sequence.prefills:
            return row
        sequence.planned = 1
        if sequence.planned < sequence.max_new_tokens:
            self._decoding.append(sequence)
        return replace(row, sampling=request.sampling, prompt=request.prompt, mask=sequence.mask)

    def _decode_row(self, sequence: Sequence) -> Row:
        """The row that feeds the last sampled token and samples the next one, or several with drafts."""
        start, request = sequence.length, sequence.request
        sequence.length += 1
        if sequence.lookup is not None:
            most = min(self._limits.drafts, sequence.max_new_tokens - sequence.delivered - 1)
            drafts = () if sequence.mask is not None else sequence.lookup.propose(most)
            return Row(
                sequence.slot,
                start,
                (sequence.last_token,),
                request.sampling,
                drafts=drafts,
                mask=sequence.mask,
                adapter=request.adapter_index,
            )
        sequence.planned += 1
        # A guide's token that was read is given: the device may hold one that was dropped.
        given = None if request.guide is None or sequence.in_flight else (sequence.last_token,)
        return Row(sequence.slot, start, given, request.sampling, mask=sequence.mask, adapter=request.adapter_index)

    def _free_slot(self, sequence: Sequence) -> None:
        """Release the slot, unless a step in flight uses it."""
        if sequence.slot >= 0 and sequence.in_flight == 0:
            slot, sequence.slot = sequence.slot, -1
            self._free.append(slot)
            self._release(slot)


def _is_allowed(token: int, mask: bytes | None) -> bool:
    """Whether a mask (backends.base.Row) allows the token."""
    return mask is None or (token >> 3 < len(mask) and bool(mask[token >> 3] >> (token & 7) & 1))


def _advance_guide(sequence: Sequence, guide: Guide, token: int) -> GptOssError | None:
    """Give the guide the token and get the next mask; returns the error if it raises one.

    This may run while the device computes a step of the other sequences.
    """
    try:
        guide.accept(token)
        sequence.mask = guide.mask()
    except GptOssError as error:
        return error
    return None
