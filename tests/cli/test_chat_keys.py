"""The keys of `chat`: lines, pastes, history and completion, in a real pseudo-terminal."""

from __future__ import annotations

import json
import stat

from chat_terminal import CTRL_C, CTRL_D, CTRL_J, CTRL_R, ENTER, ESCAPE, PACED, TAB, UP


def asked(terminal, tmp_path) -> list[str]:
    """The questions so far, as /save writes them."""
    file = tmp_path / "asked.json"
    file.unlink(missing_ok=True)
    assert "messages written" in terminal.ask(f"/save {file.name}")
    return [each["content"] for each in json.loads(file.read_text()).get("messages", []) if each["role"] == "user"]


def test_a_paste_is_one_message(chat, tmp_path):
    terminal = chat()
    terminal.prompt()
    terminal.paste("Reverse the words:\r\n\n/quit\nlast line\n")
    terminal.wait("... last line")
    terminal.send(" and mine", ENTER)
    terminal.wait(lambda: terminal.screen.cursor.x == 2)
    terminal.prompt()
    assert asked(terminal, tmp_path) == ["Reverse the words:\n\n/quit\nlast line\n and mine"]


def test_lines_of_one_message(chat, tmp_path):
    terminal = chat()
    terminal.prompt()
    terminal.send("a", CTRL_J, "b", ESCAPE + ENTER, "c")
    terminal.wait("... c")
    terminal.send(ENTER)
    terminal.prompt()
    terminal.send('"""', ENTER, "/quit", ENTER, ENTER, "end")
    terminal.wait("... end")
    terminal.send('"""', ENTER)
    terminal.prompt()
    assert asked(terminal, tmp_path) == ["a\nb\nc", "/quit\n\nend"]


def test_ctrl_c_cancels_a_line_and_twice_leaves(chat, tmp_path):
    terminal = chat()
    terminal.prompt()
    for _ in range(2):  # what is typed between the two means that they are not in a row
        before = terminal.text.count("again leaves")
        terminal.send("not this")
        terminal.wait(lambda: terminal.line == "> not this")
        terminal.send(CTRL_C)
        terminal.wait(lambda before=before: terminal.text.count("again leaves") > before)
        terminal.prompt()
    assert asked(terminal, tmp_path) == []
    terminal.send(CTRL_C)
    terminal.wait(lambda: terminal.text.count("again leaves") == 3)
    terminal.prompt()
    terminal.send(CTRL_C)
    assert terminal.end() == 130


def test_ctrl_d_leaves(chat):
    terminal = chat()
    terminal.prompt()
    terminal.send("text", CTRL_D)  # as in a shell, it leaves only an empty line
    terminal.wait("> text")
    terminal.send(CTRL_C)
    terminal.wait("again leaves")
    terminal.prompt()
    terminal.send(CTRL_D)
    assert terminal.end() == 0


def test_keys_that_are_typed_early_go_into_the_next_line(chat, tmp_path):
    gate = tmp_path / "gate"
    terminal = chat(program=PACED, GATE=str(gate))
    terminal.prompt()
    terminal.send("What can you do?", ENTER)
    terminal.wait("999,")
    terminal.send("What is 12 + 30?", ENTER)
    terminal.paste("two\rlines")
    gate.touch()
    terminal.wait("12 + 30 = 42")
    terminal.wait("... lines")
    assert terminal.text.count("What is 12 + 30?") == terminal.text.count("two") == 1  # not amid the answer


def test_history_across_sessions(chat, tmp_path):
    first = chat()
    first.ask("/system the first session")
    first.paste("two\nlines")
    first.wait("... lines")
    first.send(ENTER)
    first.prompt()
    first.send("/quit", ENTER)
    assert first.end() == 0
    assert stat.S_IMODE((tmp_path / "history").stat().st_mode) == 0o600
    second = chat()
    second.prompt()
    second.send(UP)
    second.wait("> /quit")
    second.send(UP)
    second.wait("... lines")
    second.send(CTRL_C)
    second.wait("again leaves")
    second.prompt()
    second.send(CTRL_R, "first")
    second.wait("> /system the first session")
    second.send(ENTER)  # takes it, the next one enters it
    second.wait(lambda: second.line.startswith("> /system"))
    second.send(ENTER)
    second.wait("instructions set")


def test_history_elsewhere_and_nowhere(chat, tmp_path):
    chat(MLX_GPTOSS_HISTORY=None, XDG_STATE_HOME=str(tmp_path / "state"), HOME=str(tmp_path)).ask("/stats")
    (kept,) = tmp_path.rglob("chat_history")
    assert "+/stats" in kept.read_text() and stat.S_IMODE(kept.stat().st_mode) == 0o600
    nowhere = chat(MLX_GPTOSS_HISTORY="", HOME=str(tmp_path))
    nowhere.ask("/stats")
    nowhere.send(UP)
    nowhere.wait("> /stats")
    (tmp_path / "file").touch()
    broken = chat(MLX_GPTOSS_HISTORY=str(tmp_path / "file" / "history"))
    assert "no history" in broken.wait("MLX_GPTOSS_HISTORY")
    assert "stats on" in broken.ask("/stats")


def test_a_long_history_loses_its_older_half(chat, tmp_path):
    history = tmp_path / "history"
    history.write_text("".join(f"\n# 2030-01-01\n+{number} {'x' * 1000}\n" for number in range(1200)))
    terminal = chat(columns=200)
    terminal.prompt()
    assert 400_000 < history.stat().st_size < 600_000 and stat.S_IMODE(history.stat().st_mode) == 0o600
    terminal.send(UP)
    terminal.wait("1199 x")
    terminal.send(CTRL_C)
    terminal.wait("again leaves")
    terminal.prompt()
    size = history.stat().st_size
    terminal.paste("y" * 60_000)  # too long to be kept
    terminal.send(CTRL_C)
    terminal.wait(lambda: terminal.text.count("again leaves") == 2)
    assert history.stat().st_size == size


def test_completion(chat, tmp_path):
    (tmp_path / "some notes.json").touch()
    terminal = chat()
    for typed, completed in (
        ("/tok", "> /tokens"),
        ("/reasoning me", "> /reasoning medium"),
        ("/set pres", "> /set presence_penalty"),
        ("/set seed d", "> /set seed default"),
        ("/model nan", "> /model nano"),
        ("/load so", "> /load some notes.json"),
        ("compare ./so", "> compare ./some notes.json"),
        ("/usr/bin/printen", "> /usr/bin/printenv"),
    ):
        terminal.prompt()
        terminal.send(typed)
        terminal.wait(lambda typed=typed: terminal.line == f"> {typed}")
        terminal.send(TAB)
        terminal.wait(lambda completed=completed: terminal.line == completed)
        terminal.send(CTRL_C)
        terminal.wait(lambda: terminal.line.startswith("> ") is False or terminal.screen.cursor.x == 2)
    terminal.prompt()
    terminal.send("/re")
    assert "how much to think" in terminal.wait("start a new conversation")  # the commands, while a name is typed


def test_a_narrow_terminal(chat, tmp_path):
    terminal = chat(columns=40, rows=10)
    terminal.prompt()
    question = "Please write a poem in French about the sea"
    terminal.send(question)
    terminal.wait("e sea")
    terminal.send(ENTER)
    terminal.wait("very small model")
    assert "Ctrl-R" in terminal.ask("/help")
    assert asked(terminal, tmp_path) == [question]
