"""chat in a real pseudo-terminal: keys, pastes, sizes and colours."""

from __future__ import annotations

import json
import statistics
import time

import pytest
from chat_terminal import ALT_ENTER, CTRL_C, CTRL_D, CTRL_J, CTRL_R, ENTER, TAB, UP, Terminal, pasted

SUM = "12 + 30 = 42"


@pytest.fixture
def history(tmp_path):
    return tmp_path / "state" / "history"


@pytest.fixture
def start(history):
    """start(*options, columns=80, **environment): chat with a history of its own, closed at the end."""
    opened = []

    def start(*options, **settings):
        opened.append(Terminal(*options, **{"MLX_GPTOSS_HISTORY": str(history), **settings}))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_a_paste_of_several_lines_is_one_message(start):
    chat = start()
    chat.type(pasted("What is\n12 + 30?"))
    assert SUM not in chat.see("12 + 30?")
    chat.type(ENTER)
    text = chat.see_prompts(2)
    assert SUM in text and text.count("\n>") == 2


@pytest.mark.parametrize("keys", [ALT_ENTER, CTRL_J], ids=["alt-enter", "ctrl-j"])
def test_a_new_line(start, keys):
    chat = start()
    chat.type(f"What is{keys}12 + 30?")
    chat.see("\n. 12 + 30?")
    chat.type(ENTER)
    assert SUM in chat.see_prompts(2)


def test_three_quotes(start):
    chat = start()
    chat.type('"""' + ENTER + "What is 12 + 30?" + ENTER)
    assert SUM not in chat.see("\n. What is 12 + 30?")
    chat.type('"""' + ENTER)
    assert SUM in chat.see_prompts(2)


def test_ctrl_c_clears_the_line_and_twice_leaves(start):
    chat = start()
    chat.type("What is 12 + 30?")
    chat.see("12 + 30?")
    chat.type(CTRL_C)
    chat.see("Ctrl-C once more")
    chat.enter("What is 12 + 30?")  # and after a question the count begins again
    chat.see_prompts(3)
    chat.type(CTRL_C)
    chat.see(lambda text: text.count("Ctrl-C once more") == 2)
    chat.type(CTRL_C)
    assert chat.end() == 0


def test_ctrl_d_leaves(start):
    chat = start()
    chat.type(CTRL_D)
    assert chat.end() == 0


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(start, tmp_path):
    chat = start("--max-tokens", "100000")
    chat.type(pasted("word " * 12_000 + "What is 12 + 30?"))  # seconds of reading
    chat.see("12 + 30?")
    chat.type(ENTER)
    time.sleep(0.5)
    chat.type(CTRL_C)
    chat.see(lambda text: text.splitlines()[-1].strip() == ">")
    chat.enter("/tokens")
    chat.see(" of 131072 tokens")
    chat.enter("/undo")
    assert "taken back: word word" in chat.see("taken back")
    assert "Traceback" not in chat.text()


def test_history_goes_on_in_the_next_session(start, history):
    chat = start()
    chat.enter("What is 12 + 30?")
    chat.see_prompts(2)
    chat.enter("/tokens")
    chat.see_prompts(3)
    chat.type(CTRL_D)
    assert chat.end() == 0
    assert history.stat().st_mode & 0o777 == 0o600
    again = start()
    again.type(UP)
    again.see("> /tokens")
    again.type(UP)
    again.see("> What is 12 + 30?")
    again.type(CTRL_C)
    again.see_prompts(2)
    again.type(CTRL_R)
    again.see("(reverse-i-search)")
    again.type("12 +")
    again.see("`12 +': What is 12 + 30?")
    again.type(ENTER)  # takes what was found
    again.see(lambda text: "reverse-i-search" not in text)
    again.type(ENTER)
    again.see(SUM)


def test_a_long_history_is_shortened(start, history):
    history.parent.mkdir(parents=True)
    history.write_text("".join(f"\n# 2026-01-01 00:00:00\n+question {i} {'x' * 1000}\n" for i in range(1500)))
    chat = start()
    chat.type(UP)
    chat.see("> question 1499")
    assert history.stat().st_size < 1 << 20


def test_a_history_that_cannot_be_written(start, tmp_path):
    (tmp_path / "file").write_text("")
    chat = start(MLX_GPTOSS_HISTORY=str(tmp_path / "file" / "history"))
    assert "no history across sessions" in chat.text()


def test_completion(start, tmp_path):
    (tmp_path / "a-long-name.json").write_text("{}")
    chat = start()
    chat.type("/rea" + TAB)
    chat.see("> /reasoning")
    chat.type(" h" + TAB)
    chat.see("> /reasoning high")
    chat.type(CTRL_C)
    chat.see_prompts(2)
    chat.type("/set temp" + TAB)
    chat.see("> /set temperature")
    chat.type(CTRL_C)
    chat.see_prompts(3)
    chat.type("/model na" + TAB)
    chat.see("> /model nano")
    chat.type(CTRL_C)
    chat.see_prompts(4)
    chat.type(f"/load {tmp_path}/a-l" + TAB)
    chat.see(lambda text: "a-long-name.json" in text.replace("\n", ""))


def test_a_narrow_terminal_and_one_that_changes_its_size(start):
    chat = start(columns=40)
    chat.enter("What is 12 + 30?")
    chat.see_prompts(2)
    assert SUM in chat.text() and max(map(len, chat.text().splitlines())) <= 40
    chat.type("What is 20 + 30?" + ENTER)
    chat.resize(100)
    chat.see("20 + 30 = 50")
    chat.resize(30)
    chat.enter("What is 11 + 30?")
    chat.see("11 + 30 = 41")
    assert "Traceback" not in chat.text()


def test_markdown_is_drawn_again_and_plain_is_not(start):
    """The bundled model writes no Markdown (test_markdown.py has some), so both show the same text."""
    chat, plain = start(), start("--plain")
    for terminal in (chat, plain):
        terminal.enter("What is 12 + 30?")
        assert SUM in terminal.see_prompts(2)
    erased = b"\r\x1b[2K"  # before the open block is drawn again, and before a bar
    assert chat.output.count(erased) > plain.output.count(erased)


def test_an_echo_takes_less_than_20_ms(start):
    """From a key to its echo on the terminal, at the median of 60."""
    chat = start()
    chat.see_prompts(1)
    took = []
    for key in "abcdefghijklmnopqrstuvwxyz0123456789" * 2:
        begun = time.perf_counter()
        chat.type(key)
        chat.process.expect_exact(key, timeout=10)
        took.append(time.perf_counter() - begun)
    print(f"echo of a key: p50 {1e3 * statistics.median(took):.1f} ms, longest {1e3 * max(took):.1f} ms")
    assert statistics.median(took) < 0.02


def test_reasoning_is_dimmed_and_can_be_hidden(start):
    hidden = start()
    hidden.enter("What is 12 + 30?")
    assert "column by column" not in hidden.see_prompts(2)


def test_the_answer_of_a_pipe_is_its_text_alone(tmp_path):
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "mlx_gptoss_cli", "chat", "-m", "nano", "-t", "0"],
        input="What is 12 + 30?\n/save talk.json\nWhat is 20 + 30?\n", text=True, capture_output=True, cwd=tmp_path,
        timeout=300,
    )  # fmt: skip
    assert done.stdout == "12 + 30 = 42\n20 + 30 = 50\n"
    assert "\x1b" not in done.stdout + done.stderr
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["content"] for m in saved["messages"] if m["role"] == "user"] == ["What is 12 + 30?"]
