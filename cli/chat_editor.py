"""The line editor of chat: several lines, history across sessions, completion."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from .chat_commands import COMMANDS, settings

if TYPE_CHECKING:
    from .chat import Session

HISTORY_VARIABLE = "MLX_GPTOSS_HISTORY"  # another file; empty for none
MAX_HISTORY_BYTES = 1 << 20
FENCE = '"""'


def edited_messages(session: Session) -> Iterator[str]:
    """What the user enters, stripped, until Ctrl-D or two Ctrl-C in a row."""
    prompt: PromptSession[str] = PromptSession(
        history=open_history(),
        completer=ChatCompleter(),
        complete_while_typing=False,
        key_bindings=_keys(),
        prompt_continuation=_continuation,
        enable_open_in_editor=False,
    )
    cancelled = False  # whether the last key was Ctrl-C on an empty line
    while True:
        try:
            text = prompt.prompt("> ")
        except KeyboardInterrupt:
            if cancelled and not prompt.default_buffer.text:
                return
            cancelled = True
            click.echo("Ctrl-C once more, or Ctrl-D, leaves.", err=True)
            continue
        except EOFError:
            return
        cancelled = False
        yield _without_fences(text).strip()


def _without_fences(text: str) -> str:
    stripped = text.strip()
    if len(stripped) >= 2 * len(FENCE) and stripped.startswith(FENCE) and stripped.endswith(FENCE):
        return stripped[len(FENCE) : -len(FENCE)]
    return text


def _is_open(text: str) -> bool:
    """Whether the text begins with three quotes and lacks those that end it."""
    stripped = text.strip()
    return stripped.startswith(FENCE) and (len(stripped) < 2 * len(FENCE) or not stripped.endswith(FENCE))


def _keys() -> KeyBindings:
    keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)  # and not searching the history

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if _is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("c-j", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _continuation(width: int, line_number: int, wraps: int) -> StyleAndTextTuples:
    """The beginning of each line but the first, and none where a line goes on because it was too wide."""
    return [] if wraps else [("", ". ".rjust(width))]


def open_history() -> History:
    """The messages of earlier sessions. Where the file cannot be used, those of this one."""
    named = os.environ.get(HISTORY_VARIABLE)
    if named == "":
        return InMemoryHistory()
    base = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    state = base if base.is_absolute() else Path("~/.local/state").expanduser()
    file = Path(named) if named else state / "mlx-gptoss" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))  # only its owner reads it
        if file.stat().st_size > MAX_HISTORY_BYTES:
            _shorten(file)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        click.echo(f"no history across sessions: {error}", err=True)
        return InMemoryHistory()
    return FileHistory(str(file))


def _shorten(file: Path) -> None:
    """Keep the second half of the history. An entry begins with a line that begins with #."""
    data = file.read_bytes()
    _, mark, rest = data[-MAX_HISTORY_BYTES // 2 :].partition(b"\n# ")
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as shortened:
        shortened.write(mark + rest)
    os.replace(temporary, file)


class ChatCompleter(Completer):
    """Commands, the values of their arguments, and paths."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, argument = text[1:].partition(" ")
        if text.startswith("/") and "/" not in name and not space:
            yield from (Completion(f"/{each}", -len(text)) for each in COMMANDS if each.startswith(name))
        elif text.startswith("/") and name in COMMANDS:
            yield from self._values(COMMANDS[name].complete, argument, complete_event)
        else:
            word = document.get_word_before_cursor(WORD=True)
            if word.startswith(("./", "../", "/", "~")):
                yield from self._paths.get_completions(Document(word), complete_event)

    def _values(self, kind: tuple[str, ...] | str, argument: str, event: CompleteEvent) -> Iterable[Completion]:
        if kind == "path":
            yield from self._paths.get_completions(Document(argument), event)
            return
        if kind == "model":
            from mlx_gptoss.loading.library import model_names

            names: Iterable[str] = model_names()
        else:
            names = settings() if kind == "setting" else kind
        yield from (Completion(each, -len(argument)) for each in names if each.startswith(argument))
