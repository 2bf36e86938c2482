"""generate: where the prompt comes from, and what stderr shows while it is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pyte
import pytest
from mlx_gptoss_cli.options import fill_in

CLI = [sys.executable, "-m", "mlx_gptoss_cli"]
GREEDY = ("--temperature", "0", "--hide-reasoning")
ANSWER = "12 + 30 = 42\n"


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "question.txt"
    path.write_text("12 + 30?\n")
    return path


def run(*words, **streams) -> subprocess.CompletedProcess[str]:
    streams = {"stdin": subprocess.DEVNULL, **streams} if "input" not in streams else streams
    return subprocess.run([*CLI, "generate", *map(str, words)], capture_output=True, text=True, timeout=300, **streams)


def prompt_tokens(done: subprocess.CompletedProcess[str]) -> int:
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["usage"]["prompt_tokens"])


def test_a_file_and_a_pipe_are_appended_to_the_question(file):
    joined = prompt_tokens(run("What is\n\n12 + 30?\n", "--max-tokens", 1, "--json"))
    with file.open() as stream:
        assert prompt_tokens(run("What is", "--max-tokens", 1, "--json", stdin=stream)) == joined
    assert prompt_tokens(run("What is", "--max-tokens", 1, "--json", input="12 + 30?\n")) == joined
    alone = prompt_tokens(run("What is", "--max-tokens", 1, "--json"))
    assert alone < joined
    assert prompt_tokens(run("What is", "--max-tokens", 1, "--json", input=" \n")) == alone
    assert run("-", *GREEDY, input="What is 12 + 30?").stdout == ANSWER
    assert run(*GREEDY, input="What is 12 + 30?").stdout == ANSWER


def test_an_open_pipe_is_waited_for_and_said_so():
    words = [*CLI, "generate", "What is", *GREEDY]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline().startswith("waiting for the end of stdin")
    out, _ = process.communicate("12 + 30?", timeout=300)
    assert process.returncode == 0 and out


def test_a_terminal_is_not_read():
    child = pexpect.spawn(CLI[0], [*CLI[1:], "generate", "What is 12 + 30?", *GREEDY], timeout=120, encoding="utf-8")
    child.expect("12 \\+ 30 = 42")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_closed_stdin():
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *CLI, "generate", "What is 12 + 30?", *GREEDY], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ANSWER), done.stderr


def test_variables_fill_the_prompt_and_the_instructions(tmp_path):
    assert run("What is {a} + {b}?", "--var", "a=12", "--var", "b=30", *GREEDY).stdout == ANSWER
    assert run("--var", "a=12", *GREEDY, input="What is {a} + 30?").stdout == ANSWER
    system = tmp_path / "system.txt"
    system.write_text("You are {who}.")
    by_file = run("Hi", "--system-file", system, "--var", "who=brief", "--max-tokens", 1, "--json")
    assert prompt_tokens(by_file) == prompt_tokens(run("Hi", "-s", "You are brief.", "--max-tokens", 1, "--json"))
    wrong = {
        ("Hi", "--var", "a=1"): "{a}",
        ("Hi", "--var", "a"): "NAME=VALUE",
        ("Hi", "-s", "x", "--system-file", str(system)): "not both",
    }
    for words, message in wrong.items():
        done = run(*words)
        assert done.returncode == 2 and message in done.stderr


def test_filling_in():
    texts = fill_in(["a={b}", "b=2"], "{a} {b} {c} {} {{a}}", "x", None)
    assert texts == ["{b} 2 {c} {} {{b}}", "x", None]
    assert fill_in([], "{a}") == ["{a}"]
    assert fill_in(["a=1=2\n"], "{a}") == ["1=2\n"]


def test_stop_is_repeatable():
    done = run("What is 12 + 30?", "-t", "0", "--stop", " 42", "--stop", "never", "--json")
    report = json.loads(done.stdout)
    assert (report["text"], report["finish_reason"]) == ("12 + 30 =", "stop")


def test_rounds_calls_and_results_apart(tmp_path):
    (tmp_path / "weather.py").write_text(
        'def get_weather(location: str) -> dict:\n    """Get the current weather."""\n'
        '    return {"temperature": 18, "condition": "sunny"}\n'
    )
    done = run("What is the weather in Paris?", "--tool", tmp_path / "weather.py", "-t", "0", "--json")
    report = json.loads(done.stdout)
    first, second = report["rounds"]
    (call,) = first["tool_calls"]
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"location": "Paris"})
    assert json.loads(call["result"]) == {"temperature": 18, "condition": "sunny"}
    assert (first["text"], second["tool_calls"]) == ("", [])
    assert second["text"] == report["text"] == "It is 18 degrees and sunny in Paris."
    assert first["reasoning"] and second["reasoning"] == report["reasoning"]
    assert "rounds" not in json.loads(run("Hi", "--max-tokens", 1, "--json").stdout)


def screens(*words: str, rows: int = 10, columns: int = 80, **environment: str) -> list[list[str]]:
    """The screens that a terminal shows, one after the other, while a command runs."""
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    child = pexpect.spawn(
        CLI[0], [*CLI[1:], "generate", *words], dimensions=(rows, columns), timeout=240,
        env={**os.environ, "TERM": "xterm-256color", "NO_COLOR": "", **environment},
    )  # fmt: skip
    seen = []
    until = time.monotonic() + 240
    while time.monotonic() < until:
        try:
            stream.feed(child.read_nonblocking(4096, timeout=240))
        except pexpect.EOF:
            break
        seen.append([line.rstrip() for line in screen.display])
    child.close()
    assert child.exitstatus == 0, seen[-1]
    return seen


def test_a_long_prompt_has_a_bar_that_goes_away(monkeypatch):
    """Here it appears at once, since a fast machine reads the prompt within the usual two seconds."""
    code = "import mlx_gptoss_cli.progress as p, mlx_gptoss_cli.main as m; p.PREFILL_AFTER_S = 0; m.main()"
    monkeypatch.setitem(globals(), "CLI", [sys.executable, "-c", code])
    seen = screens("word " * 1500, "-t", "0", "--max-tokens", "2", "--max-context", "8192", "--device", "cpu")
    bars = [line for screen in seen for line in screen if line.startswith("Reading the prompt, tokens")]
    assert bars and "/7" in bars[-1] and not any("Reading" in line for line in seen[-1])


def test_verbose_shows_the_speed_on_the_bottom_line_while_it_streams(monkeypatch, mini):
    """Here with every token, since a fast machine is done before the next look at the clock."""
    code = "import mlx_gptoss_cli.progress as p, mlx_gptoss_cli.main as m; p.REFRESH_S = 0; m.main()"
    monkeypatch.setitem(globals(), "CLI", [sys.executable, "-c", code])
    words = ("Count.", "--raw", "-t", "0", "-m", str(mini / "mxfp4"), "-v")
    seen = screens(*words, "--max-context", "1024")
    speeds = [screen[-1] for screen in seen if "tok/s" in screen[-1] and screen[-1].split()[1].startswith("tokens")]
    assert speeds, seen[-1]
    assert all(line.split()[0].isdigit() for line in speeds)
    assert any("generated (" in " ".join(seen[-1][row : row + 2]) for row in range(9))
    plain = screens("What is 12 + 30?", *GREEDY, "-v", TERM="dumb")
    assert "12 + 30 = 42" in plain[-1] and not any("\x1b" in line for line in plain[-1])
