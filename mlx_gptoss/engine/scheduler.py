"""Decides which rows go into the next step. Scheduling policy over ints: no device, no threads, no clock.

A sequence waits for a slot (first come, first served), prefills its prompt in chunks, decodes one token a step, and
ends. Steps are planned before the results of the previous step are known, so a sequence may end while a later row of
it is in flight. Its slot is freed only when no step in flight uses it.
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

MAX_READS = 8  # snapshots that one sequence may read from files in one step


@dataclass(eq=False)
class Sequence:
    """The scheduling state of one request.

    max_new_tokens: maximum number of tokens it may generate.
    chunk_ends: positions where the prefill chunks of its prompt end.
    node: the prefix cache's node for the prompt so far; None if the prompt is not cached any further.
    chain: snapshots that its slot is restored from before its next row.
    cached_tokens: prompt tokens taken from the prefix cache.
    slot: its slot; -1 without one.
    length: tokens in its slot after all planned rows.
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
        return self.chunk_end_after(self.length)

    def chunk_end_after(self, position: int) -> int:
        return self.chunk_ends[bisect_right(self.chunk_ends, position)]

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

    restores: (slot, snapshots) pairs; each slot is restored from its snapshots before the step is submitted.
    """

    rows: tuple[Row, ...]
    sequences: tuple[Sequence, ...]
    restores: tuple[tuple[int, tuple[Snapshot, ...]], ...] = ()


@dataclass(frozen=True)
class Output:
    """One token of a sequence. end_reason: why the sequence ended with it, or the error its guide raised; None if it
    goes on."""

    sequence: Sequence
    sampled: Sampled
    end_reason: Literal["stop", "length"] | GptOssError | None


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
        ends = chunk_ends(request.prompt, request.message_ends, self._max_chunk)
        sequence = Sequence(request, limit, ends, lookup=PromptLookup(request.prompt) if drafting else None)
        if self._prefix is not None:
            sequence.node = self._prefix.root
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
        nothing to compute."""
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.popleft()
            self._prefilling.append(sequence)
        # Decoding rows are planned before prefill rows: the latter add sequences that decode from the next step on.
        sequences = [sequence for sequence in self._decoding if not sequence.waits_for_result]
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
        """Save the prefill chunks of a step in the prefix cache. Call it after submitting the step and before the
        next one."""
        for sequence, row in zip(step.sequences, step.rows, strict=True):
            if self._prefix is not None and sequence.node is not None and row.tokens and row.sampling is None:
                sequence.node = self._prefix.add(sequence.node, row.tokens, row.slot)

    def process_results(self, step: Step, results: Iterable[Sampled | None]) -> list[Output]:
        """The tokens of a step that has been computed. Tokens of ended sequences are dropped."""
        outputs = []
        for sequence, row, result in zip(step.sequences, step.rows, results, strict=True):
            sequence.in_flight -= 1
            if sequence.ended:
                self._free_slot(sequence)
            elif row.sampling is not None:
                outputs += self._deliver_all(sequence, row, result)
        return outputs

    def fail(self, step: Step) -> None:
        """End the sequences of a step that raised an exception, and drop what the prefix cache saved of it."""
        for sequence, row in zip(step.sequences, step.rows, strict=True):
            if self._prefix is not None and sequence.node is not None and row.sampling is None:
                self._prefix.drop(sequence.node)
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

    def _next_chunks(self) -> list[Sequence]:
        """The sequences that prefill one chunk each in this step: as many whole chunks as fit into Limits.chunk.

        A chunk is never shortened to fill a step, so a prompt's chunks depend on the prompt alone, not on what else
        is running. A served sequence goes to the back of the queue, so a long prompt does not delay the short ones
        behind it. The first chunk in the queue always fits, so no sequence starves. If another sequence computes and
        caches the same chunk in this step, the sequence waits and takes it from the cache.
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
        """Continue from the longest cached prefix of the prompt. False if more snapshots are still to be read from
        files: MAX_READS a step, so that other sequences are not delayed."""
        node, prompt, reads = sequence.node, sequence.request.prompt, 0
        if node is None or self._prefix is None:
            return True
        while reads < MAX_READS and (end := sequence.chunk_end_after(node.end)) < len(prompt):
            span = prompt[node.end : end]
            known = node.children.get(span)
            reads += known is not None and known.snapshot is None
            child = self._prefix.child(node, span)
            if child is None:
                break
            node = child
        chain = tuple(ancestor.snapshot for ancestor in node.path if ancestor.snapshot is not None)
        if node is not sequence.node and sum(snapshot.end - snapshot.start for snapshot in chain) == node.end:
            sequence.cached_tokens += node.end - sequence.length
            sequence.node, sequence.length, sequence.chain = node, node.end, chain
        return reads < MAX_READS

    @property
    def _max_chunk(self) -> int:
        """Maximum tokens of a prefill chunk."""
        return self._limits.chunk if self._prefix is None else min(MAX_SPAN, self._limits.chunk)

    def _prefill_row(self, sequence: Sequence) -> Row:
        """The row for the next chunk of the prompt. The last chunk's row samples the first token."""
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
        """The row that feeds the last sampled token and samples the next one, or several with drafts."""
        start, request = sequence.length, sequence.request
        sequence.length += 1
        if sequence.lookup is not None:
            most = min(self._limits.drafts, sequence.max_new_tokens - sequence.delivered - 1)
            drafts = () if sequence.mask is not None else sequence.lookup.propose(most)
            return Row(
                sequence.slot, start, (sequence.last_token,), request.sampling, drafts=drafts, mask=sequence.mask
            )
        sequence.planned += 1
        # A guide's token that was read is given: the device may hold one that was dropped.
        given = None if request.guide is None or sequence.in_flight else (sequence.last_token,)
        return Row(sequence.slot, start, given, request.sampling, mask=sequence.mask)

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
