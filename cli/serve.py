"""mlx-gptoss serve: one model or several behind the HTTP APIs of OpenAI, Anthropic and Ollama."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.options import LoadOptions

from .install_service import SERVICE_OPTIONS, install
from .options import (
    CACHE_OPTIONS,
    DEVICE_OPTIONS,
    MODEL_VARIABLE,
    RUN_OPTIONS,
    ModelName,
    declared,
    load,
    options,
    serve_extra,
)

if TYPE_CHECKING:
    from mlx_gptoss.server.models.named import NamedModel
    from mlx_gptoss.server.models.pool import ModelPool


MODELS_OPTION = click.option(
    "-m",
    "--model",
    "model_names",
    multiple=True,
    type=ModelName(),
    envvar=MODEL_VARIABLE,
    metavar="PATH|REPO",
    help="A folder, a hub id such as openai/gpt-oss-20b, or nano. Repeatable: requests choose by name, and the first "
    "answers the others. Default: all models on this machine, nano first.",
)


@click.command(context_settings={"auto_envvar_prefix": "MLX_GPTOSS"})
@options((MODELS_OPTION, *DEVICE_OPTIONS, *RUN_OPTIONS), CACHE_OPTIONS, declared(LoadOptions, slots=4, max_waiting=128))
@click.option(
    "--idle-unload",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Unload a model after so long without a request; the next one loads it again.",
)
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
@click.option(
    "--log-level",
    type=click.Choice(["error", "warning", "info", "debug"]),
    default="info",
    show_default=True,
    help="info: a line for every request on standard error; debug: health checks, too.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Lines for people, or a JSON object a line.",
)
@options(SERVICE_OPTIONS)
def serve(
    model_names: tuple[str, ...],
    idle_unload: float | None,
    host: str,
    port: int,
    api_key: str | None,
    insecure: bool,
    aliases: tuple[str, ...],
    strict_model: bool,
    cors: tuple[str, ...],
    tools: str,
    tools_config: Path | None,
    log_level: str,
    log_format: str,
    install_service: bool,
    **given: Any,
) -> None:
    """Serve models to programs that speak to OpenAI, Anthropic or Ollama, and a chat page at /.

    One model is loaded at once and stays. Several, or one with --idle-unload, have processes of their own: a model is
    loaded by the first request for it, and unloaded again when another one needs its memory. An --adapter is for the
    first model; requests name it as their model.

    The first SIGTERM or Ctrl-C lets running requests finish; the second one does not wait. Every option can be set by
    an environment variable as well: --max-context by MLX_GPTOSS_MAX_CONTEXT.
    """
    with serve_extra():
        from mlx_gptoss.server import run
        from mlx_gptoss.server.guard import Gate
        from mlx_gptoss.server.hosted.sessions import HostedTools
        from mlx_gptoss.server.hosted.settings import load_settings
        from mlx_gptoss.server.log_output import configure_logging
        from mlx_gptoss.server.service import Service

    _check_access(host, api_key, insecure)
    configure_logging(log_level, log_format)
    settings = load_settings([name for name in re.split(r"[\s,]+", tools) if name], tools_config)
    if install_service:
        return install(click.get_current_context())
    hosted = None if settings is None else HostedTools(settings)  # before a model is loaded, since it may fail
    with run.listen(host, port) as listener:
        gate = Gate(
            api_key=api_key, allowed_hosts=run.allowed_hosts(host, keyed=api_key is not None), allowed_origins=cors
        )
        with _open_models(model_names, aliases, idle_unload, (log_level, log_format), given) as (models, pool):
            if hosted is not None:
                first = models[0].model
                hosted.count_tokens = lambda text: len(first.tokenizer.encode(text))
            if not gate.is_local and api_key is None:
                warning = f"warning: anyone who can reach {host}:{port} can use the model; set an --api-key"
                click.secho(warning, fg="red", err=True)
            names = ", ".join(named.model.name for named in models)
            click.echo(_greeting(names, host, listener.getsockname()[1], api_key is not None), err=True)
            served = Service(models, gate, strict_model, pool, hosted)
            gc.collect()
            gc.freeze()  # a collection of all that was loaded takes 50 ms, and every stream would wait for it
            run.Server(served).serve_on(listener)


@contextmanager
def _open_models(
    names: tuple[str, ...],
    aliases: tuple[str, ...],
    idle_unload: float | None,
    log: tuple[str, str],
    given: dict[str, Any],
) -> Iterator[tuple[list[NamedModel], ModelPool | None]]:
    """The models to serve: those named, or else those on this machine. One alone is loaded in this process, unless it
    is to be unloaded: only the end of a process gives its memory back for certain."""
    from mlx_gptoss.harmony import grammar
    from mlx_gptoss.loading import hub, library
    from mlx_gptoss.ranks import find_launch
    from mlx_gptoss.server.models.named import NamedModel, model_names, with_adapters
    from mlx_gptoss.server.models.pool import ModelPool
    from mlx_gptoss.server.models.remote import RemoteModel

    found = [(model.name, model.path) for model in library.installed_models()] if not names else []
    if len(names) <= 1 and len(found) <= 1 and idle_unload is None:
        name = names[0] if names else None
        with load(name, several_adapters=True, **given) as loaded:
            loaded.default_adapter = None  # the model's own name means the model as it is
            if loaded.has_tokenizer:
                grammar.warm_up(loaded.tokenizer)
            yield _named(with_adapters(NamedModel(loaded, *model_names(name)), loaded.adapters), aliases), None
        return
    if find_launch() is not None:
        raise click.UsageError("a model that is split over ranks is served alone: give one --model, no --idle-unload")
    options = LoadOptions(**given)
    chosen = [(name, hub.resolve(name)) for name in names] or found
    others = replace(options, adapters=None)
    models = [RemoteModel(name, path, others if at else options) for at, (name, path) in enumerate(chosen)]
    named = [NamedModel(model, *model_names(name)) for model, (name, _) in zip(models, chosen, strict=True)]
    named[:1] = with_adapters(named[0], tuple(options.adapters or ()))
    yield _named(named, aliases), ModelPool(models, idle_unload_s=idle_unload, log=log)


def _check_access(host: str, api_key: str | None, insecure: bool) -> None:
    """Raise UsageError for an empty key, and for a server on the network without one."""
    from mlx_gptoss.server.guard import LOOPBACK

    if api_key is not None and not api_key.strip():
        raise click.UsageError("--api-key is empty: give a key, or leave the option (and its variable) out")
    if host not in LOOPBACK and api_key is None and not insecure:
        raise click.UsageError(f"--host {host} lets other machines in: set an --api-key, or accept that by --insecure")


def _named(models: list[NamedModel], aliases: Iterable[str]) -> list[NamedModel]:
    """The models with the names of the --alias options.

    Raises UsageError for an alias of a model that is not served, and for two models of one name.
    """
    ids = [model.id for model in models]
    if twice := next((id for id in ids if ids.count(id) > 1), None):
        raise click.UsageError(
            f"--model or --adapter has {twice!r} twice: requests could not choose; give another name"
        )
    for alias in aliases:
        name, equals, target = alias.partition("=")
        place = next((place for place, model in enumerate(models) if equals and model.has_name(target)), None)
        if not name or place is None:
            raise click.UsageError(f"--alias {alias!r} must be NAME=M, where M is a --model that is served")
        models[place] = replace(models[place], aliases=(*models[place].aliases, name))
    return models


def _greeting(name: str, host: str, port: int, keyed: bool) -> str:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    body = '{"messages": [{"role": "user", "content": "What is 12 + 30?"}]}'
    return (
        f"{name} at {url}, API at {url}/v1. Try:\n"
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )
