"""mlx-gptoss serve: OpenAI's HTTP interface to one model, on this machine."""

from __future__ import annotations

import logging
from typing import Any

import click

from .options import CACHE_OPTIONS, MODEL_OPTIONS, RUN_OPTIONS, load, options, serve_extra


@click.command()
@options(MODEL_OPTIONS, RUN_OPTIONS, CACHE_OPTIONS)
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets others in: set an --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="MLX_GPTOSS_API_KEY", metavar="K", help="Asked of every request, if set.")
@click.option("--slots", type=click.IntRange(min=1), default=4, show_default=True, help="Sequences at once.")
@click.option("--max-waiting", type=click.IntRange(min=0), default=128, show_default=True, help="More are refused.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Let pages of this site use it; * for all. Repeatable.")
def serve(
    model: str | None,
    host: str,
    port: int,
    api_key: str | None,
    slots: int,
    max_waiting: int,
    cors: tuple[str, ...],
    **loading: Any,
) -> None:
    """Answer chat completions, responses and completions, and show a page to chat at /.

    The first SIGTERM or Ctrl-C lets running requests come to their end; the second does not wait.
    """
    from mlx_gptoss.harmony import grammar

    with serve_extra():
        from mlx_gptoss.server import run, service
        from mlx_gptoss.server.guard import Gate

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    with run.listen(host, port) as listener:
        gate = Gate(api_key=api_key, allowed_hosts=run.allowed_hosts(host), allowed_origins=cors)
        with load(model, **loading, slots=slots, max_waiting=max_waiting) as loaded:
            grammar.prepare(loaded.tokenizer)
            model_id, aliases = service.model_names(model)
            if gate.allowed_hosts is None and api_key is None:
                click.echo(
                    f"warning: whoever reaches {host}:{port} may use the model; --api-key asks for a key", err=True
                )
            click.echo(_greeting(loaded.name, host, listener.getsockname()[1], api_key is not None), err=True)
            run.Server(service.Service(loaded, gate, model_id, aliases)).serve_on(listener)


def _greeting(name: str, host: str, port: int, keyed: bool) -> str:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    body = '{"messages": [{"role": "user", "content": "What is 12 + 30?"}]}'
    return (
        f"{name} at {url}, interface at {url}/v1. Try:\n"
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )
