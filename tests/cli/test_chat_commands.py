"""The commands of `chat`, and what is a command."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys

import pytest
from chat_terminal import ENTER
from mlx_gptoss_cli import chat as chat_module
from mlx_gptoss_cli.chat import Session
from mlx_gptoss_cli.chat_commands import COMMANDS, OTHER_NAMES, SETTINGS, find_command, values_after
from mlx_gptoss_cli.chat_files import MAX_FILE_BYTES, copy, read_conversation, write_conversation
from mlx_gptoss_cli.chat_input import is_open, message_of, split_command, without_quotes

import mlx_gptoss
from mlx_gptoss import Conversation, Message, Sampling
from mlx_gptoss.errors import DoesNotFit, InvalidRequest


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("/help", ("help", "")),
        ("/reasoning   low ", ("reasoning", "low")),
        ("/system one\ntwo", ("system", "one\ntwo")),
        ("/nonsense", ("nonsense", "")),
        ("/", ("", "")),
        ("/usr/bin/env is a file, explain it", None),
        ("/no/such/file", None),
        ("/tmp, what is it?", None),
        ("//help", None),
        ("hello /help", None),
        ("", None),
    ],
)
def test_what_is_a_command(line, command):
    assert split_command(line, COMMANDS) == command


def test_messages_that_begin_with_a_slash_or_quotation_marks():
    assert message_of("//help me") == "/help me" and message_of("/usr/bin/env") == "/usr/bin/env"
    assert is_open('"""') and is_open('"""a') and is_open('"""\na"') and not is_open('"""a"""') and not is_open('a"""')
    assert without_quotes(' """\n  a\n b\n""" ') == "a\n b" and without_quotes('"""/quit"""') == "//quit"


def test_wrong_names_suggest_the_right_one():
    for wrong, right in (
        ("hlep", "help"),
        ("tokns", "tokens"),
        ("reser", "reset"),
        ("quti", "quit"),
        ("reas", "reasoning"),
    ):
        with pytest.raises(InvalidRequest, match=f"did you mean /{right}"):
            find_command(wrong)
    with pytest.raises(InvalidRequest, match="/help lists them"):
        find_command("xyzzy")
    assert all(find_command(other) is COMMANDS[name] for other, name in OTHER_NAMES.items())
    assert find_command("new") is COMMANDS["reset"]


def test_values():
    assert list(values_after("/reasoning ")) == ["low", "medium", "high"] and values_after("/save x") is None
    assert {"temperature", "top_p", "max_tokens", "stop", "seed"} <= set(values_after("/set "))
    assert list(values_after("/set temperature ")) == ["default"] and "nano" in values_after("/model ")
    assert {"top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"} <= set(SETTINGS)


def test_settings(chat):
    terminal = chat("--max-tokens", "100")
    everything = terminal.ask("/set")
    assert "temperature = 0.0" in everything and "max_tokens = 100" in everything and "stop = none" in everything
    for command, said in (
        ("/set top-p 0.5", "top_p = 0.5"),
        ("/set --top-k 3", "top_k = 3"),
        ("/set top_p", "top_p = 0.5"),
        ("/set top_p default", "top_p = 1.0"),
        ("/set stop 'the end' END", "stop = 'the end' END"),
        ("/set stop 'open", 'stop cannot be "\'open"'),
        ("/set temperature 9", "error: temperature must be a number in [0, 2]"),
        ("/set temperature nan", "error: temperature must be"),
        ("/set seed x", "error: seed cannot be 'x'"),
        ("/set max_tokens 0", "error: max_tokens must be"),
        ("/set temprature 1", "did you mean temperature?"),
        ("/set temp 1", "did you mean temperature?"),
        ("/set max-tokens 1", "max_tokens = 1"),
    ):
        assert said in terminal.ask(command)
    assert "temperature = 0.0" in terminal.ask("/set temperature")
    assert len(terminal.ask("Hi").split()) <= 1


