"""The prefix cache: snapshots of earlier prompts, so that a prompt with a common prefix computes only the rest.

A sliding-window layer keeps a ring buffer, which cannot be rewound to an earlier position. So prompts are split into
spans, and a snapshot of the sequence is saved at the end of each span (backends.base.Snapshot). The snapshots form a
tree whose edges are the spans' tokens. Where a span ends depends only on the tokens before that position, so two
prompts with a common prefix have the same spans in it.

A prefill chunk computes many spans at once, and may end inside of one. A snapshot has the keys and values of the chunks
that first computed its span; a prompt that is computed in other chunks has the same ones up to rounding.

Replies are not cached: they were computed token by token, which rounds differently, and most of a reply, its
reasoning, is dropped from the next prompt.

Plain Python; snapshots are opaque. Used on the engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import time
from typing import Protocol

from ..backends.base import Snapshot
from .prefix_files import STALE_S, Changes, PrefixFiles
from .span_file import StoredSpan

MAX_SPAN = 256  # maximum tokens of a span
MIN_SPAN = 64  # minimum tokens of a span that ends with a message; the rings in a snapshot are as large as 128 tokens

Span = tuple[int, ...]  # the tokens of one span


def span_ends(prompt: Sequence[int], message_ends: frozenset[int], max_span: int) -> tuple[int, ...]:
    """Positions where the spans of a prompt end; the last one is the prompt's length.

    A span ends after a message's last token (one of `message_ends`) if it has at least MIN_SPAN tokens by then, and
    otherwise after `max_span` tokens.
    """
    ends, last = [], 0
    for position, token in enumerate(prompt, 1):
        if position - last == max_span or (token in message_ends and position - last >= MIN_SPAN):
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
    """One span of a prompt.

    span: its tokens; a root's are none. end: position in the prompt where it ends. parent: the previous span; None for
        the root.
    snapshot: of the span; None if it is only in a file. stored: its file, if there is one.
    last_used: time of last use on the cache's own clock, a counter. adapter: of a root, the digest. children: the next
        spans, by their tokens.
    """

    span: Span
    end: int
    parent: Node | None
    snapshot: Snapshot | None = None
    stored: StoredSpan | None = None
    last_used: int = 0
    adapter: str | None = None
    children: dict[Span, Node] = field(default_factory=dict)

    @property
    def path(self) -> list[Node]:
        """The nodes from the first span to this one."""
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

    A file that cannot be used is a miss: its span is computed again.
    """

    def __init__(self, max_bytes: int, runner: SnapshotRunner, files: PrefixFiles | None = None) -> None:
        self._roots: dict[str | None, Node] = {}  # by the adapter's digest; None for the model as it is
        self.nbytes: int = 0
        self._max_bytes = max_bytes
        self._runner = runner
        self._files = files
        self._clock = 0
        self._stored: dict[str, Node] = {}  # nodes that have a file, by its name
        if files is not None:
            self._add_stored(files, files.scan())
            self._trim_files()

    @property
    def root(self) -> Node:
        """The root of the prompts without an adapter."""
        return self.root_of(None)

    def root_of(self, adapter: str | None) -> Node:
        """The root of the prompts that an adapter computes, by its digest; None is the model as it is."""
        return self._roots.setdefault(adapter, Node((), 0, None, adapter=adapter))

    def child(self, node: Node, span: Span) -> Node | None:
        """The child of `node` with this span, its snapshot in memory; None if it is not cached."""
        found = node.children.get(span)
        if found is None:
            return None
        if found.snapshot is None:
            self._load(found)
        if found.snapshot is None:
            return None
        self._touch(found)
        if found.stored is None and self._files is not None and self._files.has_room(found.snapshot.nbytes):
            self._store(found)
        return found

    def add(self, node: Node, span: Span, slot: int) -> Node | None:
        """The child of `node` with this span; if its snapshot is not in memory, it is added from the slot.

        The slot's last row must allow a snapshot where the span ends (Row.save_at). Returns None if the snapshot does
        not fit next to those of the same prompt's earlier spans, or if `node` has been dropped.
        """
        self._apply_changes()
        if not self._in_tree(node):
            return None
        end = node.end + len(span)
        added = node.children.setdefault(span, Node(span, end, node))
        if added.snapshot is not None:
            self._touch(added)
            return added
        added.snapshot = self._runner.save(slot, node.end, end)
        if added.stored is None:
            self._store(added)
        self._count_snapshot(added)
        self._trim_files()
        return added if added.snapshot is not None else None

    def close(self) -> None:
        """Wait until all files have been written."""
        if self._files is not None:
            self._files.close()

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
                self._set_stored(removed, None)

    # Files.

    def _add_stored(self, files: PrefixFiles, found: Iterable[StoredSpan]) -> None:
        """Add a node for each stored span whose prefix is stored too; remove the other files."""
        age: dict[str, int] = {}
        for stored in sorted(found, key=lambda stored: stored.last_used):
            self._clock += 1
            age[stored.name] = self._clock
        for stored in sorted(found, key=lambda stored: stored.end):
            if not self._add_node(stored, age[stored.name]):
                if self._parent_of(stored) is not None:
                    files.report_damage("does not follow the one before it")
                files.remove(stored)

    def _add_node(self, stored: StoredSpan, last_used: int) -> bool:
        """Add a node for a stored span, or give its file to the node there is. False if its prefix is not stored."""
        parent = self._parent_of(stored)
        if parent is None or parent.end + len(stored.span) != stored.end:
            return False
        node = parent.children.setdefault(stored.span, Node(stored.span, stored.end, parent, last_used=last_used))
        self._set_stored(node, stored)
        return True

    def _parent_of(self, stored: StoredSpan) -> Node | None:
        """The node before a stored span; None if that is not stored. Before a first span it is the root of its
        adapter, whether the adapter is loaded or not."""
        if stored.parent is None or stored.end == len(stored.span):
            return self.root_of(stored.parent)
        return self._stored.get(stored.parent)

    def _apply_changes(self) -> None:
        """Take over what other processes have written to the folder and removed from it, and what could not be
        written."""
        if self._files is None:
            return
        for changes in self._files.take_changes():
            self._forget_missing(self._files, changes)
            self._add_foreign(self._files, changes)
            self._trim_files()

    def _forget_missing(self, files: PrefixFiles, changes: Changes) -> None:
        for stored in changes.missing:
            node = self._stored.get(stored.name)
            if node is None or node.stored is not stored or files.is_pending(stored.name):
                continue
            files.forget(stored)
            self._set_stored(node, None)
            if node.snapshot is None:
                self.drop(node)

    def _add_foreign(self, files: PrefixFiles, changes: Changes) -> None:
        for stored in sorted(changes.added, key=lambda stored: stored.end):
            if stored.name in files.known or files.is_pending(stored.name):
                continue
            self._clock += 1
            if self._add_node(stored, self._clock):
                files.add(stored)
            elif time() - stored.last_used > STALE_S:  # until then its previous span may still be written
                files.remove(stored)

    def _store(self, node: Node) -> None:
        """Queue a node's snapshot for writing, unless the previous span has no file."""
        assert node.snapshot is not None and node.parent is not None
        parent = node.parent
        is_root, previous = parent.parent is None, parent.stored
        if self._files is None or not self._files.accepts_writes or (previous is None and not is_root):
            return
        packed = self._runner.pack(node.snapshot)
        name = previous.name if previous is not None else parent.adapter
        self._set_stored(node, self._files.write(name, node.span, node.end, packed))

    def _load(self, node: Node) -> None:
        """Load a node's snapshot from its file. A node whose file is damaged or missing is dropped."""
        assert self._files is not None and node.stored is not None
        try:
            data = self._files.read(node.stored)
            if data is None:
                return
            node.snapshot = self._runner.unpack(node.end - len(node.span), node.end, data)
        except ValueError as error:  # Damaged, or the runner's: another length than the model's
            self._files.report_damage(error)
            self.drop(node)
            return
        except Exception as error:  # the device's memory may be full
            self._files.report_damage(f"was not used: {error}")
            return
        self._count_snapshot(node)

    def _trim_files(self) -> None:
        """Remove the least recently used files until the rest fits into files.max_bytes."""
        while self._files is not None and self._files.nbytes > self._files.max_bytes:
            stored = [node for node in self._nodes() if node.stored is not None]
            leaves = [node for node in stored if all(child.stored is None for child in node.children.values())]
            if not leaves:
                return
            node = min(leaves, key=lambda node: node.last_used)
            assert node.stored is not None
            self._files.remove(node.stored)
            self._set_stored(node, None)
            if node.snapshot is None:
                self.drop(node)

    def _set_stored(self, node: Node, stored: StoredSpan | None) -> None:
        if node.stored is not None:
            self._stored.pop(node.stored.name, None)
        node.stored = stored
        if stored is not None:
            self._stored[stored.name] = node

    # Memory.

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.last_used = self._clock

    def _count_snapshot(self, node: Node) -> None:
        """Count the snapshot of a node, new in memory, and evict others until all fit."""
        assert node.snapshot is not None
        self._touch(node)
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

    def _evictable(self) -> Iterator[Node]:
        """Nodes with a snapshot in memory whose children have none."""
        for node in self._nodes():
            if node.snapshot is not None and all(child.snapshot is None for child in node.children.values()):
                yield node

    def _in_tree(self, node: Node) -> bool:
        """Whether neither the node nor an ancestor has been dropped."""
        while node.parent is not None:
            if node.parent.children.get(node.span) is not node:
                return False
            node = node.parent
        return node is self._roots.get(node.adapter)

    def _nodes(self) -> Iterator[Node]:
        """All nodes but the roots."""
        for root in list(self._roots.values()):
            yield from _subtree(root)


def _subtree(node: Node) -> Iterator[Node]:
    """A node and all its descendants, except the root of the tree."""
    stack = [node]
    while stack:
        found = stack.pop()
        stack += found.children.values()
        if found.parent is not None:
            yield found
