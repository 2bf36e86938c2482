"""mlx-gptoss ps: what a running server does."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import click

from mlx_gptoss.errors import GptOssError

from . import config_file
from .options import JSON_OPTION, options

TIMEOUT_S = 10.0
MAX_BYTES = 4 << 20  # of one answer
METRIC = re.compile(r"mlx_gptoss_(\w+?)(?:\{[^}]*\})? (\S+)", re.ASCII)
COUNTS = ("running", "waiting", "prompt_tokens_total", "cached_tokens_total", "completion_tokens_total")


@click.command()
@click.option("--url", metavar="URL", help="The server. Default: by MLX_GPTOSS_HOST and _PORT, or port 8080 here.")
@click.option("--api-key", envvar="MLX_GPTOSS_API_KEY", metavar="K", help="The key of a server that needs one.")
@options((JSON_OPTION,))
def ps(url: str | None, api_key: str | None, as_json: bool) -> None:
    """Show the models of a running server, which of them are loaded, and its load."""
    base = (url or default_url()).rstrip("/")
    if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).hostname:
        raise click.UsageError(f"--url {base} must be like http://127.0.0.1:8080")
    health = _json(base, "/health", api_key, may_fail=True)
    loaded = {each["name"]: each for each in _objects(_json(base, "/api/ps", api_key), "models") if "name" in each}
    report = {
        "url": base,
        "status": str(health.get("status")),
        "models": [_model(each, loaded) for each in _objects(health, "models")],
        "load": _counts(_get(base, "/metrics", api_key)[1].decode("utf-8", "replace")),
    }
    click.echo(json.dumps(report)) if as_json else _print(report)


def default_url() -> str:
    """The address that serve would listen on, by its environment variables or the config file."""
    document = config_file.read()
    table = document.get("serve", {})
    settings = {**document, **(table if isinstance(table, Mapping) else {})}
    host = os.environ.get("MLX_GPTOSS_HOST") or str(settings.get("host", "127.0.0.1"))
    port = os.environ.get("MLX_GPTOSS_PORT") or str(settings.get("port", 8080))
    try:
        address = ipaddress.ip_address(host)
        loopback = "::1" if address.version == 6 else "127.0.0.1"
        host = loopback if address.is_unspecified else host
        return f"http://{f'[{host}]' if address.version == 6 else host}:{port}"
    except ValueError:  # a name
        return f"http://{host}:{port}"


def _model(about: Mapping[str, Any], loaded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    name = str(about.get("id"))
    more = loaded.get(name) or loaded.get(f"{name}:latest") or {}
    details = more.get("details")
    return {
        "name": name,
        "state": about.get("state"),
        "pid": about.get("pid"),
        "memory_bytes": more.get("size"),
        "context": more.get("context_length"),
        "format": details.get("quantization_level") if isinstance(details, Mapping) else None,
        "expires_at": more.get("expires_at"),
    }


def _counts(text: str) -> dict[str, int]:
    """The values of COUNTS in Prometheus's text format, each summed over its labels."""
    sums = dict.fromkeys(COUNTS, 0)
    for line in text.splitlines():
        match = METRIC.fullmatch(line)
        if match and match[1] in sums:
            try:
                sums[match[1]] += int(float(match[2]))
            except (ValueError, OverflowError):
                continue
    return {name.removesuffix("_total"): value for name, value in sums.items()}


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = document.get(key)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _json(base: str, path: str, api_key: str | None, may_fail: bool = False) -> dict[str, Any]:
    status, body = _get(base, path, api_key)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or (status != 200 and not (may_fail and "status" in document)):
        if status in (401, 403):
            raise GptOssError(f"the server at {base} wants a key: give --api-key or set MLX_GPTOSS_API_KEY")
        raise GptOssError(f"{base}{path} answered {status}, not as a server of mlx-gptoss does; check the --url")
    return document


def _get(base: str, path: str, api_key: str | None) -> tuple[int, bytes]:
    """Status and body. A proxy of the environment is not asked for a server on this machine."""
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import ProxyHandler, Request, build_opener

    request = Request(base + path, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    local = urlsplit(base).hostname in ("127.0.0.1", "::1", "localhost")
    opener = build_opener(ProxyHandler({})) if local else build_opener()
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            return response.status, response.read(MAX_BYTES)
    except HTTPError as error:
        return error.code, error.read(MAX_BYTES)
    except (URLError, OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise GptOssError(
            f"no server answers at {base} ({reason}); start one with `mlx-gptoss serve`, or give its address by --url"
        ) from error


def _print(report: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from mlx_gptoss.loading.memory import gigabytes

    from .terminal import new_console

    console, load = new_console(highlight=False), report["load"]
    console.print(
        f"[bold]{escape(report['url'])}[/bold]: {escape(report['status'])}; {load['running']} requests running, "
        f"{load['waiting']} waiting; {load['prompt_tokens']} prompt tokens ({load['cached_tokens']} cached), "
        f"{load['completion_tokens']} generated so far"
    )
    table = Table(box=None, header_style="bold")
    table.add_column("model", overflow="fold")
    for column in ("state", "format", "memory", "context", "process"):
        table.add_column(column, no_wrap=True)
    for model in report["models"]:
        memory = gigabytes(model["memory_bytes"]) if isinstance(model["memory_bytes"], int) else ""
        cells = (model["state"], model["format"], memory, model["context"], model["pid"])
        table.add_row(*(escape(str(cell)) if cell not in (None, "") else "-" for cell in (model["name"], *cells)))
    console.print(table)