def test_the_turns_of_a_conversation(chat, tmp_path):
    terminal = chat("--stats", "--hide-reasoning")
    for command in ("/undo", "/retry"):
        assert "there is no question yet" in terminal.ask(command)
    assert "there is no answer yet" in terminal.ask("/copy")
    assert "12 + 30 = 42\n" in terminal.ask("What is 12 + 30?")
    before = terminal.ask("/tokens")
    assert "1 + 2 = 3\n" in terminal.ask("What is 1 + 2?") and terminal.ask("/tokens") != before
    assert "1 + 2 = 3\n" in terminal.ask("/retry")
    assert "dropped: What is 1 + 2?" in terminal.ask("/undo") and terminal.ask("/tokens") == before
    terminal.ask("/new")
    assert "there is no question yet" in terminal.ask("/undo") and terminal.ask("/tokens") != before
    assert "stats off" in terminal.ask("/stats") and "first token" not in terminal.ask("What is 1 + 2?")
    assert "reasoning: low" in terminal.ask("/reasoning low") and "reasoning: low" in terminal.ask("/reasoning")
    assert "low, medium or high, not 'lots'" in terminal.ask("/reasoning lots")
    assert "instructions set" in terminal.ask("/system Be brief.") and "no instructions" in terminal.ask("/system")
    terminal.send("/quit", ENTER)
    assert terminal.end() == 0


def test_help_has_every_command(chat):
    shown = chat(columns=120).ask("/help")
    assert all(f"/{name}" in shown and command.help in shown for name, command in COMMANDS.items())
    assert "Alt-Enter" in shown and "Ctrl-R" in shown


def test_saving_and_loading(chat, tmp_path):
    terminal = chat("--reasoning", "high", "-s", "Be brief.")
    terminal.ask("What is 12 + 30?")
    assert "2 messages written to kept.json" in terminal.ask("/save kept.json")
    kept = (tmp_path / "kept.json").read_text()
    saved = Conversation.from_dict(json.loads(kept))
    assert (saved.reasoning, saved.instructions, saved.messages[1].content) == ("high", "Be brief.", "12 + 30 = 42")
    assert stat.S_IMODE((tmp_path / "kept.json").stat().st_mode) == 0o600
    terminal.ask("/undo")
    for answer, messages in (("n", 2), ("", 2), ("y", 0)):
        terminal.send("/save kept.json", ENTER)
        terminal.wait(lambda: terminal.line.endswith("Replace it? [y/N]:"))
        terminal.send(answer, ENTER)
        terminal.prompt()
        data = json.loads((tmp_path / "kept.json").read_text())
        assert len(data.get("messages", [])) == messages
    (tmp_path / "kept.json").write_text(kept)
    other = chat()
    assert "2 messages read from kept.json" in other.ask("/load kept.json")
    assert "reasoning: high" in other.ask("/reasoning") and "12 + 30 = 42" in other.ask("/retry")
    for command, error in (
        ("/load nowhere.json", "nowhere.json cannot be read: No such file"),
        ("/load .", ". is not a file"),
        ("/load", "give a file's name"),
        ("/save", "give a file's name"),
        ("/save no/such/folder.json", "cannot be written: No such file"),
        ("/save ~nobody-here/x", "error: "),
    ):
        assert error in other.ask(command)
    assert "dropped: What is 12 + 30?" in other.ask("/undo")  # nothing of that changed the conversation


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "damaged"),
        (b'{"version": 1, "messages": [', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[" * 200_000, "damaged"),
        (b"[]", "holds no saved conversation"),
        (b'{"version": 99}', "version 99"),
        (b'{"version": 1, "messages": [{"role": "king", "content": ""}]}', "holds no saved conversation"),
        (b" " * (MAX_FILE_BYTES + 1), "longer than 64 MB"),
    ],
    ids=["empty", "cut", "not UTF-8", "nested", "list", "version", "role", "long"],
)
def test_damaged_files(tmp_path, data, error):
    file = tmp_path / "damaged.json"
    file.write_bytes(data)
    with pytest.raises(InvalidRequest, match=error):
        read_conversation(file)


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to(file)
    conversation = Conversation().append("caf\u00e9 \ud800", Message("assistant", "yes", channel="final"))
    write_conversation(conversation, link)
    assert link.is_symlink() and read_conversation(file).messages[0].content == "café ?"
    before = file.read_text()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InvalidRequest, match="No space left"):
        write_conversation(Conversation(), file)
    assert file.read_text() == before and sorted(os.listdir(tmp_path)) == ["a.json", "link.json"]


def test_loading_leaves_out_functions_that_nobody_runs(tmp_path, weather_tool):
    file = tmp_path / "a.json"
    asked = mlx_gptoss.Conversation(functions=(mlx_gptoss.Function("get_weather"),), builtin_tools=("python",))
    write_conversation(asked.append("Hi"), file)
    assert read_conversation(file) == Conversation().append("Hi")


