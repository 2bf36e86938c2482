"""The prefix cache: how prompts are split into spans, what is kept, what is evicted first, and files."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gptoss.engine.prefix import MAX_SPAN, MIN_SPAN, PrefixCache, span_ends
from mlx_gptoss.engine.prefix_files import PrefixFiles
from mlx_gptoss.errors import GptOssError

END = 7
ENDS = frozenset({END})


@dataclass(frozen=True)
class Saved:
    start: int
    end: int
    slot: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Runner:
    """Makes snapshots of one byte per token that remember their slot."""

    def save(self, slot, start, end):
        return Saved(start, end, slot)

    def pack(self, saved):
        return bytes([saved.slot]) * saved.nbytes

    def unpack(self, start, end, data):
        assert len(data) == end - start
        return Saved(start, end, data[0])


def spans(*names: int) -> list[tuple[int, ...]]:
    return [(name,) * 10 for name in names]


def grow(cache, *names, slot=0):
    """Add a branch of ten tokens a node. Returns the last node or None."""
    node = cache.root
    for span in spans(*names):
        node = node and cache.add(node, span, slot)
    return node


def cached(cache, *names) -> int:
    """How many of the spans the cache has, counted from the first one to the first one missing."""
    node, count = cache.root, 0
    for span in spans(*names):
        node = cache.child(node, span)
        if node is None:
            break
        count += 1
    return count


@given(st.lists(st.integers(0, END), max_size=900), st.lists(st.integers(0, END), max_size=300))
def test_a_common_prefix_is_split_alike(common, rest):
    """And every span but the last has MIN_SPAN to MAX_SPAN tokens."""
    both = [span_ends(prompt, ENDS, MAX_SPAN) for prompt in (common, [*common, *rest])]
    assert [end for end in both[0] if end < len(common)] == [end for end in both[1] if end < len(common)]
    for prompt, found in zip((common, [*common, *rest]), both, strict=True):
        assert found[-1:] == ((len(prompt),) if prompt else ())
        sizes = [b - a for a, b in zip((0, *found), found, strict=False)]
        assert all(MIN_SPAN <= size <= MAX_SPAN for size in sizes[:-1])
        assert sum(sizes) == len(prompt)


def test_spans_end_with_messages():
    prompt = [1] * 99 + [END] + [1] * 30 + [END] + [1] * 600 + [END] + [1] * 3
    assert span_ends(prompt, ENDS, MAX_SPAN) == (100, 356, 612, 732, 735)
    assert span_ends(prompt, frozenset(), 512) == (512, 735)


def test_branches_share_their_prefix():
    cache = PrefixCache(1000, Runner())
    first = grow(cache, 1, 2, 3, slot=1)
    second = grow(cache, 1, 2, 4, slot=2)
    assert [node.snapshot.slot for node in first.path] == [1, 1, 1]
    assert [node.snapshot.slot for node in second.path] == [1, 1, 2]
    assert cache.nbytes == 40
    assert cached(cache, 1, 2, 3) == 3 and cached(cache, 1, 9) == 1 and cached(cache, 9) == 0


def test_the_least_recently_used_are_evicted_first_and_leaves_before_their_parents():
    cache = PrefixCache(60, Runner())
    grow(cache, 1, 2, 3)
    grow(cache, 4, 5)
    assert cached(cache, 1, 2) == 2  # used again, without the last node
    grow(cache, 6, 7)
    assert cache.nbytes == 60
    assert cached(cache, 1, 2, 3) == 2 and cached(cache, 4, 5) == 2 and cached(cache, 6, 7) == 2
    grow(cache, 6, 7, 8)
    assert cached(cache, 1, 2) == 1


def test_a_prompt_larger_than_the_cache_keeps_its_first_chunks():
    cache = PrefixCache(30, Runner())
    grow(cache, 9)
    assert grow(cache, 1, 2, 3, 4, 5) is None
    assert cached(cache, 1, 2, 3, 4, 5) == 3 and cache.nbytes == 30


def test_nothing_is_added_to_a_dropped_branch():
    cache = PrefixCache(1000, Runner())
    node = grow(cache, 1, 2)
    cache.drop(node.parent)
    assert cache.nbytes == 0 and cache.add(node, (3,), 0) is None and cached(cache, 1) == 0


@pytest.mark.parametrize("seed", range(5))
def test_bytes_are_counted(seed, tmp_path):
    """During random additions, uses and drops, with and without files."""
    rng = random.Random(seed)
    files = PrefixFiles(tmp_path, "model", max_bytes=8000) if seed % 2 else None
    cache = PrefixCache(200, Runner(), files)
    for _ in range(300):
        branch = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
        if rng.random() < 0.1 and (node := grow(cache, *branch)):
            cache.drop(node)
        elif rng.random() < 0.5:
            grow(cache, *branch)
        else:
            cached(cache, *branch)
        held = [cache.root]
        for node in held:
            held += node.children.values()
        assert cache.nbytes == sum(node.snapshot.nbytes for node in held if node.snapshot) <= 200
        if files:
            assert files.nbytes == sum(node.stored.nbytes for node in held if node.stored) <= 8000
    cache.close()
    if files:
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.kv")) == files.nbytes


def test_files_outlast_the_process(tmp_path):
    cache = PrefixCache(1000, Runner(), PrefixFiles(tmp_path, "model"))
    grow(cache, 1, 2, 3, slot=5)
    cache.close()
    again = PrefixCache(1000, Runner(), PrefixFiles(tmp_path, "model"))
    assert again.nbytes == 0 and cached(again, 1, 2, 3) == 3
    assert [node.snapshot.slot for node in grow(again, 1, 2, 3).path] == [5, 5, 5]
    assert cached(PrefixCache(1000, Runner(), PrefixFiles(tmp_path, "another model")), 1) == 0


def test_an_evicted_snapshot_is_read_from_its_file(tmp_path):
    cache = PrefixCache(30, Runner(), PrefixFiles(tmp_path, "model"))
    grow(cache, 1, 2, 3, slot=4)
    grow(cache, 5, 6, slot=6)
    assert cache.nbytes == 30 and cached(cache, 1, 2, 3) == 3 and cached(cache, 5, 6) == 2
    cache.close()


@pytest.mark.parametrize(
    "damage", ["truncated", "changed", "empty", "deleted", "no json", "other tokens", "longer", "deep"]
)
def test_a_damaged_file_is_a_cache_miss(tmp_path, damage):
    cache = PrefixCache(1000, Runner(), PrefixFiles(tmp_path, "model"))
    grow(cache, 1, 2, 3, slot=4)
    cache.close()
    path = next(p for p in tmp_path.rglob("*.kv") if b'"span": [2,' in p.read_bytes())
    data = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(data[:-1])
        case "changed":
            path.write_bytes(data[:-1] + b"!")
        case "empty":
            path.write_bytes(b"")
        case "deleted":
            path.unlink()
        case "no json":
            path.write_bytes(b"\xff" * 100)
        case "other tokens":
            path.write_bytes(data.replace(b"[2,", b"[3,", 1))
        case "longer":
            path.write_bytes(data + b"x")
        case "deep":
            path.write_bytes(b"[" * 60000)
    again = PrefixCache(1000, Runner(), PrefixFiles(tmp_path, "model"))
    assert cached(again, 1, 2, 3) == 1
    assert grow(again, 1, 2, 3, slot=9) is not None  # and is written again
    again.close()
    third = PrefixCache(1000, Runner(), PrefixFiles(tmp_path, "model"))
    assert cached(third, 1, 2, 3) == 3


def test_a_full_disk_ends_only_the_writing(tmp_path, monkeypatch, caplog):
    cache = PrefixCache(1000, Runner(), PrefixFiles(tmp_path, "model"))
    grow(cache, 1)
    cache.close()
    files = PrefixFiles(tmp_path, "model")
    cache = PrefixCache(1000, Runner(), files)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    grow(cache, 2)
    cache.close()
    assert "not written to disk for 60 seconds: No space left" in caplog.text
    assert grow(cache, 3, 4) is not None and cached(cache, 3, 4) == 2
    assert len(list(tmp_path.rglob("*.kv"))) == 1 and not list(tmp_path.rglob("*.part"))


def test_a_folder_that_is_not_writable_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GptOssError, match="choose another folder"):
        PrefixFiles(tmp_path / "file", "model")
