"""The config file: defaults of options, as TOML, in ~/.config/mlx-gptoss/config.toml on every system.

A key at the top, such as `model`, is the default of that option in every command that has it; one in the table
`[serve]` only in that command. An option on the command line and an environment variable come before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from mlx_gptoss.errors import GptOssError

VARIABLE = "MLX_GPTOSS_CONFIG"  # another file; empty for none

# Options that say what one run does; a default of them would change what scripts get.
NOT_KEPT = {
    *("json", "raw", "overwrite", "retry", "yes", "dry-run", "var"),
    *("install-service", "remove-service", "insecure", "api-key"),
}


def path() -> Path:
    """Where the file is, or would be: MLX_GPTOSS_CONFIG, or in XDG_CONFIG_HOME if that is absolute, or in ~/.config."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    base = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    return (base if base.is_absolute() else Path("~/.config").expanduser()) / "mlx-gptoss" / "config.toml"


def read() -> Any:
    """The document, which is empty if there is no file. Raises GptOssError for a file that is not TOML."""
    file = path()
    try:
        text = "" if os.environ.get(VARIABLE) == "" else file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise GptOssError(f"the config file {file} cannot be read: {error}") from error
    if not text:
        return {}
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        return tomlkit.parse(text)
    except (TOMLKitError, RecursionError) as error:
        raise GptOssError(f"the config file {file} is not TOML: {error}; correct it or remove it") from error


def write(document: Any) -> None:
    """Replace the file with the document, comments and order kept."""
    import tomlkit

    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(tomlkit.dumps(document), encoding="utf-8")
    temporary.replace(file.resolve() if file.is_symlink() else file)


def settings_of(command: click.Command) -> Iterator[tuple[str, click.Parameter]]:
    """What the file may set of a command, by key: an option's long name, or `model` for an argument of models."""
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            if parameter.name in ("model", "models"):
                yield "model", parameter
            continue
        long = next((name[2:] for name in parameter.opts if name.startswith("--")), None)
        if long and long not in NOT_KEPT and not parameter.is_eager:
            yield long, parameter


def defaults_for(name: str, command: click.Command, document: Mapping[str, Any]) -> dict[str, Any]:
    """click's default_map of one command: what the file says of its options, by the parameters' names."""
    table = document.get(name, {})
    own = table if isinstance(table, Mapping) else {}
    found = {}
    for key, parameter in settings_of(command):
        value = own.get(key, document.get(key))
        if value is not None and not isinstance(value, Mapping) and parameter.name:
            found[parameter.name] = fit(parameter, value)
    return found


def fit(parameter: click.Parameter, value: Any) -> Any:
    """A TOML value as click's conversion takes it: text, or a list of texts for an option that is repeatable. An option
    that is not takes the first of several."""
    values = [each if isinstance(each, bool) else str(each) for each in (value if isinstance(value, list) else [value])]
    return values if parameter.multiple or parameter.nargs == -1 else next(iter(values), None)
