"""The test suite itself: how it ends when it is interrupted or a test hangs, and what the quick tests cover."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# A background job of a shell ignores Ctrl-C, and so does whatever it starts.
IGNORING_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *sys.argv[1:]])
"""
HANGING = """
import pathlib, threading

def test_passes():
    pass

def test_hangs():
    pathlib.Path(__file__).with_name("hangs").touch()
    threading.Event().wait()
"""


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """pytest in a process that ignores Ctrl-C, in `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.Popen(
        [sys.executable, "-c", IGNORING_CTRL_C, *options],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Ctrl-C, again if nothing happens: Python drops a KeyboardInterrupt that is raised in a garbage collector's
    callback, of which hypothesis has one. Returns what the process wrote."""
    for _ in range(6):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=50)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("Ctrl-C does not end it")


@pytest.fixture
def hanging(tmp_path: Path) -> Path:
    """A folder with this suite's conftest.py, a test that passes and one that hangs."""
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_hanging.py").write_text(HANGING)
    return tmp_path


def test_ctrl_c_ends_a_background_run_with_a_summary(hanging: Path) -> None:
    with start(hanging) as process:
        while not (hanging / "hangs").exists() and process.poll() is None:
            time.sleep(0.01)
        try:
            out, err = interrupt(process)
        finally:
            process.kill()
    assert process.returncode == pytest.ExitCode.INTERRUPTED, err
    assert "KeyboardInterrupt" in out and "1 passed" in out.splitlines()[-1]


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "xdist"])
def test_a_test_that_hangs_fails_and_shows_every_stack(hanging: Path, workers: list[str]) -> None:
    with start(hanging, *workers, "-o", "hang_s=1") as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 failed, 1 passed" in out.splitlines()[-1]
    assert "no end after 1 seconds" in out and "in test_hangs" in err


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "xdist"])
def test_tests_of_ctrl_c_pass_in_a_background_run(workers: list[str]) -> None:
    with start(TESTS.parent, *workers, "tests/engine/test_faults.py", "-k", "ctrl_c") as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "2 passed" in out.splitlines()[-1]
