"""What a line of `chat` is: a command, or a message; and how lines are read where there is no editor."""

from __future__ import annotations

import os
import sys
from collections.abc import Container

HISTORY_VARIABLE = "MLX_GPTOSS_HISTORY"
PROMPT = "> "
QUOTES = '"""'


def split_command(line: str, known: Container[str]) -> tuple[str, str] | None:
    """The name and the argument of a command; None for a message.

    A slash before a word with a second slash, or before one that exists as a path, begins a message, as two slashes do.
    """
    first, *rest = line.split(maxsplit=1) or [""]
    if not first.startswith("/") or first.startswith("//"):
        return None
    name = first[1:]
    if name not in known and ("/" in name or (name and os.path.exists(first.rstrip(",.:;?!")))):
        return None
    return name, rest[0].strip() if rest else ""


def message_of(line: str) -> str:
    """The text to send: with one slash where the line begins with two."""
    return line[1:] if line.startswith("//") else line


def is_open(text: str) -> bool:
    """Whether the text begins with three quotation marks and does not yet end with three others."""
    text = text.strip()
    return text.startswith(QUOTES) and not (text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES))


def without_quotes(text: str) -> str:
    """The line that says the same without quotation marks around it, and without white space around it. What was
    between the marks is a message, even if it begins with a slash."""
    text = text.strip()
    if text.startswith(QUOTES) and not is_open(text):
        text = text[len(QUOTES) : -len(QUOTES)].strip()
        return f"/{text}" if text.startswith("/") else text
    return text


def read_plain(terminal: bool) -> str:
    """The next line of stdin, stripped; on a terminal, all lines between three quotation marks. Raises EOFError."""
    text = input(PROMPT if terminal else "")
    while terminal and is_open(text):
        text += "\n" + input("... ")
    return printable(without_quotes(text) if terminal else text.strip())


def printable(text: str) -> str:
    """The text without what stands for bytes that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def has_editor() -> bool:
    """Whether a terminal shows what is typed and takes escape codes."""
    from .terminal import no_codes

    return sys.stdin.isatty() and not no_codes() and (sys.stdout.isatty() or sys.stderr.isatty())
