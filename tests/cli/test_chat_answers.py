"""Answers of `chat` on a terminal: Markdown while it streams, Ctrl-C, resizing, no escape codes, and a pipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from chat_terminal import CTRL_C, ENTER, PACED

CLI = [sys.executable, "-m", "mlx_gptoss_cli", "chat", "--model", "nano", "--temperature", "0"]
ANSWER = """\
# The heading

Some **bold** text, `code`, and a [link](https://example.com).

1. first
2. second

3. third
   - nested

```python
for i in range(40):
    print(i)
```

| name | number |
|------|-------:|
| one  |      1 |
| two  |     22 |

The last paragraph, which says that it is the last one.
"""
RENDERED = """\
Some bold text, code, and a link (https://example.com).

 1 first
 2 second
 3 third
    • nested

 for i in range(40):
     print(i)

 name  number
 ────────────
 one        1
 two       22

The last paragraph, which says that it is the last one.
>"""


@pytest.fixture
def scripted(chat, tmp_path):
    """A chat whose model answers with this text."""

    def start(text, *words, **options):
        (tmp_path / "answer.md").write_text(text)
        return chat(*words, program=PACED, ANSWER=str(tmp_path / "answer.md"), **options)

    return start


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("rows", [40, 6])
def test_markdown_is_rendered(scripted, rows):
    terminal = scripted(ANSWER, rows=rows)
    terminal.prompt()
    terminal.send("Hi", ENTER)
    terminal.wait(lambda: "last one." in terminal.text and terminal.line == ">")
    heading, _, rest = terminal.text.partition("The heading\n\n")
    assert heading.splitlines()[-1].isspace() and rest == RENDERED
    assert b"\x1b[1mbold\x1b[0m" in terminal.bytes


def test_a_long_prompt_has_a_bar_and_can_be_stopped(chat):
    """Here it appears at once, since a fast machine reads the prompt within the usual two seconds."""
    code = "import mlx_gptoss_cli.progress as p, mlx_gptoss_cli.main as m; p.PREFILL_AFTER_S = 0; m.main()"
    words = ("--max-tokens", "2", "--max-context", "8192", "--device", "cpu")
    terminal = chat(*words, program=(sys.executable, "-c", code))
    terminal.prompt()
    terminal.paste("word " * 1500)
    terminal.wait("word word")
    terminal.send(ENTER)
    terminal.wait("Reading the prompt, tokens")
    terminal.send(CTRL_C)
    terminal.wait("stopped before the answer began")
    terminal.prompt()
    assert "Reading" not in terminal.text and "0 messages" in terminal.ask("/save kept.json")


def test_plain_prints_it_as_it_is(scripted):
    terminal = scripted(ANSWER, "--plain")
    terminal.prompt()
    terminal.send("Hi", ENTER)
    terminal.wait(lambda: "last one." in terminal.text and terminal.line == ">")
    assert ANSWER in terminal.text + "\n" and "\x1b[1m" not in terminal.bytes.decode()


def test_a_block_higher_than_the_screen_is_neither_cut_nor_repeated(scripted):
    lines = [f"value_{number} = {number}" for number in range(60)]
    terminal = scripted("```python\n" + "\n".join(lines) + "\n```\n", rows=8)
    terminal.prompt()
    terminal.send("Hi", ENTER)
    terminal.wait(lambda: lines[-1] in terminal.text and terminal.line == ">")
    assert re.findall(r"value_\d+ = \d+", terminal.text) == lines


def test_the_model_writes_no_escape_codes(scripted):
    terminal = scripted("before \x1b]0;title\x07\x1b[2Jafter \x9b31m end")
    terminal.prompt()
    terminal.send("Hi", ENTER)
    terminal.wait(lambda: " end" in terminal.text and terminal.line == ">")
    assert "before ]0;title[2Jafter 31m end" in terminal.text
    assert b"\x1b[2J" not in terminal.bytes and b"\x1b]0" not in terminal.bytes


@pytest.mark.parametrize("columns", [40, 100])
def test_resizing_while_an_answer_streams(scripted, tmp_path, columns):
    gate, text = tmp_path / "gate", " ".join(f"word{number}" for number in range(60))
    terminal = scripted(f"First paragraph.\n\n{text}\n", GATE=str(gate), PIECES="30")
    terminal.prompt()
    terminal.send("Hi", ENTER)
    terminal.wait("word8")
    terminal.resize(24, columns)
    gate.touch()
    terminal.wait(lambda: "word59" in terminal.text and terminal.line == ">")
    assert "First paragraph." in terminal.text and text in one_line(terminal.text)
    new = terminal.text.splitlines()[-4:-1]
    assert columns - 8 < max(map(len, new)) <= columns


@pytest.mark.parametrize("words", [(), ("--plain",)])
def test_ctrl_c_stops_an_answer_and_keeps_the_text_so_far(chat, tmp_path, words):
    terminal = chat(*words, program=PACED, GATE=str(tmp_path / "never"))
    terminal.prompt()
    terminal.send("What can you do?", ENTER)
    terminal.wait("I can add numbers up to 999,")
    terminal.send(CTRL_C)
    terminal.wait("stopped")
    assert "messages written" in terminal.ask("/save kept.json")
    question, answer = json.loads((tmp_path / "kept.json").read_text())["messages"]
    assert question["content"] == "What can you do?" and answer["content"].startswith("I can add numbers")
    assert answer["channel"] == "final" and answer["content"]
    terminal.send(CTRL_C)  # one at the prompt does not leave: that one was for the answer
    terminal.wait("again leaves")
    assert "nano" in terminal.ask("/model")


def test_ctrl_c_before_the_answer_begins(chat, tmp_path):
    (tmp_path / "weather.py").write_text(
        "import time\n\ndef get_weather(location: str) -> str:\n"
        '    """Get the current weather."""\n    print("waiting", flush=True)\n    time.sleep(600)\n'
    )
    terminal = chat("--tool", "weather.py")
    terminal.prompt()
    terminal.send("What is the weather in Paris?", ENTER)
    terminal.wait("waiting")
    terminal.send(CTRL_C)
    terminal.wait("/retry asks again")
    assert "0 messages written" in terminal.ask("/save kept.json")
    terminal.send("/retry", ENTER)
    terminal.wait(lambda: terminal.text.count("waiting") == 2)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_no_escape_codes(scripted, tmp_path, environment):
    terminal = scripted(ANSWER, **environment)
    terminal.prompt()
    terminal.send('"""\n', "/quit\n", 'second"""\n')
    terminal.wait(lambda: "last one." in terminal.text and terminal.line == ">")
    assert ANSWER.replace("\n\n", "\n") in terminal.text.replace("\n\n", "\n") + "\n"
    terminal.send("/save kept.json\n")
    terminal.wait("messages written")
    assert json.loads((tmp_path / "kept.json").read_text())["messages"][0]["content"] == "/quit\nsecond"
    terminal.send("/copy\n")
    terminal.wait("the terminal takes no escape codes")
    terminal.send(CTRL_C)
    terminal.wait("again leaves")
    terminal.send(CTRL_C)
    assert terminal.end() == 130 and b"\x1b" not in terminal.bytes


def test_a_pipe_has_one_message_a_line_and_gets_only_answers():
    lines = "What is 12 + 30?\n\n//help\n/usr/bin/env is a file, explain it\n/hepl\n/edit\n/retry\n"
    done = subprocess.run(CLI, input=lines, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    assert done.stdout.startswith("12 + 30 = 42\n") and len(done.stdout.splitlines()) == 4
    assert "no such command: /hepl. did you mean /help?" in done.stderr and "/edit needs a terminal" in done.stderr
    assert "/help lists commands" not in done.stderr and ">" not in done.stdout


def test_bytes_that_are_not_utf8():
    done = subprocess.run(CLI, input=b"caf\xe9 \xff\n", capture_output=True, timeout=300, env={"LC_ALL": "C"})
    assert b"Traceback" not in done.stderr
