"""The prefix cache: what was computed of earlier prompts, so that a prompt which begins alike computes only the rest.

A sliding layer keeps only a ring, which cannot be rewound; so prompts are cut at fixed places, and a snapshot of the
sequence is taken at each (backends.base.Snapshot). The snapshots form a tree, whose edges are the tokens between two
cuts. Where a prompt is cut hangs on the tokens before the cut alone: two prompts that begin alike are cut alike as far
as they go, so that what is restored is, bit for bit, what would be computed anew. Replies are not kept: they were
computed token by token, which rounds otherwise, and most of a reply, its reasoning, is dropped from the next prompt.

Plain Python; snapshots are opaque. Lives on the engine thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..backends.base import Snapshot
from .prefix_files import PrefixFiles, StoredSpan

MAX_SPAN = 256  # tokens between two cuts at most
MIN_SPAN = 64  # tokens between two cuts at least: a ring is worth 128 tokens of memory

Span = tuple[int, ...]  # the tokens between two cuts


def chunk_ends(prompt: Sequence[int], message_ends: frozenset[int], max_chunk: int) -> tuple[int, ...]:
    """Where to cut a prompt's prefill: behind a message's last token, one of `message_ends`, if that is MIN_SPAN from the cut
    before; `max_chunk` tokens behind it otherwise; and at the prompt's end."""
    found, last = [], 0
    for position, token in enumerate(prompt, 1):
        if position - last == max_chunk or (token in message_ends and position - last >= MIN_SPAN):
            found.append(position)
            last = position
    return tuple(found) if last == len(prompt) else (*found, len(prompt))


class SnapshotRunner(Protocol):
    """What the cache needs of a Runner."""

    def save(self, slot: int, start: int, end: int) -> Snapshot: ...
    def pack(self, snapshot: Snapshot) -> bytes: ...
    def unpack(self, start: int, end: int, data: bytes) -> Snapshot: ...


@dataclass(eq=False)
class Node:
    """A position where prompts were cut. span: the tokens since the parent. end: tokens from the start. snapshot: of the
    span, None where only a file has it. last_used: when, on the cache's own clock."""

    span: Span
    end: int
    parent: Node | None
    snapshot: Snapshot | None = None
    stored: StoredSpan | None = None
    last_used: int = 0
    children: dict[Span, Node] = field(default_factory=dict)

    @property
    def path(self) -> list[Node]:
        """From the first cut to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixCache:
    """SnapshotRunner of at most `max_bytes`, those used longest ago dropped first. runner: whose they are. files: where
    they are kept, too, if they shall outlast the process."""

    def __init__(self, max_bytes: int, runner: SnapshotRunner, files: PrefixFiles | None = None) -> None:
        self.root = Node((), 0, None)
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._runner = runner
        self._files = files
        self._clock = 0
        if files is not None:
            self._add_stored(files, files.scan())

    def child(self, node: Node, span: Span) -> Node | None:
        """The node that `span` leads to, ready to be restored; None if it is not known."""
        found = node.children.get(span)
        if found is None:
            return None
        if found.snapshot is None:
            self._load(found)
        if found.snapshot is None:
            return None
        self._clock += 1
        found.last_used = self._clock
        return found

    def add(self, node: Node, span: Span, slot: int) -> Node | None:
        """The node that `span` leads to, with a snapshot of the slot's sequence, which ends there, unless it is known
        already. None if there is no room beside the prompt's own beginning, or `node` was dropped meanwhile."""
        known = self.child(node, span)
        if known is not None or not self._in_tree(node):
            return known
        end = node.end + len(span)
        snapshot = self._runner.save(slot, node.end, end)
        added = node.children[span] = Node(span, end, node, snapshot)
        if self._files is not None and (node is self.root or node.stored is not None):
            added.stored = self._files.write(node.stored, span, end, self._runner.pack(snapshot))
        self._keep(added)
        self._trim_files()
        return added if added.snapshot is not None else None

    def close(self) -> None:
        """Wait until all files are written."""
        if self._files is not None:
            self._files.close()

    def _add_stored(self, files: PrefixFiles, found: Sequence[StoredSpan]) -> None:
        """Make a node of each file whose beginning is there, too; remove the others."""
        nodes: dict[str | None, Node] = {None: self.root}
        age = {stored.name: n for n, stored in enumerate(sorted(found, key=lambda stored: stored.last_used))}
        self._clock = len(found)
        for stored in sorted(found, key=lambda stored: stored.end):
            parent = nodes.get(stored.parent)
            if parent is None or parent.end + len(stored.span) != stored.end:
                files.remove(stored)
                continue
            node = Node(stored.span, stored.end, parent, stored=stored, last_used=age[stored.name])
            parent.children[stored.span] = nodes[stored.name] = node

    def _load(self, node: Node) -> None:
        """Bring a node's snapshot to memory from its file. What cannot be read is dropped; so it is computed anew."""
        assert self._files is not None and node.stored is not None
        data = self._files.read(node.stored)
        if data is None:
            self.drop(node)
            return
        node.snapshot = self._runner.unpack(node.end - len(node.span), node.end, data)
        self._keep(node)

    def _trim_files(self) -> None:
        """Remove the files used longest ago, as long as there are too many bytes of them."""
        while self._files is not None and self._files.nbytes > self._files.max_bytes:
            stored = [node for node in _descendants(self.root) if node.stored is not None]
            tips = [node for node in stored if all(child.stored is None for child in node.children.values())]
            node = min(tips, key=lambda node: node.last_used)
            assert node.stored is not None
            self._files.remove(node.stored)
            node.stored = None
            if node.snapshot is None:
                self.drop(node)

    def _keep(self, node: Node) -> None:
        """Count a node's snapshot, which has just come to memory, and make room for it."""
        assert node.snapshot is not None
        self._clock += 1
        node.last_used = self._clock
        self.nbytes += node.snapshot.nbytes
        own = set(map(id, node.path))
        while self.nbytes > self._max_bytes:
            # The new one goes first only when nothing but what leads to it is left.
            last = min((n for n in self._evictable() if id(n) not in own), key=lambda n: n.last_used, default=node)
            self._evict(last)
            if last is node:
                break

    def _evict(self, node: Node) -> None:
        """Drop a snapshot from memory, and the node with it unless a file has it."""
        assert node.snapshot is not None
        self.nbytes -= node.snapshot.nbytes
        node.snapshot = None
        if node.stored is None:
            self.drop(node)

    def drop(self, node: Node) -> None:
        """Take a node and all behind it out of the tree, and their files away."""
        assert node.parent is not None
        node.parent.children.pop(node.span, None)
        for gone in _descendants(node):
            if gone.snapshot is not None:
                self.nbytes -= gone.snapshot.nbytes
                gone.snapshot = None
            if gone.stored is not None and self._files is not None:
                self._files.remove(gone.stored)
                gone.stored = None

    def _evictable(self) -> Iterator[Node]:
        """Nodes in memory without such below them."""
        for node in _descendants(self.root):
            if node.snapshot is not None and all(n.snapshot is None for n in node.children.values()):
                yield node

    def _in_tree(self, node: Node) -> bool:
        while node.parent is not None:
            if node.parent.children.get(node.span) is not node:
                return False
            node = node.parent
        return node is self.root


def _descendants(node: Node) -> Iterator[Node]:
    """All nodes of a branch but the root."""
    waiting = [node]
    while waiting:
        found = waiting.pop()
        waiting += found.children.values()
        if found.parent is not None:
            yield found
