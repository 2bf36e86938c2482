"""Several processes that keep their prompt caches in one folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from cached_prompts import LIMITS, answer, files_in
from mock_runner import MockRunner, eventually

from mlx_gptoss.engine import PrefixFiles, prefix_files
from mlx_gptoss.engine.prefix import PrefixCache


def test_a_process_takes_over_what_another_one_writes_and_removes(tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_files, "RESCAN_S", 0.0)
    both = [PrefixCache(1 << 20, MockRunner(LIMITS), PrefixFiles(tmp_path, "mock")) for _ in range(2)]
    spans = [tuple(range(n, n + 8)) for n in range(3)]

    def grow(cache: PrefixCache, *spans: tuple[int, ...]) -> None:
        """Add a prompt of these spans."""
        node, slot = cache.root, cache._runner.slots[0]
        slot.history = []
        for span in spans:
            slot.history += span
            assert (node := cache.add(node, span, 0)) is not None

    def flush(cache: PrefixCache) -> None:
        assert cache._files is not None
        done = threading.Event()
        eventually(lambda: not cache._files._unwritten and not cache._files._removing)
        done.wait(0.05)  # the rescan follows the last job

    first, second = both
    grow(first, spans[0], spans[1])
    flush(first)
    grow(second, spans[2])
    flush(second)
    grow(second, spans[2])
    node = second.child(second.root, spans[0])
    assert node is not None and second.child(node, spans[1]) is not None
    assert second._files.nbytes == sum(path.stat().st_size for path in files_in(tmp_path))

    second.drop(node)
    flush(second)
    grow(first, spans[1])
    flush(first)
    grow(first, spans[1])
    assert first._files.nbytes == sum(path.stat().st_size for path in files_in(tmp_path))
    for cache in both:
        cache.close()


SERVER = """
import random, sys, time
from pathlib import Path
from mock_runner import VOCAB, expected, mock_engine
from mlx_gptoss import Sampling
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.engine import PrefixFiles, Request, prefix_files

folder, number, limit, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
limits, rng = Limits(slots=2, max_context=64, chunk=8), random.Random(number)
common = [[n, *range(20)] for n in range(12)]
files = PrefixFiles(Path(folder), "mock", limit)
cached = count = 0
with mock_engine(limits, prefix_bytes=40, prefix_files=files) as (engine, _):
    print("started", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        prompt = (*rng.choice(common), *(rng.randrange(3) for _ in range(rng.randrange(20))))
        one = Request(prompt, 3, Sampling(seed=1))
        stream = engine.submit(one)
        assert [token.id for token in stream] == expected(one, limits)[0]
        cached, count = cached + stream.drain().cached_tokens, count + 1
print(cached, count, flush=True)
"""


def test_processes_on_one_folder(tmp_path):
    """Two that write, read and evict the same files, and a third that is killed again and again. The limit holds for
    all together, but for what is written between two looks at the folder."""
    limit, folder = 20_000, tmp_path / "cache"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}

    def start(number: int, seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SERVER, str(folder), str(number), str(limit), str(seconds)]
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1
        )

    servers = [start(number, 6.0) for number in range(2)]
    assert [server.stdout.readline() for server in servers] == ["started\n"] * 2
    largest = 0
    for number in range(2, 4):
        victim = start(number, 60.0)
        assert victim.stdout.readline() == "started\n"
        for _ in range(20):
            time.sleep(0.02)
            largest = max(largest, size_of(folder))
        victim.kill()
        victim.communicate()
    ended = [server.communicate(timeout=120) for server in servers]
    assert [server.returncode for server in servers] == [0, 0], ended
    assert all(int(out.split()[0]) > 500 for out, _ in ended), ended  # tokens cached
    assert largest < limit * (1 + 3 / prefix_files.RESCAN_SHARE) + 3 * prefix_files.MAX_PENDING_WRITES * 400
    assert size_of(folder) < limit * (1 + 2 / prefix_files.RESCAN_SHARE)
    answer(folder, max_bytes=limit)
    assert size_of(folder) <= limit


def size_of(folder: Path) -> int:
    """Bytes of the cache's files in a folder from which other processes remove files."""
    found = 0
    for path in folder.rglob("*.kv"):
        with contextlib.suppress(FileNotFoundError):
            found += path.stat().st_size
    return found
