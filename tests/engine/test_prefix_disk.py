"""The prompt cache on a disk that fails, is full or does not answer: prompts are computed again, the engine goes on."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from cached_prompts import KNOWN, LIMITS, REQUESTS, answer, files_in
from faulty_disk import FaultyDisk
from mock_runner import eventually, mock_engine

from mlx_gptoss.engine import PrefixFiles, Request, prefix_files, span_file
from mlx_gptoss.errors import GptOssError

ERRORS = [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE]
USED = ["open", "read", "lstat", "fstat", "listdir", "mkdir", "write", "close", "replace", "unlink", "utime"]


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
