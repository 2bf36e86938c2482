"""Which rows go into the next step. Policy over ints: knows no device, no thread and no clock.

A sequence waits (first come, first served) for a slot, prefills in chunks, decodes one token a step, and ends.
Steps are planned ahead of the results of the step before, so a sequence may end while a later row of it is in
flight; its slot is freed only when no step in flight touches it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..backends.base import Limits, Row, Sampled, Snapshot
from ..errors import GptOssError, InvalidRequest
from .lookup import Lookup
from .prefix import EVERY, Node, PrefixCache, cuts
from .request import Guide, Request

READS = 8  # snapshots that one sequence has read from files in one step


@dataclass(eq=False)
class Track:
    """One request's way through the scheduler.

    room: tokens it may sample. length: tokens fed to its slot by the rows planned so far. sampled: tokens that
    the rows planned so far choose. delivered: tokens that were read and belong to the request. in_flight: steps
    planned and not yet read that carry a row of it. ended: no more rows, and whatever is still in flight is dropped.
    lookup: where drafts come from, None for a request that gets none. drafted, accepted: drafts so far, and those
    guessed right. mask: what the next row may sample, for a request with a guide.

    cuts: where its prefill is cut. node: as far as the prefix cache knows it; None if it is not kept there. chain: what
    its slot is to be restored from before the next row. cached: tokens of the prompt that did not have to be computed.

    With lookup or guide a row hangs on the result of the last one: it is planned when that was read, and fed its token
    `last`; sampled then counts what was read.
    """

    request: Request
    room: int
    cuts: tuple[int, ...]
    node: Node | None = None
    chain: tuple[Snapshot, ...] = ()
    cached: int = 0
    slot: int = -1
    length: int = 0
    sampled: int = 0
    delivered: int = 0
    in_flight: int = 0
    ended: bool = False
    lookup: Lookup | None = None
    drafted: int = 0
    accepted: int = 0
    last: int = -1
    mask: bytes | None = None

    @property
    def next_cut(self) -> int:
        return self.cuts[bisect_right(self.cuts, self.length)]

    @property
    def one_by_one(self) -> bool:
        return self.lookup is not None or self.request.guide is not None


@dataclass(frozen=True)
class Step:
    """Rows of one step; tracks[i] is the track of rows[i]. restores: slots that begin with snapshots, before it."""

    rows: tuple[Row, ...]
    tracks: tuple[Track, ...]
    restores: tuple[tuple[int, tuple[Snapshot, ...]], ...] = ()


@dataclass(frozen=True)
class Output:
    """A token that belongs to a track, and the reason if the track ended with it: an error if its guide raised one."""

    track: Track
    sampled: Sampled
    ended: Literal["stop", "length"] | GptOssError | None


def room(request: Request, limits: Limits) -> int:
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
    exactly one of read() and lose().

    release: called with a slot whose sequence ended, once no step in flight touches it.
    prefix: what is known of earlier prompts; None keeps nothing.
    """

    def __init__(self, limits: Limits, release: Callable[[int], None], prefix: PrefixCache | None = None) -> None:
        self._limits = limits
        self._release = release
        self._prefix = prefix
        self._free = deque(range(limits.slots))
        self._waiting: deque[Track] = deque()
        self._prefilling: deque[Track] = deque()
        self._decoding: list[Track] = []

    @property
    def counts(self) -> tuple[int, int]:
        """Sequences that have a slot, and those that wait for one."""
        return self._limits.slots - len(self._free), len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is no row to plan until something is added or freed."""
        return not (self._decoding or self._prefilling or (self._waiting and self._free))

    def add(self, request: Request) -> Track:
        """Queue a request. Raises InvalidRequest if its prompt does not fit into the context, and what its guide does.

        A penalty hangs on each token before it, and so does a mask: the tokens after a draft cannot be drawn along.
        """
        drafting = self._limits.drafts > 0 and not request.sampling.penalized and request.guide is None
        most = room(request, self._limits)
        places = cuts(request.prompt, request.message_ends, self._every)
        track = Track(request, most, places, lookup=Lookup(request.prompt) if drafting else None)
        if self._prefix is not None:
            track.node = self._prefix.root
        if request.guide is not None:
            track.mask = request.guide.mask()
        self._waiting.append(track)
        return track

    def end(self, track: Track) -> None:
        """Plan no more of this track and drop what is in flight. Ending twice does nothing."""
        if track.ended:
            return
        track.ended = True
        for queue in (self._waiting, self._prefilling, self._decoding):
            if track in queue:
                queue.remove(track)
        self._free_slot(track)

    def plan(self) -> Step | None:
        """The next step: every decoding sequence, and up to `chunk` prompt tokens. None if there is no row."""
        while self._waiting and self._free:
            track = self._waiting.popleft()
            track.slot = self._free.popleft()
            self._prefilling.append(track)
        # Decoding rows are listed before the prefill, which adds sequences that decode from the next step on.
        tracks = [track for track in self._decoding if not (track.one_by_one and track.in_flight)]
        rows = [self._decode(track) for track in tracks]
        if tracks:
            self._decoding = [track for track in self._decoding if track.sampled < track.room]
        chunks = self._next_chunks()
        restores = [(track.slot, track.chain) for track in chunks if track.chain]
        for track in chunks:
            track.chain = ()
            tracks.append(track)
            rows.append(self._prefill(track))
        if not rows:
            return None
        for track in tracks:
            track.in_flight += 1
        return Step(tuple(rows), tuple(tracks), tuple(restores))

    def submitted(self, step: Step) -> None:
        """The step is under way, and no other yet: keep what its chunks leave behind."""
        for track, row in zip(step.tracks, step.rows, strict=True):
            if self._prefix is not None and track.node is not None and row.tokens and row.sampling is None:
                track.node = self._prefix.add(track.node, row.tokens, row.slot)

    def read(self, step: Step, results: Sequence[Sampled | None]) -> list[Output]:
        """Take in the results of a step; tokens of ended tracks are dropped."""
        outputs = []
        for track, row, result in zip(step.tracks, step.rows, results, strict=True):
            track.in_flight -= 1
            if track.ended:
                self._free_slot(track)
            elif row.sampling is not None:
                outputs += self._deliver_all(track, row, result)
        return outputs

    def lose(self, step: Step) -> None:
        """The step failed: end its tracks."""
        for track, row in zip(step.tracks, step.rows, strict=True):
            if self._prefix is not None and track.node is not None and row.sampling is None:
                self._prefix.drop(track.node)
            track.in_flight -= 1
            if track.ended:
                self._free_slot(track)
            else:
                self.end(track)

    def _deliver_all(self, track: Track, row: Row, sampled: Sampled | None) -> list[Output]:
        """What a row sampled, up to the token that ends the track."""
        if sampled is None:
            raise RuntimeError(f"the runner sampled no token for slot {track.slot}, whose row asked for one")
        track.drafted += len(row.drafts)
        track.accepted += len(sampled.accepted)
        track.length += len(sampled.accepted)
        outputs: list[Output] = []
        for token in (sampled, *sampled.accepted):
            outputs.append(self._deliver(track, token))
            if track.ended:
                break
        return outputs

    def _deliver(self, track: Track, sampled: Sampled) -> Output:
        track.delivered += 1
        track.last = sampled.token
        if track.lookup is not None:
            track.lookup.add(sampled.token)
        if track.one_by_one:
            track.sampled = track.delivered
        ended: Literal["stop", "length"] | GptOssError | None = None
        if sampled.token in track.request.stop_ids:
            ended = "stop"
        elif track.delivered == track.room:
            ended = "length"
        elif track.request.guide is not None:
            ended = _follow(track, track.request.guide, sampled.token)
        if ended:
            self.end(track)
        return Output(track, sampled, ended)

    def _next_chunks(self) -> list[Track]:
        """Sequences that prefill a chunk in this step: as many whole chunks as fit into `chunk` tokens.

        A chunk is never cut short to fill a step, so where a prompt is cut depends on the prompt alone and not on
        what runs beside it. Served sequences go to the back: a long prompt does not hold up the short ones behind
        it. The one at the front always fits, so none starves. What another computes in the same step, to be kept,
        is waited for.
        """
        budget = self._limits.chunk
        served: list[Track] = []
        computed: set[tuple[Node, tuple[int, ...]]] = set()
        for track in self._prefilling:
            if not self._reuse(track):
                continue
            size = track.next_cut - track.length
            if size > budget:
                continue
            if track.node is not None and track.next_cut < len(track.request.prompt):
                span = (track.node, track.request.prompt[track.length : track.next_cut])
                if span in computed:
                    continue
                computed.add(span)
            budget -= size
            served.append(track)
            if not budget:
                break
        for track in served:
            self._prefilling.remove(track)
        return served

    def _reuse(self, track: Track) -> bool:
        """Go on from as much of the prompt as is known. False if more is still to be read from files: a few a step, so
        that the others need not wait."""
        node, prompt, reads = track.node, track.request.prompt, 0
        if node is None or self._prefix is None:
            return True
        while (end := track.cuts[bisect_right(track.cuts, node.end)]) < len(prompt) and reads < READS:
            known = node.children.get(prompt[node.end : end])
            reads += known is not None and known.snapshot is None
            child = self._prefix.child(node, prompt[node.end : end])
            if child is None:
                break
            node = child
        chain = tuple(step.snapshot for step in node.path if step.snapshot is not None)
        if node is not track.node and sum(snapshot.end - snapshot.start for snapshot in chain) == node.end:
            track.cached += node.end - track.length
            track.node, track.length, track.chain = node, node.end, chain
        return reads < READS

    @property
    def _every(self) -> int:
        return self._limits.chunk if self._prefix is None else min(EVERY, self._limits.chunk)

    def _prefill(self, track: Track) -> Row:
        """The row that feeds the next chunk of the prompt; the last one samples the first token."""
        request, start = track.request, track.length
        tokens = request.prompt[start : track.next_cut]
        track.length += len(tokens)
        if track.length < len(request.prompt):
            self._prefilling.append(track)
            return Row(track.slot, start, tokens)
        track.sampled = 1
        if track.sampled < track.room:
            self._decoding.append(track)
        return Row(track.slot, start, tokens, request.sampling, prompt=request.prompt, mask=track.mask)

    def _decode(self, track: Track) -> Row:
        """The row that feeds back the last sampled token and samples the next one, or with drafts the next ones."""
        start = track.length
        track.length += 1
        if track.lookup is not None:
            drafts = track.lookup.propose(min(self._limits.drafts, track.room - track.delivered - 1))
            return Row(track.slot, start, (track.last,), track.request.sampling, drafts=drafts)
        track.sampled += 1
        if track.request.guide is not None:
            return Row(track.slot, start, (track.last,), track.request.sampling, mask=track.mask)
        return Row(track.slot, start, None, track.request.sampling)

    def _free_slot(self, track: Track) -> None:
        if track.slot >= 0 and track.in_flight == 0:
            slot, track.slot = track.slot, -1
            self._free.append(slot)
            self._release(slot)


def _follow(track: Track, guide: Guide, token: int) -> GptOssError | None:
    """Tell the guide what came, and ask it what may come next. It may do so while other sequences' step is computed."""
    try:
        guide.accept(token)
        track.mask = guide.mask()
    except GptOssError as error:
        return error
    return None
