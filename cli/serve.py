"""mlx-gptoss serve: one model behind OpenAI's HTTP API."""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import click

from mlx_gptoss.options import LoadOptions

from .install_service import SERVICE_OPTIONS, install
from .options import CACHE_OPTIONS, LOAD_OPTIONS, declared, load, options, serve_extra


@click.command(context_settings={"auto_envvar_prefix": "MLX_GPTOSS"})
@options(LOAD_OPTIONS, CACHE_OPTIONS, declared(LoadOptions, slots=4, max_waiting=128))
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="0.0.0.0 lets other machines in; set an --api-key with it.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free port.")
@click.option("--api-key", metavar="K", help="A key that every request must send.")
@click.option("--insecure", is_flag=True, help="Let other machines in without a key.")
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    metavar="NAME=M",
    help="List the model M under this name, too. Repeatable.",
)
@click.option("--strict-model", is_flag=True, help="Answer 404 to any other model name, instead of answering to it.")
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="Let web pages of this origin in; * for all, null for sandboxed frames. Repeatable.",
)
@click.option("--tools", default="", metavar="LIST", help="Run these tools for requests: browser, python, mcp.")
@click.option(
    "--tools-config",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Settings of the tools, in TOML; mlx_gptoss/server/hosted/README.md describes them.",
)
@options(SERVICE_OPTIONS)
def serve(
    model: str | None,
    host: str,
    port: int,
    api_key: str | None,
    insecure: bool,
    aliases: tuple[str, ...],
    strict_model: bool,
    cors: tuple[str, ...],
    tools: str,
    tools_config: Path | None,
    install_service: bool,
    **given: Any,
) -> None:
    """Serve chat completions, responses and completions, and a chat page at /.

    The first SIGTERM or Ctrl-C lets running requests finish; the second one does not wait. Every option can be set by
    an environment variable as well: --max-context by MLX_GPTOSS_MAX_CONTEXT.
    """
    from mlx_gptoss.harmony import grammar

    with serve_extra():
        from mlx_gptoss.server import run, service
        from mlx_gptoss.server.guard import Gate
        from mlx_gptoss.server.hosted.sessions import HostedTools
        from mlx_gptoss.server.hosted.settings import load_settings

    _check_access(host, api_key, insecure)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    names = service.model_names(model)
    named = _alias_names(aliases, {model, *names[1], names[0]})
    settings = load_settings([name for name in re.split(r"[\s,]+", tools) if name], tools_config)
    if install_service:
        return install(click.get_current_context())
    hosted = None if settings is None else HostedTools(settings)  # before the model is loaded, since it may fail
    with run.listen(host, port) as listener:
        gate = Gate(
            api_key=api_key, allowed_hosts=run.allowed_hosts(host, keyed=api_key is not None), allowed_origins=cors
        )
        with load(model, **given) as loaded:
            grammar.warm_up(loaded.tokenizer)
            tokenizer = loaded.tokenizer
            if hosted is not None:
                hosted.count_tokens = lambda text: len(tokenizer.encode(text))
            if not gate.is_local and api_key is None:
                warning = f"warning: anyone who can reach {host}:{port} can use the model; set an --api-key"
                click.secho(warning, fg="red", err=True)
            click.echo(_greeting(loaded.name, host, listener.getsockname()[1], api_key is not None), err=True)
            served = service.Service(loaded, gate, *names, named, strict_model, hosted=hosted)
            run.Server(served).serve_on(listener)


def _check_access(host: str, api_key: str | None, insecure: bool) -> None:
    """Raise UsageError for an empty key, and for a server on the network without one."""
    from mlx_gptoss.server.guard import LOOPBACK

    if api_key is not None and not api_key.strip():
        raise click.UsageError("--api-key is empty: give a key, or leave the option (and its variable) out")
    if host not in LOOPBACK and api_key is None and not insecure:
        raise click.UsageError(f"--host {host} lets other machines in: set an --api-key, or accept that by --insecure")


def _alias_names(aliases: Iterable[str], known: Container[str | None]) -> tuple[str, ...]:
    """The names of the --alias options. Raises UsageError for one that is not of a served model."""
    names = []
    for alias in aliases:
        name, equals, target = alias.partition("=")
        if not name or not equals or target not in known:
            raise click.UsageError(f"--alias {alias!r} must be NAME=M, where M is the --model that is served")
        names.append(name)
    return tuple(names)


def _greeting(name: str, host: str, port: int, keyed: bool) -> str:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    body = '{"messages": [{"role": "user", "content": "What is 12 + 30?"}]}'
    return (
        f"{name} at {url}, API at {url}/v1. Try:\n"
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )
