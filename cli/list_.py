"""mlx-gptoss list: the models on this machine."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from .options import JSON_OPTION, declared, options

if TYPE_CHECKING:
    from mlx_gptoss.loading.library import ModelFacts

from mlx_gptoss.options import LoadOptions

DAY_S = 86400


@click.command("list")
@options(declared(LoadOptions, "backend"), (JSON_OPTION,))
def list_(backend: str, as_json: bool) -> None:
    """List the models on this machine: the bundled one, those in the hub's cache and in the folders of MLX_GPTOSS_HOME.

    Each name is one that --model takes. Fits: whether the memory plan of one request at a time fits here. Last used:
    when the file system last noted that the tokenizer was read, which may be a day late.
    """
    from mlx_gptoss.loading.library import model_facts

    found = model_facts(backend)
    if as_json:
        click.echo(json.dumps({"models": [_report(facts) for facts in found]}))
    else:
        _print(found)


def _report(facts: ModelFacts) -> dict[str, Any]:
    memory = facts.memory
    return {
        "name": facts.name,
        "path": str(facts.path),
        "place": facts.place,
        "format": facts.format,
        "parameters": facts.parameters,
        "size_bytes": facts.size_bytes,
        "last_used": int(facts.used_at),
        "context": memory.context,
        "needed_bytes": memory.needed_bytes,
        "available_bytes": memory.available_bytes,
        "fits": memory.fits,
    }


def _print(found: list[ModelFacts]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from mlx_gptoss.loading.memory import gigabytes

    from .terminal import new_console

    table = Table(box=None, header_style="bold")
    table.add_column("name", overflow="fold")
    table.add_column("format", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    table.add_column("here", overflow="fold")
    for facts in found:
        memory = facts.memory
        verdict = (
            f"[green]fits[/green], {memory.context} tokens"
            if memory.fits
            else f"[red]needs {gigabytes(memory.needed_bytes)} of {gigabytes(memory.available_bytes)}[/red]"
        )
        table.add_row(escape(facts.name), facts.format, gigabytes(facts.size_bytes), _ago(facts.used_at), verdict)
    new_console(highlight=False).print(table)


def _ago(moment: float) -> str:
    days = int((time.time() - moment) // DAY_S)
    return "today" if days < 1 else "yesterday" if days == 1 else f"{days} days ago"
