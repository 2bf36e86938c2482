"""The prefix cache's files under faults: errors of every system call, files that are no files, and other processes.

In every case the prompt is computed again: the tokens are those without a cache, the engine answers and closes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_disk import FaultyDisk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mock_runner import VOCAB, MockRunner, eventually, expected, mock_engine

import mlx_gptoss
from mlx_gptoss import Sampling
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.engine import PrefixFiles, Request, prefix_files, span_file
from mlx_gptoss.engine.prefix import PrefixCache
from mlx_gptoss.errors import GptOssError

LIMITS = Limits(slots=2, max_context=64, chunk=8)
MEMORY = 50  # bytes: four of the mock's snapshots, so that most are read from files
FORKS = random.Random(1)
COMMON = [FORKS.randrange(VOCAB) for _ in range(20)]
REQUESTS = [
    Request((*COMMON, *(FORKS.randrange(VOCAB) for _ in range(20))), 4, Sampling(seed=seed)) for seed in range(6)
]
KNOWN = REQUESTS[:3]  # those with files in `filled`
ERRORS = [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE]
USED = ["open", "read", "lstat", "fstat", "listdir", "mkdir", "write", "close", "replace", "unlink", "utime"]


def answer(
    folder: Path,
    requests: list[Request] = KNOWN,
    max_bytes: int = 1 << 20,
    started: Callable[[], object] = lambda: None,
) -> int:
    """Run requests through an engine that keeps its cache in a folder. Returns how many prompt tokens were cached.

    started: called once the engine has started. Asserts the tokens, and that the engine closes without an error.
    """
    files = PrefixFiles(folder, "mock", max_bytes)
    cached = 0
    with mock_engine(LIMITS, prefix_bytes=MEMORY, prefix_files=files) as (engine, _):
        started()
        for one in requests:
            stream = engine.submit(one)
            assert [token.id for token in stream] == expected(one, LIMITS)[0]
            cached += stream.drain().cached_tokens
        assert engine.status.running == 0
        closing = time.monotonic()
    assert time.monotonic() - closing < 20
    return cached


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read on a busy machine may take long."""
    monkeypatch.setattr(prefix_files, "READ_TIMEOUT_S", 60.0)


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kv"))


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder with the files of KNOWN."""
    assert 0 < answer(tmp_path) < answer(tmp_path)
    assert len(files_in(tmp_path)) > 6
    return tmp_path


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", USED)
@pytest.mark.parametrize("when", ["always", "while running", "once"])
def test_a_system_call_that_fails(filled, monkeypatch, caplog, call, error, when):
    """On a folder with files, with prompts in it and new ones, and a limit that some must be removed for. The next
    process finds the cache in order."""
    disk = FaultyDisk(filled, monkeypatch)
    monkeypatch.setattr(prefix_files, "RESCAN_S", 0.0)
    limit = sum(path.stat().st_size for path in files_in(filled))

    def fail():
        if call == "mkdir":
            for folder in filled.iterdir():
                shutil.rmtree(folder)
        disk.fail(call, error, 1 if when == "once" else 1 << 30)

    if when == "always":
        fail()
    refused = when == "always" and call in ("open", "mkdir") and error == errno.EACCES
    if refused:  # the user chose a folder that may not be used
        with pytest.raises(GptOssError, match="choose another folder"):
            answer(filled)
    else:
        answer(filled, KNOWN + REQUESTS * 2, limit, started=fail)
        assert disk.raised and len(caplog.records) == (1 if call != "utime" else 0)
    disk.mend()
    answer(filled)
    assert answer(filled) > 0


@pytest.mark.parametrize("bytes_at_once", [1, 100])
def test_short_reads_and_writes_are_continued(filled, monkeypatch, caplog, bytes_at_once):
    full = answer(filled, REQUESTS)
    disk = FaultyDisk(filled, monkeypatch)
    disk.short = bytes_at_once
    assert answer(filled, REQUESTS) == answer(filled, REQUESTS) > full
    shutil.rmtree(filled)
    assert 0 < answer(filled) < answer(filled) and not caplog.records


def make_folder(path: Path, outside: Path) -> None:
    path.mkdir()


def make_full_folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "file").touch()


def make_fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        where = os.getcwd()
        os.chdir(path.parent)  # a socket's path has at most 107 bytes
        bound.bind(path.name)
        os.chdir(where)


def make_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def make_dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside.parent / "nothing")


def make_link_to_itself(path: Path, outside: Path) -> None:
    path.symlink_to(path.name)


def make_link_to_a_device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def make_device(path: Path, outside: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # zeros without an end
    except PermissionError:
        pytest.skip("a device needs root")


OTHERS = [
    make_folder,
    make_full_folder,
    make_fifo,
    make_socket,
    make_link,
    make_dangling_link,
    make_link_to_itself,
    make_link_to_a_device,
    make_device,
]


@pytest.mark.parametrize("running", [False, True], ids=["before the start", "while running"])
@pytest.mark.parametrize("make", OTHERS, ids=lambda make: make.__name__)
def test_something_else_under_the_name_of_a_file(filled, monkeypatch, caplog, tmp_path_factory, make, running):
    """Every cache file is replaced by it. A link is not followed: the true file it leads to is neither read nor
    removed."""
    monkeypatch.setattr(prefix_files, "RESCAN_S", 0.0)
    outside = tmp_path_factory.mktemp("outside")
    files = files_in(filled)

    def replace() -> None:
        for path in files:
            path.rename(outside / path.name)
            make(path, outside / path.name)

    if running:
        answer(filled, started=replace)
    else:
        replace()
        assert answer(filled, KNOWN[:1]) == 0
    assert len(caplog.records) == 1
    assert len(files_in(outside)) == len(files)
    prefix_files.PrefixFiles(filled, "mock").close()
    answer(filled, REQUESTS * 2)
    assert answer(filled, REQUESTS) > 0


def craft(path: Path, data: bytes | None = None, **changes: object) -> None:
    """Rewrite a file with another snapshot, whose size and digest the header gives, and other fields."""
    header, _, old = path.read_bytes().partition(b"\n")
    data = old if data is None else data
    digest = hashlib.sha256(data).hexdigest()
    fields = {**json.loads(header), "bytes": len(data), "sha256": digest, **changes}
    path.write_bytes(json.dumps(fields).encode() + b"\n" + data)


@pytest.mark.parametrize("running", [False, True], ids=["before the start", "while running"])
@pytest.mark.parametrize("size", [0, 1, 40, 45, 4096, 1 << 16])
def test_another_length_under_a_valid_digest(filled, caplog, size, running):
    def damage() -> None:
        for path in files_in(filled):
            craft(path, bytes(size))

    if running:
        answer(filled, started=damage)
    else:
        damage()
        assert answer(filled, KNOWN[:1]) == 0
    assert len(caplog.records) == 1 and "computed again" in caplog.text
    answer(filled)
    assert answer(filled) > 0


HEADERS = [
    {"end": 10**400},
    {"end": -1},
    {"end": 2**63},
    {"end": 1.5},
    {"end": True},
    {"end": None},
    {"bytes": 10**400},
    {"bytes": -1},
    {"bytes": "12"},
    {"bytes": None},
    {"span": []},
    {"span": [10**400]},
    {"span": [1.5, 2]},
    {"span": ["1"]},
    {"span": [[1]]},
    {"span": {"1": 2}},
    {"span": 7},
    {"span": list(range(1000))},
    {"parent": 7},
    {"parent": ["a"]},
    {"parent": {"a": 1}},
    {"parent": "\ud800"},
    {"parent": "../../escape"},
    {"sha256": None},
    {"sha256": 7},
    {"sha256": ""},
]
LINES = [
    b"",
    b"\n",
    b"{}\n",
    b"[]\n",
    b"7\n",
    b"null\n",
    b"\xff\xfe\n",
    b"[" * 8000 + b"\n",
    b"{" * 100_000 + b"\n",
    b'{"end": 1e999, "bytes": 1e999, "span": [1e999], "parent": null, "sha256": ""}\n',
    b'{"end": NaN, "bytes": NaN, "span": [NaN], "parent": null, "sha256": ""}\n',
    b'{"end": ' + b"9" * 7000 + b', "bytes": 1, "span": [1], "parent": null, "sha256": ""}\n',
    b'{"end": -Infinity, "bytes": 0, "span": [1], "parent": null}\n',
    b'{"span": [' + b"1," * 50_000 + b"1]}\n",
    b"\0" * 4096,
]


@pytest.mark.parametrize("running", [False, True], ids=["before the start", "while running"])
@pytest.mark.parametrize("header", [*HEADERS, *LINES], ids=lambda header: repr(header)[:40])
def test_malformed_headers(filled, caplog, header, running):
    """Of every file, under its name and its size where the header fits into it."""

    def damage() -> None:
        for path in files_in(filled):
            if isinstance(header, dict):
                craft(path, **header)
            else:
                path.write_bytes(header + path.read_bytes().partition(b"\n")[2])

    if running:
        answer(filled, started=damage)
    else:
        damage()
        assert answer(filled, KNOWN[:1]) == 0
    assert len(caplog.records) == 1
    answer(filled)
    assert answer(filled) > 0


def corrupt(folder: Path, what: str, which: int, at: float, value: int) -> None:
    """Damage one file, or two."""
    files = files_in(folder)
    path, other = files[which % len(files)], files[(which * 7 + value) % len(files)]
    data = path.read_bytes()
    place = int(at * (len(data) - 1)) if data else 0
    match what:
        case "flip" if data:
            path.write_bytes(data[:place] + bytes([data[place] ^ (value or 1)]) + data[place + 1 :])
        case "truncate":
            path.write_bytes(data[:place])
        case "extend":
            path.write_bytes(data + bytes([value]) * (place + 1))
        case "insert":
            path.write_bytes(data[:place] + bytes([value]) + data[place:])
        case "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
        case "swap snapshots":
            mine, _, snapshot = data.partition(b"\n")
            theirs, _, others = other.read_bytes().partition(b"\n")
            path.write_bytes(mine + b"\n" + others)
            other.write_bytes(theirs + b"\n" + snapshot)
        case "remove":
            path.unlink()
            other.unlink(missing_ok=True)


KINDS = ["flip", "truncate", "extend", "insert", "swap", "swap snapshots", "remove"]
DAMAGE = st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.floats(0, 1), st.integers(0, 255))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(DAMAGE, min_size=1, max_size=12), st.booleans(), st.randoms(use_true_random=False))
def test_random_damage_changes_no_token(tmp_path_factory, damage, running, order):
    folder = tmp_path_factory.mktemp("cache")
    answer(folder)

    def do_damage() -> None:
        for one in damage:
            if files_in(folder):
                corrupt(folder, *one)

    if not running:
        do_damage()
    requests = KNOWN + REQUESTS
    order.shuffle(requests)
    answer(folder, requests, started=do_damage if running else lambda: None)
    answer(folder)
    assert answer(folder) > 0
    shutil.rmtree(folder)


@pytest.mark.parametrize("with_parent", [False, True])
def test_a_folder_removed_while_running_is_made_again(tmp_path, caplog, with_parent):
    folder = tmp_path / "cache"
    answer(folder)
    remove = folder if with_parent else next(folder.iterdir())
    answer(folder, KNOWN * 2, started=lambda: shutil.rmtree(remove))
    assert len(caplog.records) == 1 and "has been removed" in caplog.text
    assert answer(folder) > 0


def test_a_folder_that_cannot_be_made_again(tmp_path, caplog):
    """A file is in its place."""
    folder = tmp_path / "cache"
    answer(folder)

    def replace() -> None:
        shutil.rmtree(folder)
        folder.touch()

    answer(folder, KNOWN * 2, started=replace)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("shift", [-1e9, -4000, 4000, 1e9])
def test_a_clock_that_is_set_to_another_time(filled, monkeypatch, caplog, shift):
    """Files are then of the future, or very old."""
    real = time.time
    monkeypatch.setattr(prefix_files, "RESCAN_S", 0.0)
    limit = sum(path.stat().st_size for path in files_in(filled))
    for module in ("mlx_gptoss.engine.prefix", "mlx_gptoss.engine.prefix_files"):
        monkeypatch.setattr(f"{module}.time", lambda: real() + shift)
    for n, path in enumerate(files_in(filled)):
        os.utime(path, (n * 1e8, n * 1e8) if n % 2 else (2**33, 2**33))
    assert answer(filled, REQUESTS * 2, limit) > 0
    assert answer(filled, REQUESTS[-1:], limit) > 0
    assert sum(path.stat().st_size for path in files_in(filled)) <= limit and not caplog.records


def test_a_disk_that_does_not_answer(tmp_path, monkeypatch, caplog):
    """Writing waits; the engine and close() do not."""
    go_on = threading.Event()
    monkeypatch.setattr(prefix_files, "CLOSE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(span_file, "write", lambda folder, stored, data: go_on.wait(60))
    many = [Request((n, *one.prompt), 4, one.sampling) for n in range(20) for one in KNOWN]  # with 240 snapshots
    answer(tmp_path, many)
    assert not go_on.is_set() and "has not answered" in caplog.text
    go_on.set()
    eventually(lambda: not any(thread.name == "mlx-gptoss prompt cache" for thread in threading.enumerate()))


def test_a_disk_that_does_not_answer_a_read(filled, monkeypatch, caplog):
    """One read is waited for; those after it are misses at once, until the disk answers again."""
    monkeypatch.setattr(prefix_files, "READ_TIMEOUT_S", 0.2)
    go_on, reads, real = threading.Event(), [], span_file.read_snapshot

    def wait(folder: Path, stored: span_file.StoredSpan) -> bytes:
        reads.append(stored)
        go_on.wait(60)
        return real(folder, stored)

    monkeypatch.setattr(span_file, "read_snapshot", wait)
    answer(filled, KNOWN * 2)
    assert len(reads) == 1 and len(caplog.records) == 1 and "has not answered" in caplog.text
    go_on.set()
    monkeypatch.setattr(prefix_files, "READ_TIMEOUT_S", 60.0)
    assert answer(filled) > 0


def test_a_process_without_another_thread(tmp_path, monkeypatch, caplog):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    answer(tmp_path, KNOWN * 2, started=lambda: monkeypatch.setattr(prefix_files.Thread, "start", refuse))
    assert len(caplog.records) == 1 and not files_in(tmp_path)


def test_writing_goes_on_after_a_full_disk(tmp_path, monkeypatch, caplog):
    """What could not be written then is written when it is used again."""
    monkeypatch.setattr(prefix_files, "PAUSE_S", 0.05)
    disk = FaultyDisk(tmp_path, monkeypatch)
    files = PrefixFiles(tmp_path, "mock")
    with mock_engine(LIMITS, prefix_bytes=1 << 20, prefix_files=files) as (engine, _):
        disk.fail("write", errno.ENOSPC)
        engine.submit(KNOWN[0]).drain()
        eventually(lambda: disk.raised > 0 and not files._unwritten)
        disk.mend()
        time.sleep(0.1)
        engine.submit(KNOWN[1]).drain()
        assert engine.submit(KNOWN[0]).drain().cached_tokens == 32
    assert not list(tmp_path.rglob("*.part")) and "No space left" in caplog.text
    assert answer(tmp_path, KNOWN[:1]) == 32


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


PROMPT = tuple(random.Random(5).choices(range(300), k=600))
REAL_FAULTS = [("read", errno.EIO), ("write", errno.ENOSPC)]
REAL_FAULTS += [
    pytest.param(*fault, marks=pytest.mark.slow) for fault in [("open", errno.EMFILE), ("listdir", errno.ESTALE)]
]


@pytest.fixture(scope="module")
def model_cache(tmp_path_factory):
    """A folder with two chunks of PROMPT by the bundled model, and the tokens that follow it."""
    folder = tmp_path_factory.mktemp("model")
    cached, tokens = ask_model(folder)
    assert cached == 0 and ask_model(folder) == (512, tokens)
    return folder, tokens


def ask_model(folder: Path, started: Callable[[], object] = lambda: None) -> tuple[int, list[int]]:
    """Load the bundled model with a prompt cache. Returns how much of PROMPT was cached, and the tokens after it."""
    options = {"device": "cpu", "max_context": 1024, "prefix_cache": 1 << 26, "prompt_cache": folder}
    with mlx_gptoss.load(None, **options) as model:
        started()
        *_, finished = model.stream_raw(PROMPT, sampling=Sampling(temperature=0), max_tokens=12)
        return finished.usage.cached_tokens, [token.id for token in finished.tokens]


@pytest.mark.parametrize(("call", "error"), REAL_FAULTS)
def test_the_bundled_model_with_a_failing_disk(model_cache, tmp_path, monkeypatch, call, error):
    folder, tokens = tmp_path / "cache", model_cache[1]
    shutil.copytree(model_cache[0], folder)
    disk = FaultyDisk(folder, monkeypatch)
    if call in ("write", "listdir"):  # from the start: nothing is found, or everything is written
        if call == "write":
            shutil.rmtree(folder)
        disk.fail(call, error)
        assert ask_model(folder) == (0, tokens)
    else:
        assert ask_model(folder, started=lambda: disk.fail(call, error)) == (0, tokens)
    assert disk.raised
    disk.mend()
    ask_model(folder)
    assert ask_model(folder) == (512, tokens)


@pytest.mark.parametrize(
    "what", ["longer", "swapped", *(pytest.param(what, marks=pytest.mark.slow) for what in ("shorter", "flipped"))]
)
def test_the_bundled_model_with_damaged_files(model_cache, tmp_path, caplog, what):
    folder, tokens = tmp_path / "cache", model_cache[1]
    shutil.copytree(model_cache[0], folder)
    first, second = files_in(folder)

    def damage() -> None:
        for path in (first, second):
            data = path.read_bytes().partition(b"\n")[2]
            if what in ("longer", "shorter"):
                craft(path, data + bytes(64) if what == "longer" else data[:-64])
            elif what == "flipped":
                path.write_bytes(path.read_bytes()[:-1] + b"\xaa")
        if what == "swapped":
            corrupt(folder, "swap", 0, 0, 1)

    assert ask_model(folder, started=damage) == (0, tokens)
    assert len(caplog.records) == 1
    assert ask_model(folder) == (512, tokens)
