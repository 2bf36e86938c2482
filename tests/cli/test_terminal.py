"""Standard streams that are closed or whose reader has gone, and terminals that take no escape codes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

CLI = [sys.executable, "-m", "mlx_gptoss_cli"]
SMALL = ["--max-context", "256"]
BENCH = ["bench", "--synthetic", "tiny", "--layers", "1", "--prompt", "16", "--generate", "2", "--repeat", "1"]
BODY = {"max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}


@pytest.fixture
def commands(tmp_path: Path, mini: Path) -> dict[str, list[str]]:
    """A short run of each command that ends by itself."""
    requests, text = tmp_path / "requests.jsonl", tmp_path / "text.txt"
    requests.write_text(json.dumps(REQUEST) + "\n")
    text.write_text("What is 12 + 30? " * 20)
    return {
        "help": ["--help"],
        "version": ["--version"],
        "generate": ["generate", "Hi", "--temperature", "0", "--stats", *SMALL],
        "chat": ["chat", "--temperature", "0", *SMALL],
        "convert": ["convert", str(mini / "mxfp4"), str(tmp_path / "out"), "--to", "mlx-4bit"],
        "batch": ["batch", str(requests), str(tmp_path / "answers.jsonl"), *SMALL],
        "show": ["show"],
        "bench": BENCH,
        "eval": ["eval", "--text", str(text), "--max-tokens", "64"],
    }


NAMES = ["help", "version", "generate", "chat", "convert", "batch", "show", "bench", "eval"]


def shell(words: Sequence[str], redirect: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in sh with redirections, such as `<&-`."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *CLI, *words], input=stdin, capture_output=True, text=True, timeout=600
    )


def expect_clean(done: subprocess.CompletedProcess[str], code: int) -> None:
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    for word in ("Traceback", "Exception ignored", "BrokenPipe", "Bad file descriptor"):
        assert word not in done.stderr, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_closed_streams(commands: dict[str, list[str]], name: str) -> None:
    """Closed input is empty, and closed output is lost; the exit code is that of the work."""
    expect_clean(shell(commands[name], "<&- >&- 2>&-"), 0)


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-"])
def test_one_closed_stream(commands: dict[str, list[str]], redirect: str) -> None:
    expect_clean(shell(commands["generate"], redirect), 0)
    expect_clean(shell(["show"], redirect), 0)


def test_a_prompt_from_closed_stdin_is_an_empty_one() -> None:
    for words in (["generate"], ["generate", "-"]):
        done = shell(words, "<&-")
        expect_clean(done, 2)
        assert "the prompt is empty" in done.stderr
    expect_clean(shell(["show", "/nowhere"], "<&- >&-"), 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_that_has_gone(commands: dict[str, list[str]], name: str) -> None:
    """As a program that SIGPIPE ended: 141, and nothing on stderr about it."""
    read, write = os.pipe()
    os.close(read)
    words, question = commands[name], "Hi\n" if name == "chat" else ""
    done = subprocess.run([*CLI, *words], input=question, stdout=write, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(write)
    done.stdout = ""
    assert "rror" not in done.stderr
    expect_clean(done, 141)


def on_terminal(words: Sequence[str], stdin: bytes = b"", **environment: str) -> tuple[int, bytes]:
    """Run a command with a pseudo-terminal for all three streams. Returns its exit code and what it wrote there."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [*CLI, *words], {**os.environ, "TERM": "xterm-256color", **environment})
    got = bytearray()
    os.write(terminal, stdin)
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # how Linux says that the other side has closed it
            break
        if not piece:
            break
        got += piece
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), bytes(got)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_no_escape_codes(commands: dict[str, list[str]], name: str, environment: dict[str, str]) -> None:
    code, got = on_terminal(commands[name], b"Hi\n/quit\n" if name == "chat" else b"", **environment)
    assert code == 0 and b"\x1b" not in got and b"Traceback" not in got, got


@pytest.mark.parametrize("name", ["generate", "show"])
def test_a_terminal_gets_them_otherwise(commands: dict[str, list[str]], name: str) -> None:
    code, got = on_terminal(commands[name], NO_COLOR="")
    assert code == 0 and b"\x1b" in got


def test_warnings_and_errors_without_escape_codes() -> None:
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        for words in (["show", "/nowhere"], ["generate"], ["nonsense"], ["serve", "--host", "0.0.0.0"]):
            code, got = on_terminal(words, **environment)
            assert code in (1, 2) and b"\x1b" not in got and b"Traceback" not in got, got
