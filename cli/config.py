"""mlx-gptoss config: show and change the defaults of options."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mlx_gptoss.errors import GptOssError

from . import config_file
from .options import JSON_OPTION, MODEL_VARIABLE, options


@click.group(invoke_without_command=True)
@click.pass_context
def config(ctx: click.Context) -> None:
    """Show or change the config file: defaults of options.

    `config set model openai/gpt-oss-20b` sets the default of --model in all commands, `config set serve.port 9000` the
    one of --port in serve. An option on the command line and an environment variable come before the file.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(show)


@config.command()
@options((JSON_OPTION,))
def show(as_json: bool = False) -> None:
    """Print all settings."""
    document = config_file.read()
    if as_json:
        plain = document.unwrap() if document else {}
        return click.echo(json.dumps({"path": str(config_file.path()), "settings": plain}, default=str))
    for key, value in document.items():
        nested = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, each in nested:
            click.echo(f"{f'{key}.{name}' if name else key} = {json.dumps(each, ensure_ascii=False, default=str)}")
    if not document:
        click.echo(f"nothing is set; {config_file.path()} does not exist or is empty", err=True)
    if model := os.environ.get(MODEL_VARIABLE):
        click.echo(f"{MODEL_VARIABLE}={model} comes before the file's model", err=True)


@config.command()
def path() -> None:
    """Print the path of the config file."""
    click.echo(config_file.path())


@config.command("set")
@click.argument("key")
@click.argument("values", metavar="VALUE...", nargs=-1, required=True)
def set_(key: str, values: tuple[str, ...]) -> None:
    """Set KEY to VALUE, or a repeatable option to several."""
    table, name = _split(key)
    parameter = _find(table, name)
    if len(values) > 1 and not (parameter.multiple or parameter.nargs == -1):
        raise click.UsageError(f"{key} takes one value; quote a text with spaces")
    checked = [_checked(key, name, parameter, value) for value in values]
    document = config_file.read()
    if not document:
        import tomlkit

        document = tomlkit.document()
    if table and not isinstance(document.get(table), Mapping):
        document[table] = {}
    (document[table] if table else document)[name] = checked if len(checked) > 1 else checked[0]
    config_file.write(document)


@config.command()
@click.argument("key")
def unset(key: str) -> None:
    """Remove the setting KEY."""
    table, name = _split(key)
    document = config_file.read()
    place = document.get(table, {}) if table else document
    if not isinstance(place, Mapping) or name not in place:
        raise GptOssError(f"{key} is not set; `mlx-gptoss config show` lists what is")
    del place[name]  # type: ignore[attr-defined]
    if table and not place:
        del document[table]
    config_file.write(document)


def _split(key: str) -> tuple[str, str]:
    """The command, "" for all of them, and the option that a key names."""
    table, _, name = key.rpartition(".")
    return table, name.lstrip("-").replace("_", "-")


def _commands() -> dict[str, click.Command]:
    from .main import COMMANDS, group

    context = click.Context(group)
    found = {name: group.get_command(context, name) for name in COMMANDS if name != "config"}
    return {name: command for name, command in found.items() if command is not None}


def _find(table: str, name: str) -> click.Parameter:
    """The option that a key sets. Raises UsageError, with the keys that are like it, if there is none."""
    commands = _commands()
    if table and table not in commands:
        raise click.UsageError(f"there is no command {table!r}{_like(table, list(commands))}")
    chosen = [commands[table]] if table else list(commands.values())
    known = {key: parameter for command in chosen for key, parameter in config_file.settings_of(command)}
    if name not in known:
        where = f" of {table}" if table else ""
        raise click.UsageError(f"there is no setting {name!r}{where}{_like(name, list(known))}")
    return known[name]


def _like(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(sorted(known))}"


def _checked(key: str, name: str, parameter: click.Parameter, value: str) -> Any:
    """The value as TOML keeps it. Raises BadParameter for one that the option does not take."""
    with click.Context(click.Command("config")) as context:
        converted = parameter.type.convert(value, parameter, context)
    if isinstance(converted, (bool, int, float)):
        return converted
    looks_like_a_path = name == "model" and (Path(value).expanduser().exists() or value.startswith((".", "~")))
    return os.path.abspath(Path(value).expanduser()) if looks_like_a_path and value != "nano" else value
