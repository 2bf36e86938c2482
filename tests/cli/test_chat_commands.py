"""The commands inside chat, in a real pseudo-terminal."""

from __future__ import annotations

import base64
import json

import pytest
from chat_terminal import CTRL_D, ENTER, Terminal

SUM = "12 + 30 = 42"


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = []

    def start(*options, **settings):
        opened.append(Terminal(*options, MLX_GPTOSS_HISTORY="", **settings))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


@pytest.fixture
def chat(start):
    """After one question and its answer."""
    terminal = start(PATH="")  # without programs for the clipboard
    terminal.enter("What is 12 + 30?")
    assert SUM in terminal.see_prompts(2)
    return terminal


def run(chat, command, expected):
    """Enter a command, and wait for its answer and the next prompt."""
    prompts = chat.text().count("\n>")
    chat.enter(command)
    chat.see(expected)
    return chat.see_prompts(prompts + 1)


def test_help_lists_every_command_and_key(chat):
    text = run(chat, "/help", "Ctrl-D")
    for name in ("/retry", "/undo", "/save FILE", "/set NAME VALUE", "/tokens", "Alt-Enter", "Ctrl-R"):
        assert name in text


def test_a_wrong_command_suggests_the_right_one(chat):
    run(chat, "/retyr", "no such command: /retyr. did you mean /retry?")
    run(chat, "/xyzzy", "no such command: /xyzzy. /help lists them.")


@pytest.mark.parametrize("text", ["/usr/bin/env is a file. Hello!", "/etc is a folder. Hello!", "//help me. Hello!"])
def test_a_path_is_no_command(chat, text):
    chat.enter(text)
    chat.see_prompts(3)
    assert "no such command" not in chat.text() and "error" not in chat.text()


def test_save_load_and_undo(chat, tmp_path, start):
    run(chat, "/save talk.json", "saved in talk.json")
    assert json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]
    before = (tmp_path / "talk.json").read_bytes()
    run(chat, "/undo", "taken back: What is 12 + 30?")
    chat.enter("/save talk.json")
    chat.see("Replace it?")
    chat.type("n" + ENTER)
    chat.see_prompts(5)
    assert (tmp_path / "talk.json").read_bytes() == before
    run(chat, "/undo", "there is no question yet")
    run(chat, "/load talk.json", "1 question from talk.json")
    run(chat, "/retry", SUM)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "no conversation that /save wrote"), ('{"messages": 3}', "error:"), ("[]", "error:"), ("\x00", "error:")],
)
def test_a_damaged_file_changes_nothing(chat, tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    run(chat, "/load bad.json", message)
    run(chat, "/load missing.json", "No such file")
    run(chat, "/load", "give a file")
    run(chat, "/undo", "taken back: What is 12 + 30?")


def test_set_and_tokens(chat):
    run(chat, "/set temperature 0.5", "temperature 0.5")
    run(chat, "/set temperature=0.25", "temperature 0.25")
    run(chat, "/set temperature 3", "error: temperature")
    run(chat, "/set top_k x", "top_k takes a whole number")
    run(chat, "/set temprature 1", "did you mean temperature?")
    run(chat, "/set max-tokens 3", "max_tokens 3")
    run(chat, "/set max_tokens 0", "at least 1")
    text = run(chat, "/set", "seed default")
    assert "temperature 0.25" in text and "max_tokens 3" in text
    run(chat, "/set temperature default", "temperature 0.0")  # the bundled model's own
    assert " of 131072 tokens (0%)" in run(chat, "/tokens", "tokens (")


def test_model(chat, tmp_path):
    run(chat, "/model nowhere/at-all", "error:")
    run(chat, "/model", "nano (mxfp4, mlx)")
    run(chat, "/model nano", "nano (mxfp4, mlx)")
    run(chat, "/retry", SUM)


def test_copy_by_the_terminal_or_a_program(chat, tmp_path, start):
    run(chat, "/copy", "sent to the terminal's clipboard")
    assert b"\x1b]52;c;" + base64.b64encode(SUM.encode()) in chat.output
    program = tmp_path / "bin" / "pbcopy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nwhile read -r line || [ -n "$line" ]; do echo "$line" > {tmp_path}/copied; done\n')
    program.chmod(0o755)
    other = start(PATH=str(program.parent))
    run(other, "/copy", "there is no answer yet")
    other.enter("What is 12 + 30?")
    other.see(SUM)
    run(other, "/copy", "copied by pbcopy")
    assert (tmp_path / "copied").read_text() == SUM + "\n"


def test_edit(start, tmp_path):
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nsed -i "s/12/11/" "$1"\n')
    editor.chmod(0o755)
    chat = start(EDITOR=str(editor), VISUAL=str(editor))
    chat.enter("What is 12 + 30?")
    chat.see_prompts(2)
    run(chat, "/edit", "11 + 30 = 41")
    chat.enter("/undo")
    assert "taken back: What is 11 + 30?" in chat.see("taken back")
    run(chat, "/undo", "there is no question yet")


def test_reasoning_system_stats_reset(chat):
    run(chat, "/reasoning high", "> /reasoning high")
    run(chat, "/reasoning", "/reasoning takes low, medium, high; it is high")
    run(chat, "/system Be brief.", "> /system")
    run(chat, "/stats", "> /stats")
    run(chat, "/retry", "first token after")
    run(chat, "/reset", "> /reset")
    run(chat, "/undo", "there is no question yet")
    chat.enter("/quit")
    assert chat.end() == 0


def test_ctrl_d_after_commands(chat):
    chat.type(CTRL_D)
    assert chat.end() == 0
