"""The line editor of `chat`: keys, history, completion, and what is typed while an answer streams."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from .chat_input import HISTORY_VARIABLE, PROMPT, is_open, printable, without_quotes

if TYPE_CHECKING:
    from .chat_commands import Command

MAX_HISTORY_BYTES = 1_000_000  # the older half is dropped beyond that
MAX_ENTRY = 50_000  # characters; a longer message is not kept


class Editor:
    """Reads messages and commands from a terminal."""

    def __init__(self, commands: dict[str, Command], names_after: Callable[[str], Iterable[str] | None]) -> None:
        """names_after: the values of a command's argument, None where it is a path."""
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=_keys(),
            history=_history(),
            completer=_Completions(commands, names_after),
            complete_while_typing=Condition(_in_command_name),
            prompt_continuation=lambda width, line, wraps: " " * width if wraps else "... ",
            reserve_space_for_menu=6,
            output=create_output(always_prefer_tty=True),
        )

    def read(self) -> str:
        """The next message. Raises KeyboardInterrupt for Ctrl-C, with an argument if it cancelled some text, and
        EOFError for Ctrl-D on an empty line."""
        return printable(without_quotes(self._session.prompt(PROMPT)))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        if is_open(event.current_buffer.text):
            event.current_buffer.newline(copy_margin=False)
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    @keys.add("c-j", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        cancelled = ("a line",) if event.current_buffer.text else ()
        event.app.exit(exception=KeyboardInterrupt(*cancelled), style="class:aborting")

    return keys


def _in_command_name() -> bool:
    text = get_app().current_buffer.text
    return text.startswith("/") and not any(mark in text[1:] for mark in " /\n")


class _Completions(Completer):
    """Commands after a slash, their arguments, and paths elsewhere."""

    def __init__(self, commands: dict[str, Command], names_after: Callable[[str], Iterable[str] | None]) -> None:
        self._commands, self._names_after = commands, names_after
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor
        name, space, argument = before.partition(" ")
        if name.startswith("/") and name[1:] in self._commands and space:
            values = self._names_after(before)
            if values is None:
                yield from self._path(argument.lstrip(), complete_event)
                return
            word = argument.rpartition(" ")[2]
            for value in values:
                if value.startswith(word):
                    yield Completion(value, -len(word))
            return
        if before.startswith("/") and not space:
            for command, what in self._commands.items():
                if command.startswith(before[1:]):
                    yield Completion(f"/{command}", -len(before), display_meta=what.help)
            if "/" not in before[1:]:
                return
        word = document.get_word_before_cursor(WORD=True)
        if complete_event.completion_requested and "/" in word:
            yield from self._path(word, complete_event)

    def _path(self, word: str, event: CompleteEvent) -> Iterable[Completion]:
        return self._paths.get_completions(Document(word), event) if event.completion_requested else ()


class _History(FileHistory):
    """The file, as far as it can be written: a full disk does not end the chat."""

    def store_string(self, string: str) -> None:
        if len(string) > MAX_ENTRY:
            return
        try:
            super().store_string(printable(string))
        except OSError as error:
            click.echo(f"the history {self.filename!s} cannot be written: {error.strerror}", err=True)


def history_file() -> Path | None:
    """Where the history is kept: MLX_GPTOSS_HISTORY, or the user's folder for state; None if that is empty."""
    named = os.environ.get(HISTORY_VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    from platformdirs import user_state_path

    return user_state_path("mlx-gptoss", appauthor=False) / "chat_history"


def _history() -> History:
    """The history of all sessions, in a file that only the user can read. Without one, this session's alone."""
    file = history_file()
    if file is None:
        return InMemoryHistory()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600))
        if file.is_file():
            file.chmod(0o600)
            _shorten(file)
    except OSError as error:
        click.echo(f"no history: {file} cannot be used ({error.strerror}); set {HISTORY_VARIABLE}", err=True)
        return InMemoryHistory()
    return _History(file)


def _shorten(file: Path) -> None:
    """Drop the older half of a file that has become too long, at the beginning of an entry."""
    size = file.stat().st_size
    if size <= MAX_HISTORY_BYTES:
        return
    with file.open("rb") as source:
        source.seek(size - MAX_HISTORY_BYTES // 2)
        kept = source.read()
    begin = kept.find(b"\n# ")
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target:
        target.write(kept[begin:] if begin >= 0 else b"")
    temporary.replace(file.resolve())


@contextmanager
def keys_kept() -> Iterator[None]:
    """While an answer streams: what is typed or pasted is not shown, and goes into the next line. Ctrl-C interrupts."""
    import termios

    terminal = sys.stdout if sys.stdout.isatty() else sys.stderr

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    quiet = termios.tcgetattr(number)
    quiet[0] &= ~termios.ICRNL  # Enter stays apart from a pasted line break
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(number, termios.TCSADRAIN, quiet)
    click.echo("\x1b[?2004h", file=terminal, nl=False)  # bracketed paste
    try:
        yield
    finally:
        click.echo("\x1b[?2004l", file=terminal, nl=False)
        termios.tcsetattr(number, termios.TCSADRAIN, before)
