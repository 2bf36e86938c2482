"""Where `chat` puts a conversation: files, as Conversation.to_dict() has it, and an answer: the clipboard."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from mlx_gptoss.errors import GptOssError, InvalidRequest
from mlx_gptoss.harmony.messages import Conversation

from .terminal import no_codes

MAX_FILE_BYTES = 64_000_000
MAX_OSC_BYTES = 74_994  # of base64 that xterm and others take
COPY_S = 10.0
COPIERS = (  # a program, and the environment variable that says that it has a clipboard to write to
    (("pbcopy",), None),
    (("wl-copy",), "WAYLAND_DISPLAY"),
    (("xclip", "-selection", "clipboard"), "DISPLAY"),
    (("xsel", "--input", "--clipboard"), "DISPLAY"),
    (("clip.exe",), None),
)


def path_of(argument: str) -> Path:
    """The file that a command names. Raises InvalidRequest if it names none."""
    if not argument:
        raise InvalidRequest("give a file's name")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:
        raise InvalidRequest(f"{argument}: {error}") from error


def write_conversation(conversation: Conversation, file: Path) -> None:
    """Write a conversation, for its owner alone: the file is replaced when all is written. Raises InvalidRequest."""
    text = json.dumps(conversation.to_dict(), ensure_ascii=False, indent=1) + "\n"
    target = file.resolve()  # of a link, what it points to
    if target.is_dir():
        raise InvalidRequest(f"{file} is a folder; give a file's name")
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
        with open(descriptor, "w", encoding="utf-8", errors="replace") as opened:
            opened.write(text)
        os.replace(temporary, target)
    except (OSError, ValueError) as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise InvalidRequest(f"{file} cannot be written: {getattr(error, 'strerror', error)}") from error


def read_conversation(file: Path) -> Conversation:
    """The conversation of a file, without the functions that it was offered: nobody would run them. Raises
    InvalidRequest for a file that cannot be read, or that to_dict() did not write."""
    try:
        if file.exists() and not file.is_file():
            raise InvalidRequest(f"{file} is not a file; give one that /save wrote")
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, GptOssError):
            raise
        raise InvalidRequest(f"{file} cannot be read: {getattr(error, 'strerror', error)}") from error
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest(f"{file} is longer than {MAX_FILE_BYTES // 10**6} MB; it is not a conversation")
    try:
        conversation = Conversation.from_dict(json.loads(data))
    except InvalidRequest as error:
        raise InvalidRequest(f"{file} holds no saved conversation: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{file} is damaged, or not JSON: {error}") from error
    return replace(conversation, functions=(), builtin_tools=())


def copy(text: str) -> str:
    """Put the text into the clipboard, by a program or by asking the terminal. Returns what was done. Raises
    InvalidRequest if neither can be."""
    for command, variable in COPIERS:
        if (variable is None or os.environ.get(variable)) and shutil.which(command[0]):
            data = text.encode("utf-16" if command[0] == "clip.exe" else "utf-8", "replace")
            try:
                # Those that stay to serve the clipboard would keep a pipe open.
                subprocess.run(
                    command,
                    input=data,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=COPY_S,
                    check=True,
                )
            except (OSError, subprocess.SubprocessError):
                continue
            return f"{len(text)} characters copied by {command[0]}"
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    if no_codes() or not stream.isatty():
        programs = ", ".join(command[0] for command, _ in COPIERS)
        raise InvalidRequest(f"no clipboard: none of {programs} works here, and the terminal takes no escape codes")
    encoded = base64.b64encode(text.encode("utf-8", "replace"))
    if len(encoded) > MAX_OSC_BYTES:
        raise InvalidRequest("no program for the clipboard is here, and the answer is too long to hand to the terminal")
    click.echo(f"\x1b]52;c;{encoded.decode()}\x07", file=stream, nl=False)
    return f"{len(text)} characters handed to the terminal (OSC 52); some terminals ignore that"
