"""The prefix cache: snapshots of earlier prompts, so that a prompt with a common prefix computes only the rest.

A sliding-window layer keeps a ring buffer, which cannot be rewound to an earlier position. So prompts are split into
chunks, and a snapshot of the sequence is saved at the end of each chunk (backends.base.Snapshot). The snapshots form a
tree whose edges are the chunks' tokens. Where a chunk ends depends only on the tokens before that position, so two
prompts with a common prefix have the same chunks in it, and a restored cache is bit for bit what prefill would compute.

Replies are not cached: they were computed token by token, which rounds differently, and most of a reply, its
reasoning, is dropped from the next prompt.

Plain Python; snapshots are opaque. Used on the engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..backends.base import Snapshot
from .prefix_files import PrefixFiles, StoredSpan

MAX_SPAN = 256  # maximum tokens of a cached chunk
MIN_SPAN = 64  # minimum tokens of a chunk that ends with a message; the rings in a snapshot are as large as 128 tokens

Span = tuple[int, ...]  # the tokens of one chunk


def chunk_ends(prompt: Sequence[int], message_ends: frozenset[int], max_chunk: int) -> tuple[int, ...]:
    """Positions where the prefill chunks of a prompt end; the last one is the prompt's length.

    A chunk ends after a message's last token (one of `message_ends`) if it has at least MIN_SPAN tokens by then, and
    otherwise after `max_chunk` tokens.
    """
    ends, last = [], 0
    for position, token in enumerate(prompt, 1):
        if position - last == max_chunk or (token in message_ends and position - last >= MIN_SPAN):
            ends.append(position)
            last = position
    return tuple(ends) if last == len(prompt) else (*ends, len(prompt))


class SnapshotRunner(Protocol):
    """The methods of a Runner that the cache calls."""

    def save(self, slot: int, start: int, end: int) -> Snapshot: ...
    def pack(self, snapshot: Snapshot) -> bytes: ...
    def unpack(self, start: int, end: int, data: bytes) -> Snapshot: ...


@dataclass(eq=False)
class Node:
    """One chunk of a prompt.

    span: its tokens. end: position in the prompt where it ends. parent: the previous chunk; None for the root.
    snapshot: of the span; None if it is only in a file. stored: its file, if there is one.
    last_used: time of last use on the cache's own clock, a counter. children: the next chunks, by their span.
    """

    span: Span
    end: int
    parent: Node | None
    snapshot: Snapshot | None = None
    stored: StoredSpan | None = None
    last_used: int = 0
    children: dict[Span, Node] = field(default_factory=dict)

    @property
    def path(self) -> list[Node]:
        """The nodes from the first chunk to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixCache:
    """A tree of snapshots with least-recently-used eviction.

    max_bytes: device memory the snapshots may use. runner: saves, packs and unpacks them. files: also stores them on
    disk, so that they outlast the process; None keeps them in memory only.
    nbytes: device memory they use now.
    """

    def __init__(self, max_bytes: int, runner: SnapshotRunner, files: PrefixFiles | None = None) -> None:
        self.root: Node = Node((), 0, None)
        self.nbytes: int = 0
        self._max_bytes = max_bytes
        self._runner = runner
        self._files = files
        self._clock = 0
        if files is not None:
            self._add_stored(files, files.scan())

    def child(self, node: Node, span: Span) -> Node | None:
        """The child of `node` with this span, its snapshot in memory; None if it is not cached."""
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
        """The child of `node` with this span; if it is not cached, it is added with a snapshot of the slot.

        The slot's sequence must end where the span ends. Returns None if the snapshot does not fit next to those of
        the same prompt's earlier chunks, or if `node` has been dropped.
        """
        cached = self.child(node, span)
        if cached is not None or not self._in_tree(node):
            return cached
        end = node.end + len(span)
        snapshot = self._runner.save(slot, node.end, end)
        added = node.children[span] = Node(span, end, node, snapshot)
        if self._files is not None and (node is self.root or node.stored is not None):
            added.stored = self._files.write(node.stored, span, end, self._runner.pack(snapshot))
        self._count_snapshot(added)
        self._trim_files()
        return added if added.snapshot is not None else None

    def close(self) -> None:
        """Wait until all files have been written."""
        if self._files is not None:
            self._files.close()

    def _add_stored(self, files: PrefixFiles, found: Sequence[StoredSpan]) -> None:
        """Add a node for each stored chunk whose prefix is stored too; remove the other files."""
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
        """Load a node's snapshot from its file. If that cannot be read, the node is dropped and computed again."""
        assert self._files is not None and node.stored is not None
        data = self._files.read(node.stored)
        if data is None:
            self.drop(node)
            return
        node.snapshot = self._runner.unpack(node.end - len(node.span), node.end, data)
        self._count_snapshot(node)

    def _trim_files(self) -> None:
        """Remove the least recently used files until the rest fits into files.max_bytes."""
        while self._files is not None and self._files.nbytes > self._files.max_bytes:
            stored = [node for node in _subtree(self.root) if node.stored is not None]
            leaves = [node for node in stored if all(child.stored is None for child in node.children.values())]
            node = min(leaves, key=lambda node: node.last_used)
            assert node.stored is not None
            self._files.remove(node.stored)
            node.stored = None
            if node.snapshot is None:
                self.drop(node)

    def _count_snapshot(self, node: Node) -> None:
        """Count the snapshot of a node, new in memory, and evict others until all fit."""
        assert node.snapshot is not None
        self._clock += 1
        node.last_used = self._clock
        self.nbytes += node.snapshot.nbytes
        path = set(map(id, node.path))
        while self.nbytes > self._max_bytes:
            # The new snapshot itself is evicted only when nothing but its own prefix is left.
            oldest = min((n for n in self._evictable() if id(n) not in path), key=lambda n: n.last_used, default=node)
            self._evict(oldest)
            if oldest is node:
                break

    def _evict(self, node: Node) -> None:
        """Drop a node's snapshot from memory, and the node too unless a file has the snapshot."""
        assert node.snapshot is not None
        self.nbytes -= node.snapshot.nbytes
        node.snapshot = None
        if node.stored is None:
            self.drop(node)

    def drop(self, node: Node) -> None:
        """Remove a node and its descendants from the tree, and their files."""
        assert node.parent is not None
        if node.parent.children.get(node.span) is node:
            del node.parent.children[node.span]
        for removed in _subtree(node):
            if removed.snapshot is not None:
                self.nbytes -= removed.snapshot.nbytes
                removed.snapshot = None
            if removed.stored is not None and self._files is not None:
                self._files.remove(removed.stored)
                removed.stored = None

    def _evictable(self) -> Iterator[Node]:
        """Nodes with a snapshot in memory whose children have none."""
        for node in _subtree(self.root):
            if node.snapshot is not None and all(child.snapshot is None for child in node.children.values()):
                yield node

    def _in_tree(self, node: Node) -> bool:
        """Whether neither the node nor an ancestor has been dropped."""
        while node.parent is not None:
            if node.parent.children.get(node.span) is not node:
                return False
            node = node.parent
        return node is self.root


def _subtree(node: Node) -> Iterator[Node]:
    """A node and all its descendants, except the root of the tree."""
    stack = [node]
    while stack:
        found = stack.pop()
        stack += found.children.values()
        if found.parent is not None:
            yield found