def editor(tmp_path, script: str) -> str:
    file = tmp_path / "editor"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


def test_edit(chat, tmp_path):
    terminal = chat(EDITOR=editor(tmp_path, 'sed -i.bak "s/30/31/" "$1"'))
    assert "12 + 30 = 42" in terminal.ask("What is 12 + 30?")
    assert "12 + 31 = 43" in terminal.ask("/edit")
    assert "2 messages written" in terminal.ask("/save kept.json")  # it took the place of the question
    assert "/edit new an empty one" in terminal.ask("/edit x")
    (tmp_path / "editor").write_text('#!/bin/sh\necho "What is 2 + 2?" > "$1"\n')
    assert "2 + 2 = 4" in terminal.ask("/edit new")
    (tmp_path / "editor").write_text("#!/bin/sh\nexit 3\n")
    assert "error: " in terminal.ask("/edit")
    (tmp_path / "editor").write_text("#!/bin/sh\n:\n")
    assert "nothing sent" in terminal.ask("/edit")
    assert "dropped: What is 2 + 2?" in terminal.ask("/undo")


def test_copy(chat, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    terminal = chat(PATH=str(programs))
    terminal.ask("What is 12 + 30?")
    assert "handed to the terminal (OSC 52)" in terminal.ask("/copy")
    assert b"\x1b]52;c;" + base64.b64encode(b"12 + 30 = 42") + b"\x07" in terminal.bytes
    xclip = programs / "xclip"
    xclip.write_text(f'#!/bin/sh\n[ "$*" = "-selection clipboard" ] && /bin/cat > {tmp_path}/clip\n')
    xclip.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert copy("größer\n") == "7 characters copied by xclip" and (tmp_path / "clip").read_text() == "größer\n"
    xclip.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(InvalidRequest, match="no clipboard"):
        copy("x")


def test_another_model(chat, mini):
    terminal = chat()
    terminal.ask("What is 12 + 30?")
    tokens = terminal.ask("/tokens")
    assert "nano (mxfp4, mlx)" in terminal.ask("/model")
    assert "error: " in terminal.ask("/model /nowhere/at/all") and terminal.ask("/tokens") == tokens
    said = terminal.ask(f"/model {mini / 'mlx-4bit'}")
    assert "(mlx-4bit, mlx)" in said.replace("\n", "")
    assert "nano (mxfp4, mlx)" in terminal.ask("/model nano") and terminal.ask("/tokens") == tokens
    assert "12 + 30 = 42" in terminal.ask("/retry")


def test_a_model_that_does_not_fit_beside_the_present_one(monkeypatch, tmp_path):
    opened, wanted = [], []

    def load(model, **options):
        wanted.append(model)
        if any(one.failure is None and not one_is_closed(one) for one in opened) or model == "too-big":
            raise DoesNotFit(f"{model} does not fit")
        opened.append(mlx_gptoss.load(None, **options))
        return opened[-1]

    def one_is_closed(model):
        try:
            return model.status is None
        except mlx_gptoss.GptOssError:
            return True

    monkeypatch.setattr(chat_module, "load", load)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    given = {"model": "first", "max_context": 256}
    session = Session(load(**given), given, Conversation(), {}, (), True, False, False)
    session.change_model("second")
    assert wanted == ["first", "second", "second"] and session.given["model"] == "second"
    with pytest.raises(DoesNotFit, match="too-big"):
        session.change_model("too-big")
    assert wanted[3:] == ["too-big", "too-big", "second"] and session.model is opened[-1]
    assert session.model.generate("What is 12 + 30?", sampling=Sampling(temperature=0)).text == "12 + 30 = 42"
    session.close()
    assert all(map(one_is_closed, opened))


def test_save_does_not_replace_a_file_from_a_pipe(tmp_path):
    (tmp_path / "kept.json").write_text("mine")
    words = [sys.executable, "-m", "mlx_gptoss_cli", "chat", "--model", "nano", "-t", "0"]
    lines = "Hi\n/save kept.json\n/save other.json\n/quit\nnot read\n"
    done = subprocess.run(words, input=lines, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert "kept.json exists; choose another name" in done.stderr and (tmp_path / "kept.json").read_text() == "mine"
    assert len(read_conversation(tmp_path / "other.json").messages) == 2 and done.returncode == 0
