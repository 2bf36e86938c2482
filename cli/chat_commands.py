"""The commands inside chat: one function and one line of the table each."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.errors import GptOssError, InvalidRequest

if TYPE_CHECKING:
    from .chat import Session

EFFORTS = ("low", "medium", "high")
MAX_FILE_BYTES = 64 << 20
KEYS = '''
"""                            begin and end a message of several lines
Alt-Enter or Ctrl-J            a new line; pasted lines are one message, too
Up, Ctrl-R                     earlier messages; search them
Tab                            complete commands, their values, and paths
//text                         a message that begins with /text
Ctrl-C                         clear the line; twice, leave; stop an answer (the text so far stays)
Ctrl-D                         leave'''


@dataclass(frozen=True)
class Command:
    """A command's function, its argument as /help shows it, and what it does. complete: the values that Tab offers,
    or "path" or "model"."""

    run: Callable[[Session, str], None]
    argument: str
    help: str
    complete: tuple[str, ...] | str = ()


def split_command(text: str) -> tuple[str, str] | None:
    """The name and the argument of a command; None for a message. A path is a message, as is what begins with //."""
    word = text.split(maxsplit=1)[0] if text.split() else ""
    if not re.fullmatch(r"/[^/\s]+", word) or os.path.exists(word):
        return None
    name, _, argument = text[1:].partition(" ")
    return name.strip(), argument.strip()


def run_command(session: Session, name: str, argument: str) -> None:
    """Carry out a command. What is wrong with it is one line on stderr."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them."
        click.echo(f"no such command: /{name}. {hint}", err=True)
        return
    try:
        COMMANDS[name].run(session, argument)
    except (GptOssError, OSError) as error:
        click.echo(f"error: {error}", err=True)
    except KeyboardInterrupt:
        click.echo(f"/{name} was stopped", err=True)


def _help(session: Session, argument: str) -> None:
    for name, command in COMMANDS.items():
        click.echo(f"/{name} {command.argument}".ljust(31) + command.help, err=True)
    click.echo(KEYS, err=True)


def _reset(session: Session, argument: str) -> None:
    session.conversation = replace(session.conversation, messages=())


def _reasoning(session: Session, argument: str) -> None:
    if argument not in EFFORTS:
        raise InvalidRequest(f"/reasoning takes {', '.join(EFFORTS)}; it is {session.conversation.reasoning}")
    session.conversation = replace(session.conversation, reasoning=argument)  # type: ignore[arg-type]


def _system(session: Session, argument: str) -> None:
    session.conversation = replace(session.conversation, instructions=argument or None)


def _stats(session: Session, argument: str) -> None:
    session.stats = not session.stats


def _quit(session: Session, argument: str) -> None:
    session.left = True


def _undo(session: Session, argument: str) -> None:
    question = _take_back(session)
    click.echo(f"taken back: {_short(question)}", err=True)


def _retry(session: Session, argument: str) -> None:
    session.ask(_take_back(session))


def _edit(session: Session, argument: str) -> None:
    kept = session.conversation
    before = _take_back(session) if any(message.role == "user" for message in kept.messages) else ""
    text = click.edit(before)
    if text is None or not text.strip():
        session.conversation = kept
        click.echo("nothing was changed", err=True)
        return
    session.ask(text.strip())


def _take_back(session: Session) -> str:
    """Remove the last question and what followed it, and return the question."""
    messages = session.conversation.messages
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if last is None:
        raise InvalidRequest("there is no question yet")
    session.conversation = replace(session.conversation, messages=messages[:last])
    return messages[last].content


def _copy(session: Session, argument: str) -> None:
    from .clipboard import copy

    answers = [m for m in session.conversation.messages if m.role == "assistant" and m.channel == "final"]
    if not answers:
        raise InvalidRequest("there is no answer yet")
    click.echo(f"the answer was {copy(answers[-1].content)}", err=True)


def _save(session: Session, argument: str) -> None:
    import json

    file = _file(argument, "/save")
    if file.exists() and not click.confirm(f"{file} exists. Replace it?", default=False, err=True):
        return
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(session.conversation.to_dict(), ensure_ascii=False, indent=1), "utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    click.echo(f"saved in {file}", err=True)


def _load(session: Session, argument: str) -> None:
    import json

    from mlx_gptoss import Conversation

    file = _file(argument, "/load")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise InvalidRequest(f"{file} is too large to be a conversation")
    try:
        session.conversation = Conversation.from_dict(json.loads(file.read_text("utf-8")))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{file} is no conversation that /save wrote: {error}") from error
    questions = sum(message.role == "user" for message in session.conversation.messages)
    click.echo(f"{questions} question{'' if questions == 1 else 's'} from {file}", err=True)


def _file(argument: str, command: str) -> Path:
    if not argument:
        raise InvalidRequest(f"give a file: {command} talk.json")
    return Path(argument.strip("\"'")).expanduser()


def _model(session: Session, argument: str) -> None:
    if argument:
        session.change_model(argument)
    click.echo(f"{session.model.name} ({session.model.format}, {session.model.backend})", err=True)


def settings() -> dict[str, str]:
    """The names that /set takes, and the type of each: max_tokens and the sampling fields of the command line."""
    from mlx_gptoss.options.sampling import SamplingOptions

    found = {each.name: each.type.partition(" ")[0] for each in fields(SamplingOptions) if each.metadata["flag"]}
    return {"max_tokens": "int", **found}


def _set(session: Session, argument: str) -> None:
    from mlx_gptoss.options.sampling import SamplingOptions

    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, value, kinds = name.strip().replace("-", "_"), value.strip(), settings()
    if name and name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1)
        raise InvalidRequest(f"there is no setting {name}; " + (f"did you mean {near[0]}?" if near else _listed(kinds)))
    if name and value:
        chosen = None if value == "default" else _converted(name, kinds[name], value)
        if name == "max_tokens":
            if isinstance(chosen, int) and chosen < 1:
                raise InvalidRequest("max_tokens must be at least 1")
            session.max_tokens = chosen
        elif chosen is None:
            session.chosen.pop(name, None)
        else:
            SamplingOptions(**{name: chosen})  # checks it
            session.chosen[name] = (chosen,) if name == "stop" else chosen
    for each in [name] if name else kinds:
        shown = session.max_tokens if each == "max_tokens" else getattr(session.sampling, each)
        click.echo(f"{each} {'default' if shown is None or shown == () else shown}", err=True)


def _listed(names: dict[str, str]) -> str:
    return f"there are {', '.join(names)}"


def _converted(name: str, kind: str, value: str) -> Any:
    try:
        return {"int": int, "float": float}.get(kind, str)(value)
    except ValueError:
        raise InvalidRequest(f"{name} takes {'a whole number' if kind == 'int' else 'a number'}, not {value}") from None


def _tokens(session: Session, argument: str) -> None:
    from mlx_gptoss.harmony.render import render

    most = session.model.max_context
    used = len(render(session.conversation, session.model.tokenizer))
    click.echo(f"{used} of {most} tokens ({100 * used / most:.0f}%)", err=True)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


COMMANDS = {
    "help": Command(_help, "", "show this list"),
    "reset": Command(_reset, "", "start a new conversation"),
    "reasoning": Command(_reasoning, "low|medium|high", "how much to think before answering", EFFORTS),
    "system": Command(_system, "TEXT", "instructions to the model; without TEXT, none"),
    "retry": Command(_retry, "", "ask the last question again"),
    "undo": Command(_undo, "", "take back the last question and its answer"),
    "edit": Command(_edit, "", "change the last question in $EDITOR and ask it again"),
    "copy": Command(_copy, "", "copy the last answer to the clipboard"),
    "save": Command(_save, "FILE", "save the conversation as JSON", "path"),
    "load": Command(_load, "FILE", "go on with a saved conversation", "path"),
    "model": Command(_model, "NAME", "answer with another model; without NAME, show this one", "model"),
    "set": Command(_set, "NAME VALUE", "a sampling option, such as temperature; alone, show all", "setting"),
    "tokens": Command(_tokens, "", "how much of the context the conversation takes"),
    "stats": Command(_stats, "", "switch token counts and speeds on or off"),
    "quit": Command(_quit, "", "leave, as does Ctrl-D"),
}
COMMANDS["new"] = replace(COMMANDS["reset"], help="the same as /reset")
COMMANDS["exit"] = replace(COMMANDS["quit"], help="the same as /quit")
