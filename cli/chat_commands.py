"""The commands of `chat`: one function and one line of COMMANDS for each. What they say goes to stderr."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.options import GenerationOptions

from .options import TYPES

if TYPE_CHECKING:
    from mlx_gptoss.harmony.messages import Effort

    from .chat import Session

EFFORTS: dict[str, Effort] = {"low": "low", "medium": "medium", "high": "high"}
DEFAULT = "default"
SETTINGS = {
    each.name: each
    for each in fields(GenerationOptions)
    if each.name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "max_tokens")
    or each.name.endswith("_penalty")
}
OTHER_NAMES = {"new": "reset", "clear": "reset", "exit": "quit", "bye": "quit", "q": "quit", "?": "help"}
OTHER_NAMES |= {"export": "save", "import": "load", "again": "retry", "regenerate": "retry", "think": "reasoning"}
KEYS = (
    ('"""', "at the beginning of a line opens a message of several lines, at the end of one it closes it"),
    ("Alt-Enter, Ctrl-J", "a new line; a pasted text is one message, whatever its lines"),
    ("Up, Down, Ctrl-R", "earlier lines, a search in them"),
    ("Tab", "completes commands, their values and paths"),
    ("Ctrl-C", "stops an answer, whose text so far stays; cancels a line; twice leaves"),
    ("Ctrl-D", "leaves"),
)
say = partial(click.echo, err=True)


@dataclass(frozen=True)
class Command:
    """A command. argument: as /help shows it. values: what may stand at the end of an argument; None for a path."""

    run: Callable[[Session, str], None]
    help: str
    argument: str = ""
    values: Callable[[str], Iterable[str]] | None = lambda argument: ()


def find_command(name: str) -> Command:
    """The command of that name. Raises InvalidRequest, which suggests a name, for another one."""
    name = name if name in COMMANDS else OTHER_NAMES.get(name, name)
    if name in COMMANDS:
        return COMMANDS[name]
    near = _nearest(name, [*COMMANDS, *OTHER_NAMES])
    meant = f"did you mean /{near}? " if near else ""
    raise InvalidRequest(f"no such command: /{name:.80}. {meant}/help lists them; // sends a line that begins with /")


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that a wrong one abbreviates or misspells."""
    names = list(names)
    longer = [each for each in names if name and each.startswith(name)]
    return next(iter(longer or difflib.get_close_matches(name, names, 1)), None)


def values_after(line: str) -> Iterable[str] | None:
    """What may stand at the end of a line that begins with a command; None where that is a path."""
    name, _, argument = line[1:].partition(" ")
    values = COMMANDS[name].values
    return None if values is None else values(argument.lstrip())


def _help(session: Session, argument: str) -> None:
    rows = [(f"/{name} {command.argument}".rstrip(), command.help) for name, command in COMMANDS.items()]
    rows.append(("//TEXT", "sends /TEXT; a path, such as /usr/bin/env, needs no second slash"))
    keys = KEYS if session.editor is not None else KEYS[-2:]
    formatter = click.HelpFormatter(max_width=100)
    formatter.write_dl(rows)
    formatter.write_paragraph()
    formatter.write_dl(keys)
    say(formatter.getvalue(), nl=False)


def _reset(session: Session, argument: str) -> None:
    session.conversation = replace(session.conversation, messages=())
    session.unanswered = None


def _reasoning(session: Session, argument: str) -> None:
    if argument and argument not in EFFORTS:
        raise InvalidRequest(f"reasoning is low, medium or high, not {argument!r:.80}")
    if argument:
        session.conversation = replace(session.conversation, reasoning=EFFORTS[argument])
    say(f"reasoning: {session.conversation.reasoning}")


def _system(session: Session, argument: str) -> None:
    session.conversation = replace(session.conversation, instructions=argument or None)
    say("instructions set" if argument else "no instructions")


def _stats(session: Session, argument: str) -> None:
    session.stats = not session.stats
    say(f"stats {'on' if session.stats else 'off'}")


def _set(session: Session, argument: str) -> None:
    name, _, value = argument.partition(" ")
    name, value = name.lstrip("-").replace("-", "_"), value.strip()
    if name and name not in SETTINGS:
        near = _nearest(name, SETTINGS)
        remedy = f"did you mean {near}?" if near else f"there are {', '.join(SETTINGS)}"
        raise InvalidRequest(f"there is no setting {name!r:.80}; {remedy}")
    if value == DEFAULT:
        session.settings.pop(name, None)
    elif value:
        changed = {**session.settings, name: _value(name, value)}
        GenerationOptions(**changed)  # raises InvalidRequest for a value out of range
        session.settings = changed
    effective = GenerationOptions(**session.settings).resolve(session.model.default_sampling)
    for each in [name] if name else SETTINGS:
        shown = session.settings.get(each) if each == "max_tokens" else getattr(effective, each)
        text = shlex.join(shown) if isinstance(shown, tuple) else shown
        say(f"{each} = {'none' if text in (None, '') else text}")


def _value(name: str, text: str) -> Any:
    """The text as the setting's type. Raises InvalidRequest."""
    declared = SETTINGS[name]
    try:
        if declared.metadata["flag"] is not None and declared.metadata["flag"].repeatable:
            return tuple(shlex.split(text))
        return TYPES[str(declared.type).partition(" ")[0]](text)
    except ValueError as error:
        raise InvalidRequest(f"{name} cannot be {text!r:.80}: {error}") from error


