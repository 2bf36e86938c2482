"""Interrupted conversions: the same command continues after the complete shards, and nothing else is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_gptoss.errors import CheckpointError, GptOssError
from mlx_gptoss.weights import checkpoint, journal
from mlx_gptoss.weights import convert as conversion
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.writer import Writer

SHARD_BYTES = 200_000


@pytest.fixture(autouse=True)
def many_shards(monkeypatch):
    monkeypatch.setattr(conversion, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture
def source(mini, tmp_path):
    shutil.copytree(mini / "mxfp4", tmp_path / "source", copy_function=shutil.copyfile)
    return tmp_path / "source"


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def neighbours(folder: Path) -> set[str]:
    """What is next to a folder, without the source."""
    return {path.name for path in folder.parent.iterdir()} - {"source"}


def stop_after(part: float, what: str = "writing"):
    """A progress callback that interrupts a phase after this part of it."""

    def progress(done, total, now):
        if now == what and done > part * total:
            raise KeyboardInterrupt

    return progress


def interrupted(source: Path, out: Path, to: str = "bf16", **options) -> dict[str, tuple[int, int]]:
    """Interrupt a conversion in the middle; returns the inode and the modification time of each shard that it kept."""
    with pytest.raises(KeyboardInterrupt, match=r"the same command continues after the \d+ complete shards? kept in"):
        convert(source, out, to, progress=stop_after(0.5), **options)
    kept = {path.name: path.stat() for path in (out.parent / ".out.partial" / "checkpoint").iterdir()}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in kept.items()}


@pytest.fixture
def wanted(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    convert(source, folder, "bf16")
    return contents(folder)


def test_the_second_run_continues_after_the_complete_shards(source, tmp_path, wanted):
    out = tmp_path / "out"
    kept = interrupted(source, out)
    assert neighbours(out) == {".out.partial"}
    assert 2 <= len(kept) < len([name for name in wanted if name.endswith(".safetensors")])
    assert all(name.endswith(".safetensors") for name in kept)
    seen = []
    report = convert(source, out, "bf16", progress=lambda done, total, what: seen.append((what, done)))
    assert contents(out) == wanted
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in kept} == kept
    assert report.resumed_bytes == sum((out / name).stat().st_size for name in kept) - header_bytes(out, kept)
    assert seen[0] > ("writing", report.resumed_bytes)
    assert seen[-1] == ("verifying", report.bytes)  # resumed shards are verified, too
    assert neighbours(out) == {"out"}


def header_bytes(folder: Path, names) -> int:
    return sum(8 + int.from_bytes((folder / name).read_bytes()[:8], "little") for name in names)


def test_a_run_can_be_interrupted_several_times(source, tmp_path, wanted):
    out, previous = tmp_path / "out", 0
    for part in (0.3, 0.6, 0.9):
        with pytest.raises(KeyboardInterrupt, match="continues"):
            convert(source, out, "bf16", progress=stop_after(part))
        shards = len(list((tmp_path / ".out.partial" / "checkpoint").iterdir()))
        assert shards > previous
        previous = shards
    with pytest.raises(KeyboardInterrupt, match="continues"):
        convert(source, out, "bf16", progress=stop_after(0.5, "verifying"))
    assert convert(source, out, "bf16").resumed_bytes == checkpoint.open(out).size_bytes
    assert contents(out) == wanted


def test_before_the_first_complete_shard_nothing_is_kept(source, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", stop)
    with pytest.raises(KeyboardInterrupt, match="nothing was kept"):
        convert(source, tmp_path / "out", "bf16")
    assert neighbours(tmp_path / "out") == set()


def test_a_full_disk_keeps_complete_shards(source, tmp_path, wanted, monkeypatch):
    real, free = os.pwrite, [1_000_000]

    def full(file, data, offset):
        free[0] -= len(data)
        if free[0] < 0:
            raise OSError(28, "No space left on device")
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(GptOssError, match=r"No space left on device\); the same command continues after the \d "):
        convert(source, tmp_path / "out", "bf16")
    monkeypatch.setattr(os, "pwrite", real)
    assert convert(source, tmp_path / "out", "bf16").resumed_bytes > SHARD_BYTES
    assert contents(tmp_path / "out") == wanted


KILLED = """
import os, signal, sys
from mlx_gptoss.weights import convert as conversion
conversion.SHARD_BYTES = int(sys.argv[3])
def progress(done, total, what):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
conversion.convert(sys.argv[1], sys.argv[2], "bf16", progress=progress)
"""


@pytest.mark.parametrize("torn_line", [b"", b'{"shard":"model-00001', b"\xff\n", b'{"shard":"x","ranges":[[1,2]]}\n'])
def test_a_killed_run_is_continued(source, tmp_path, wanted, torn_line):
    out, left = tmp_path / "out", tmp_path / ".out.partial"
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out), str(SHARD_BYTES)])
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    recorded = len((left / "journal").read_bytes().splitlines()) - 1
    assert recorded >= 2
    with (left / "journal").open("ab") as file:
        file.write(torn_line)
    (left / "checkpoint" / "config.json").write_text("half")
    assert convert(source, out, "bf16").resumed_bytes > SHARD_BYTES
    assert contents(out) == wanted
    assert neighbours(out) == {"out"}


@pytest.mark.parametrize("change", ["target", "search", "time", "config", "program", "shards"])
def test_a_different_conversion_starts_anew(source, tmp_path, monkeypatch, change):
    out = tmp_path / "out"
    first = "mlx-4bit" if change == "search" else "bf16"
    interrupted(source, out, first)
    to = "mlx-8bit" if change == "target" else first
    if change == "time":
        os.utime(source / "model-00001-of-00003.safetensors", ns=(1, 1))
    elif change == "config":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"swiglu_limit": 6.5}))
    elif change == "program":
        monkeypatch.setattr(conversion.metadata, "version", lambda name: "9.9")
    elif change == "shards":
        monkeypatch.setattr(conversion, "SHARD_BYTES", SHARD_BYTES + 8)
    assert convert(source, out, to, search="mse" if change == "search" else None).resumed_bytes == 0
    assert checkpoint.open(out).format == to
    assert neighbours(out) == {"out"}


def test_a_damaged_kept_shard_is_noticed_and_written_again(source, tmp_path, wanted):
    out = tmp_path / "out"
    kept = interrupted(source, out)
    path = tmp_path / ".out.partial" / "checkpoint" / min(kept)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(GptOssError, match=r"the disk returned other bytes than were written.*continues"):
        convert(source, out, "bf16")
    assert not out.exists() and not path.exists()
    convert(source, out, "bf16")
    assert contents(out) == wanted


@pytest.mark.parametrize("damage", ["truncated", "missing", "another header"])
def test_an_incomplete_kept_shard_is_written_again(source, tmp_path, wanted, damage):
    out = tmp_path / "out"
    kept = interrupted(source, out)
    path = tmp_path / ".out.partial" / "checkpoint" / min(kept)
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b'"U8"', b'"I8"').replace(b'"BF16"', b'"BF61"'))
    assert 0 < convert(source, out, "bf16").resumed_bytes < len(kept) * SHARD_BYTES
    assert contents(out) == wanted


def test_nothing_is_kept_of_a_source_that_cannot_be_converted(source, tmp_path):
    convert(source, tmp_path / "bf16", "bf16")
    last = max((tmp_path / "bf16").glob("*.safetensors"))
    data = bytearray(last.read_bytes())
    data[-2:] = b"\xff\x7f"
    last.write_bytes(data)
    (tmp_path / "place").mkdir()
    with pytest.raises(CheckpointError, match="NaN"):
        convert(tmp_path / "bf16", tmp_path / "place" / "out", "mlx-8bit")
    assert neighbours(tmp_path / "place" / "out") == set()


def test_a_second_process_is_refused(source, tmp_path, wanted):
    out, errors = tmp_path / "out", []

    def progress(done, total, what):
        if not errors:
            with pytest.raises(GptOssError, match=r"another process is writing .*out; wait for it") as caught:
                convert(source, out, "bf16")
            errors.append(caught)

    convert(source, out, "bf16", progress=progress)
    assert errors and contents(out) == wanted


def test_a_folder_that_only_has_the_name_is_left_alone(source, tmp_path):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "letter.txt").write_text("dear")
    with pytest.raises(GptOssError, match="is in the way and was not made by a conversion"):
        convert(source, tmp_path / "out", "bf16")
    assert [path.name for path in left.iterdir()] == ["letter.txt"]
    shutil.rmtree(left)
    (tmp_path / "elsewhere").mkdir()
    left.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GptOssError, match="is in the way"):
        convert(source, tmp_path / "out", "bf16")


def test_an_old_checkpoint_is_replaced_only_at_the_end(source, tmp_path, wanted):
    out = tmp_path / "out"
    convert(source, out, "mlx-4bit")
    before = contents(out)
    interrupted(source, out, overwrite=True)
    assert contents(out) == before
    assert convert(source, out, "bf16", overwrite=True).resumed_bytes > 0
    assert contents(out) == wanted
    assert neighbours(out) == {"out"}


def test_a_kill_between_the_two_renames_loses_nothing(source, tmp_path):
    """The old checkpoint has been moved away and the new one is not there yet: the old one comes back."""
    out = tmp_path / "out"
    convert(source, out, "mlx-4bit")
    before = contents(out)
    interrupted(source, out, overwrite=True)
    out.rename(tmp_path / ".out.partial" / "old")
    with pytest.raises(GptOssError, match="exists already"):
        convert(source, out, "bf16")
    assert contents(out) == before


def test_an_old_checkpoint_that_cannot_be_moved_back_is_kept(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(source, out, "mlx-4bit")
    before = contents(out)
    real = Path.rename

    def failing(self, target):
        if self.name in ("checkpoint", "old"):
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        convert(source, out, "bf16", overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path / ".out.partial" / "old") == before
    journal.recover(out)
    assert contents(out) == before


# A slow conversion, which stops when its journal has three lines until it has been sent a signal.
SLOW = """
import sys, time
from pathlib import Path
from mlx_gptoss.weights import convert as conversion
from mlx_gptoss.weights.writer import Writer
conversion.SHARD_BYTES, journal, signalled = int(sys.argv.pop(1)), Path(sys.argv.pop(1)), Path(sys.argv.pop(1))
write = Writer.write
def slowly(*args):
    while journal.exists() and journal.read_bytes().count(b"\\n") > 2 and not signalled.exists():
        time.sleep(0.01)
    time.sleep(0.03)
    return write(*args)
Writer.write = slowly
from mlx_gptoss_cli.main import main
main()
"""


def test_ctrl_c_on_the_command_line_says_what_was_kept(source, tmp_path, wanted):
    out, journal_file, signalled = tmp_path / "out", tmp_path / ".out.partial" / "journal", tmp_path / "signalled"
    command = [sys.executable, "-c", SLOW, str(SHARD_BYTES), str(journal_file), str(signalled)]
    command += ["convert", str(source), str(out), "--to", "bf16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (journal_file.exists() and journal_file.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    signalled.touch()
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert output == ""
    assert len(errors.splitlines()) == 1
    assert errors.startswith("interrupted; the same command continues after the ")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "of an earlier run, written to" in again.stdout
    assert contents(out) == wanted
