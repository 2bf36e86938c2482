"""Which rows go into the next step. Policy over ints: knows no device, no thread and no clock.

A sequence waits (first come, first served) for a slot, prefills in chunks, decodes one token a step, and ends.
Steps are planned ahead of the results of the step before, so a sequence may end while a later row of it is in
flight; its slot is freed only when no step in flight touches it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ..backends.base import Limits, Row, Sampled, Snapshot
from ..errors import GptOssError, InvalidRequest
from .lookup import PromptLookup
from .prefix import MAX_SPAN, Node, PrefixCache, chunk_ends
from .request import Guide, Request

MAX_READS = 8  # snapshots that one sequence has read from files in one step


@dataclass(eq=False)
class Sequence:
    """One request's way through the scheduler.

    max_new_tokens: tokens it may sample. length: tokens fed to its slot by the rows planned so far. planned: tokens that
    the rows planned so far choose. delivered: tokens that were read and belong to the request. in_flight: steps
    planned and not yet read that carry a row of it. ended: no more rows, and whatever is still in flight is dropped.
    lookup: where drafts come from, None for a request that gets none. drafted, accepted: drafts so far, and those
    guessed right. mask: what the next row may sample, for a request with a guide.

    chunk_ends: where its prefill is cut. node: as far as the prefix cache knows it; None if it is not kept there. chain: what
    its slot is to be restored from before the next row. cached_tokens: tokens of the prompt that did not have to be computed.

    With lookup or guide a row hangs on the result of the last one: it is planned when that was read, and fed its token
    `last_token`; planned then counts what was read.
    """

    request: Request
    max_new_tokens: int
    chunk_ends: tuple[int, ...]
    node: Node | None = None
    chain: tuple[Snapshot, ...] = ()
    cached_tokens: int = 0
    slot: int = -1
    length: int = 0
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
    def next_chunk_end(self) -> int:
        return self.chunk_ends[bisect_right(self.chunk_ends, self.length)]

    @property
    def waits_for_result(self) -> bool:
        return self.lookup is not None or self.request.guide is not None


@dataclass(frozen=True)
class Step:
    """Rows of one step; sequences[i] is the sequence of rows[i]. restores: slots that begin with snapshots, before it."""

    rows: tuple[Row, ...]
    sequences: tuple[Sequence, ...]
    restores: tuple[tuple[int, tuple[Snapshot, ...]], ...] = ()


@dataclass(frozen=True)
class Output:
    """A token that belongs to a sequence, and the reason if the sequence ended with it: an error if its guide raised one."""

    sequence: Sequence
    sampled: Sampled
    end_reason: Literal["stop", "length"] | GptOssError | None


def max_new_tokens(request: Request, limits: Limits) -> int:
    """Tokens that `request` may generate: max_tokens, or what its prompt leaves of the context.

    Raises InvalidRequest if the prompt leaves no room at all.
    """
    left = limits.max_context - len(request.prompt)
    if left < 1:
        raise InvalidRequest(
            f"the prompt has {len(request.prompt)} tokens and the context holds {limits.max_context}, so there is no "
            "room for an answer; shorten the prompt or load the model with a larger max_context"
        )
    return min(request.max_tokens, left)


class Scheduler:
    """Plans steps and reads their results. The caller runs every planned step, in order, and hands each one to
    exactly one of process_results() and fail().

    release: called with a slot whose sequence ended, once no step in flight touches it.
    prefix: what is known of earlier prompts; None keeps nothing.
    """

    def __init__(self, limits: Limits, release: Callable[[int], None], prefix: PrefixCache | None = None) -> None:
        self._limits = limits
        self._release = release
        self._prefix = prefix
        self._free = deque(range(limits.slots))
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._decoding: list[Sequence] = []

    @property
    def counts(self) -> tuple[int, int]:
        """Sequences that have a slot, and those that wait for one."""
        return self._limits.slots - len(self._free), len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is no row to plan until something is added or freed."""
        return not (self._decoding or self._prefilling or (self._waiting and self._free))

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises InvalidRequest if its prompt does not fit into the context, and what its guide does.

        A penalty hangs on each token before it, and so does a mask: the tokens after a draft cannot be drawn along.
        """
        drafting = self._limits.drafts > 0 and not request.sampling.penalized and request.guide is None
        limit = max_new_tokens(request, self._limits)
        ends = chunk_ends(request.prompt, request.message_ends, self._max_chunk)
        sequence = Sequence(request, limit, ends, lookup=PromptLookup(request.prompt) if drafting else None)
        if self._prefix is not None:
            sequence.node = self._prefix.root
        if request.guide is not None:
            sequence.mask = request.guide.mask()
        self._waiting.append(sequence)
        return sequence

    def end(self, sequence: Sequence) -> None:
        """Plan no more of this sequence and drop what is in flight. Ending twice does nothing."""
        if sequence.ended:
            return
        sequence.ended = True
        for queue in (self._waiting, self._prefilling, self._decoding):
            if sequence in queue:
                queue.remove(sequence)
        self._free_slot(sequence)

    def plan(self) -> Step | None:
        """The next step: every decoding sequence, and up to `chunk` prompt tokens. None if there is no row."""
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.popleft()
            self._prefilling.append(sequence)
        # Decoding rows are listed before the prefill, which adds sequences that decode from the next step on.
        sequences = [sequence for sequence in self._decoding if not (sequence.waits_for_result and sequence.in_flight)]
        rows = [self._decode_row(sequence) for sequence in sequences]
        if sequences:
            self._decoding = [sequence for sequence in self._decoding if sequence.planned < sequence.max_new_tokens]
        chunks = self._next_chunks()
        restores = [(sequence.slot, sequence.chain) for sequence in chunks if sequence.chain]
        for sequence in chunks:
            sequence.chain = ()
            sequences.append(sequence)
            rows.append(self._prefill_row(sequence))
        if not rows:
            return None
        for sequence in sequences:
            sequence.in_flight += 1
        return Step(tuple(rows), tuple(sequences), tuple(restores))

    def save_prefixes(self, step: Step) -> None:
        """The step is under way, and no other yet: keep what its chunks leave behind."""
        for sequence, row in zip(step.sequences, step.rows, strict=True):
            if self._prefix is not None and sequence.node is not None and row.tokens and row.sampling is None:
                sequence.node = self._prefix.add(sequence.node, row.tokens, row.slot)

    def process_results(self, step: Step, results: Iterable[Sampled | None]) -> list[Output]:
        """Take in the results of a step; tokens of ended sequences are dropped."""
        outputs = []
        for sequence, row, result in zip(step.sequences, step.rows, results, strict=True):
            sequence.in_flight -= 1
            if sequence.ended:
                self._free_slot(sequence)
            elif row.sampling is not None:
                outputs += self._deliver_all(sequence, row, result)
        return outputs

    def fail(self, step: Step) -> None:
        """The step failed: end its sequences."""
        for sequence, row in zip(step.sequences, step.rows, strict=True):
            if self._prefix is not None and sequence.node is not None and row.sampling is None:
                self._prefix.drop(sequence.node)
            sequence.in_flight -= 1
            if sequence.ended:
                self._free_slot(sequence)
            else:
                self.end(sequence)

    def _deliver_all(self, sequence: Sequence, row: Row, sampled: Sampled | None) -> list[Output]:
        """What a row sampled, up to the token that ends the sequence."""
        if sampled is None:
            raise RuntimeError(f"the runner sampled no token for slot {sequence.slot}, whose row asked for one")
        sequence.drafted += len(row.drafts)
        sequence.accepted += len(sampled.accepted)
        sequence.length += len(sampled.accepted)
        outputs: list[Output] = []
        for token in (sampled, *sampled.accepted):
            outputs.append(self._deliver(sequence, token))
            if sequence.ended:
                break
        return outputs

    def _deliver(self, sequence: Sequence, sampled: Sampled) -> Output:
        sequence.delivered += 1
        sequence.last_token = sampled.token
        if sequence.lookup is not None:
            sequence.lookup.add(sampled.token)
        if sequence.waits_for_result:
            sequence.planned = sequence.delivered
        end_reason: Literal["stop", "length"] | GptOssError | None = None
        if sampled.token in sequence.request.stop_ids:
            end_reason = "stop"
        elif sequence.delivered == sequence.max_new_tokens:
            end_reason = "length"
        elif sequence.request.guide is not None:
            end_reason = _advance_guide(sequence, sequence.request.guide, sampled.token)
        if end_reason:
            self.end(sequence)
        return Output(sequence, sampled, end_reason)

    def _next_chunks(self) -> list[Sequence]:
        """Sequences that prefill a chunk in this step: as many whole chunks as fit into `chunk` tokens.

        A chunk is never cut short to fill a step, so where a prompt is cut depends on the prompt alone and not on
        what runs beside it. Served sequences go to the back: a long prompt does not hold up the short ones behind
        it. The one at the front always fits, so none starves. What another computes in the same step, to be kept,
        is waited for.
        """
        budget = self._limits.chunk
        served: list[Sequence] = []
        computed: set[tuple[Node, tuple[int, ...]]] = set()
        for sequence in self._prefilling:
            if not self._use_prefix_cache(sequence):
                continue
            size = sequence.next_chunk_end - sequence.length
            if size > budget:
                continue
            if sequence.node is not None and sequence.next_chunk_end < len(sequence.request.prompt):
                span = (sequence.node, sequence.request.prompt[sequence.length : sequence.next_chunk_end])
                if span in computed:
                    continue
                computed.add(span)
            budget -= size
            served.append(sequence)
            if not budget:
                break
        for sequence in served:
            self._prefilling.remove(sequence)
        return served

    def _use_prefix_cache(self, sequence: Sequence) -> bool:
        """Go on from as much of the prompt as is known. False if more is still to be read from files: a few a step, so
        that the others need not wait."""
        node, prompt, reads = sequence.node, sequence.request.prompt, 0
        if node is None or self._prefix is None:
            return True
        while (end := sequence.chunk_ends[bisect_right(sequence.chunk_ends, node.end)]) < len(
            prompt
        ) and reads < MAX_READS:
            known = node.children.get(prompt[node.end : end])
            reads += known is not None and known.snapshot is None
            child = self._prefix.child(node, prompt[node.end : end])
            if child is None:
                break
            node = child
        chain = tuple(step.snapshot for step in node.path if step.snapshot is not None)
        if node is not sequence.node and sum(snapshot.end - snapshot.start for snapshot in chain) == node.end:
            sequence.cached_tokens += node.end - sequence.length
            sequence.node, sequence.length, sequence.chain = node, node.end, chain
        return reads < MAX_READS

    @property
    def _max_chunk(self) -> int:
        return self._limits.chunk if self._prefix is None else min(MAX_SPAN, self._limits.chunk)

    def _prefill_row(self, sequence: Sequence) -> Row:
        """The row that feeds the next chunk of the prompt; the last one samples the first token."""
        request, start = sequence.request, sequence.length
        tokens = request.prompt[start : sequence.next_chunk_end]
        sequence.length += len(tokens)
        if sequence.length < len(request.prompt):
            self._prefilling.append(sequence)
            return Row(sequence.slot, start, tokens)
        sequence.planned = 1
        if sequence.planned < sequence.max_new_tokens:
            self._decoding.append(sequence)
        return Row(sequence.slot, start, tokens, request.sampling, prompt=request.prompt, mask=sequence.mask)

    def _decode_row(self, sequence: Sequence) -> Row:
        """The row that feeds back the last sampled token and samples the next one, or with drafts the next ones."""
        start = sequence.length
        sequence.length += 1
        if sequence.lookup is not None:
            drafts = sequence.lookup.propose(min(self._limits.drafts, sequence.max_new_tokens - sequence.delivered - 1))
            return Row(sequence.slot, start, (sequence.last_token,), sequence.request.sampling, drafts=drafts)
        sequence.planned += 1
        if sequence.request.guide is not None:
            return Row(sequence.slot, start, (sequence.last_token,), sequence.request.sampling, mask=sequence.mask)
        return Row(sequence.slot, start, None, sequence.request.sampling)

    def _free_slot(self, sequence: Sequence) -> None:
        if sequence.slot >= 0 and sequence.in_flight == 0:
            slot, sequence.slot = sequence.slot, -1
            self._free.append(slot)
            self._release(slot)


def _advance_guide(sequence: Sequence, guide: Guide, token: int) -> GptOssError | None:
    """Tell the guide what came, and ask it what may come next. It may do so while other sequences' step is computed."""
    try:
        guide.accept(token)
        sequence.mask = guide.mask()
    except GptOssError as error:
        return error
    return None