def _setting_names(argument: str) -> Sequence[str]:
    return (DEFAULT,) if " " in argument else tuple(SETTINGS)


def _model(session: Session, argument: str) -> None:
    if argument:
        session.change_model(argument)
    say(session.model_line)


def _model_names(argument: str) -> Sequence[str]:
    from mlx_gptoss.loading.library import model_names

    return list(model_names())


def _tokens(session: Session, argument: str) -> None:
    from mlx_gptoss.harmony.render import render

    used, room = len(render(session.conversation, session.model.tokenizer)), session.model.max_context
    say(f"{used} of {room} tokens ({100 * used / room:.1f} %), the system message included")


def _save(session: Session, argument: str) -> None:
    from .chat_files import path_of, write_conversation

    file = path_of(argument)
    if file.exists():
        if not sys.stdin.isatty():
            raise InvalidRequest(f"{file} exists; choose another name or remove it")
        if not click.confirm(f"{file} exists. Replace it?", err=True):
            return
    write_conversation(session.conversation, file)
    say(f"{len(session.conversation.messages)} messages written to {file}")


def _load(session: Session, argument: str) -> None:
    from .chat_files import path_of, read_conversation

    file = path_of(argument)
    session.conversation, session.unanswered = read_conversation(file), None
    say(f"{len(session.conversation.messages)} messages read from {file}, with their instructions and reasoning")


def _undo(session: Session, argument: str) -> None:
    say(f"dropped: {_shortened(session.drop_turn())}")


def _retry(session: Session, argument: str) -> None:
    session.ask(session.unanswered or session.drop_turn())


def _edit(session: Session, argument: str) -> None:
    if argument not in ("", "new"):
        raise InvalidRequest("/edit takes the last message, /edit new an empty one")
    if not sys.stdin.isatty():
        raise InvalidRequest("/edit needs a terminal")
    last = None if argument else session.unanswered or session.last_question
    text = click.edit(last or "", extension=".md")
    if text is None or not text.strip():
        return say("nothing sent: the text was not saved, or is empty")
    if last is not None and session.unanswered is None:
        session.drop_turn()
    say(f"> {_shortened(text)}")
    session.ask(text.strip())


def _copy(session: Session, argument: str) -> None:
    from .chat_files import copy

    say(copy(session.last_answer))


def _quit(session: Session, argument: str) -> None:
    raise EOFError


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:59]}…"


COMMANDS = {
    "help": Command(_help, "show this list"),
    "reset": Command(_reset, "start a new conversation; /new does, too"),
    "reasoning": Command(_reasoning, "how much to think before answering", "low|medium|high", lambda argument: EFFORTS),
    "system": Command(_system, "instructions to the model; without TEXT, none", "[TEXT]"),
    "set": Command(_set, "change a setting, or show all; `default` resets it", "[NAME VALUE]", _setting_names),
    "model": Command(_model, "load another model and go on with it", "[NAME]", _model_names),
    "retry": Command(_retry, "ask the last question again"),
    "undo": Command(_undo, "drop the last question and its answer"),
    "edit": Command(_edit, "edit the last message, or a new one, in $EDITOR", "[new]", lambda argument: ("new",)),
    "copy": Command(_copy, "copy the last answer to the clipboard"),
    "save": Command(_save, "write the conversation to a file", "FILE", None),
    "load": Command(_load, "continue the conversation of a file", "FILE", None),
    "tokens": Command(_tokens, "how much of the context the conversation takes"),
    "stats": Command(_stats, "switch token counts and speeds on or off"),
    "quit": Command(_quit, "leave, as does Ctrl-D"),
}
