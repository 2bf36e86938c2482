"""The settings of the tools that the server runs, and the TOML file that they come from (--tools-config)."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from ...errors import GptOssError

TOOLS = ("browser", "python", "mcp")
Sandbox = Literal["auto", "bubblewrap", "namespaces", "sandbox-exec", "none"]
SearchBackend = Literal["searxng", "exa", "brave"]
KEY_VARIABLES = {"exa": "EXA_API_KEY", "brave": "BRAVE_API_KEY"}

Settings = TypeVar("Settings")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class BrowserSettings:
    """[browser] of the file.

    search: the search engine. url: its address; required for searxng. key, key_env: its key, or the environment
    variable that holds it (by default EXA_API_KEY or BRAVE_API_KEY).
    allow_addresses: networks outside the public internet that pages may be fetched from, such as "10.0.0.0/8".
    timeout_s: limit on one search or page. max_page_bytes: what is read of a page, decompressed.
    max_results: results of a search. view_tokens: tokens of a page that the model is shown at once.
    """

    search: SearchBackend
    url: str | None = None
    key: str | None = None
    key_env: str | None = None
    allow_addresses: tuple[str, ...] = ()
    timeout_s: float = 20.0
    max_page_bytes: int = 5_000_000
    max_results: int = 10
    view_tokens: int = 1024

    @property
    def networks(self) -> tuple[Network, ...]:
        """allow_addresses as networks."""
        return tuple(ipaddress.ip_network(text) for text in self.allow_addresses)


@dataclass(frozen=True)
class PythonSettings:
    """[python] of the file.

    sandbox: how the code is confined; "auto" takes what works here, "none" runs it unconfined. interpreter: the Python
    that runs it, by default the server's own.
    timeout_s: wall-clock limit of a call. memory_mb: of all processes of a session together. disk_mb: of its files.
    max_processes: processes and threads of a session. max_output_chars: output that the model is shown of one call.
    max_sessions: sessions at once. idle_s: seconds after which an unused session ends.
    """

    sandbox: Sandbox = "auto"
    interpreter: str | None = None
    timeout_s: float = 120.0
    memory_mb: int = 2048
    disk_mb: int = 256
    max_processes: int = 64
    max_output_chars: int = 20_000
    max_sessions: int = 8
    idle_s: float = 1200.0


@dataclass(frozen=True)
class McpServer:
    """One [mcp.servers.LABEL] of the file: a command to start, or a URL (streamable HTTP).

    env: variables for the command besides PATH, HOME and their like. start_timeout_s: limit on starting or connecting,
    and listing the tools. timeout_s: limit on one call.
    """

    label: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 60.0
    timeout_s: float = 60.0


@dataclass(frozen=True)
class McpSettings:
    """[mcp] of the file.

    servers: by label. allow_urls: URL prefixes that requests may name in server_url; none by default.
    max_result_chars: what the model is shown of one result.
    """

    servers: Mapping[str, McpServer] = field(default_factory=dict)
    allow_urls: tuple[str, ...] = ()
    max_result_chars: int = 20_000


@dataclass(frozen=True)
class HostedSettings:
    """What is switched on: None for a tool that is off.

    max_tool_calls: calls in one response, if the request does not set its own limit.
    max_conversations: conversations whose state is kept.
    """

    browser: BrowserSettings | None = None
    python: PythonSettings | None = None
    mcp: McpSettings | None = None
    max_tool_calls: int = 32
    max_conversations: int = 200


def load_settings(names: Sequence[str], path: Path | None = None) -> HostedSettings | None:
    """Read the settings of the tools that --tools names; None if it names none.

    Raises GptOssError for an unknown tool, a file that cannot be read, an unknown or wrong entry, and a missing key.
    """
    unknown = [name for name in names if name not in TOOLS]
    if unknown:
        raise GptOssError(f"--tools: there is no tool {unknown[0]!r}; choose from {', '.join(TOOLS)}")
    if not names:
        return None
    table = _read_toml(path) if path is not None else {}
    extra = [name for name in table if name not in (*TOOLS, "max_tool_calls", "max_conversations")]
    if extra:
        raise GptOssError(f"{path}: unknown entry {extra[0]!r}; the tables are {', '.join(TOOLS)}")
    general = {name: value for name, value in table.items() if name not in TOOLS}
    parts = {
        "browser": _browser(_table(table, "browser", path), path) if "browser" in names else None,
        "python": _fill(PythonSettings, _table(table, "python", path), "python", path) if "python" in names else None,
        "mcp": _mcp(_table(table, "mcp", path), path) if "mcp" in names else None,
    }
    return _fill(HostedSettings, general, "", path, **parts)


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        from tomllib import loads
    else:
        from tomli import loads
    try:
        table: dict[str, Any] = loads(path.read_text("utf-8"))
        return table
    except (OSError, ValueError) as error:
        raise GptOssError(f"--tools-config: cannot read {path}: {error}") from error


def _table(table: Mapping[str, Any], name: str, path: Path | None) -> dict[str, Any]:
    value = table.get(name, {})
    if not isinstance(value, dict):
        raise GptOssError(f"{path}: {name} must be a table: write [{name}]")
    return value


def _browser(table: dict[str, Any], path: Path | None) -> BrowserSettings:
    if "search" not in table:
        raise GptOssError(
            'the tool browser needs a search engine: give --tools-config a file with [browser] and search = "searxng", '
            '"exa" or "brave"'
        )
    settings = _fill(BrowserSettings, table, "browser", path)
    variable = settings.key_env or KEY_VARIABLES.get(settings.search)
    key = settings.key or (os.environ.get(variable) if variable else None)
    if settings.search == "searxng" and settings.url is None:
        raise GptOssError(f'{path}: browser: searxng needs its address, such as url = "http://127.0.0.1:8888"')
    if settings.url is not None and not _is_http_url(settings.url):
        raise GptOssError(f"{path}: browser: url is {settings.url!r}; it must begin with http:// or https://")
    if settings.search in KEY_VARIABLES and not key:
        raise GptOssError(f"{path}: browser: {settings.search} needs a key: set key, or the variable {variable}")
    try:
        _ = settings.networks
    except ValueError as error:
        raise GptOssError(f"{path}: browser: allow_addresses: {error}; write networks such as 10.0.0.0/8") from error
    return _fill(BrowserSettings, {**table, "key": key} if key else table, "browser", path)


def _mcp(table: dict[str, Any], path: Path | None) -> McpSettings:
    servers = _table(table, "servers", path)
    rest = {name: value for name, value in table.items() if name != "servers"}
    found = {}
    for label in servers:
        where = f"mcp.servers.{label}"
        server = _fill(McpServer, _table(servers, label, path), where, path, label=label)
        if (server.command is None) == (server.url is None):
            raise GptOssError(f"{path}: {where}: give either a command or a url")
        if server.url is not None and not _is_http_url(server.url):
            raise GptOssError(f"{path}: {where}: url is {server.url!r}; it must begin with http:// or https://")
        found[label] = server
    settings = _fill(McpSettings, rest, "mcp", path, servers=found)
    for prefix in settings.allow_urls:
        if not _is_http_url(prefix):
            raise GptOssError(f"{path}: mcp: allow_urls has {prefix!r}; it must begin with http:// or https://")
    if not found and not settings.allow_urls:
        raise GptOssError("the tool mcp needs servers: give --tools-config a file with [mcp.servers.LABEL] tables")
    return settings


def _is_http_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _fill(kind: type[Settings], table: Mapping[str, Any], where: str, path: Path | None, **given: Any) -> Settings:
    """Make a settings object of a table. Raises GptOssError for an entry that is unknown, missing or wrong."""
    known = {one.name: one for one in fields(kind) if one.name not in given}  # type: ignore[arg-type]
    prefix = f"{path}: {where}: " if where else f"{path}: "
    for name, value in table.items():
        if name not in known:
            raise GptOssError(f"{prefix}unknown entry {name!r}; it has {', '.join(known)}")
        given[name] = _checked(value, str(known[name].type), f"{prefix}{name}")
    for name, one in known.items():
        if name not in table and one.default is MISSING and one.default_factory is MISSING:
            raise GptOssError(f"{prefix}{name} is missing")
    return kind(**given)


def _checked(value: Any, hint: str, where: str) -> Any:
    """The value, if it fits the type hint of its field."""
    choices = {"Sandbox": get_args(Sandbox), "SearchBackend": get_args(SearchBackend)}.get(hint)
    if choices is not None:
        if value not in choices:
            raise GptOssError(f"{where} is {value!r}; choose from {', '.join(choices)}")
        return value
    if hint in ("int", "float"):
        if isinstance(value, bool) or not isinstance(value, int if hint == "int" else (int, float)) or not value > 0:
            raise GptOssError(f"{where} is {value!r}; it must be a {'whole ' if hint == 'int' else ''}number above 0")
        return value
    if hint.startswith("tuple"):
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise GptOssError(f"{where} must be a list of strings")
        return tuple(value)
    if hint.startswith("Mapping"):
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise GptOssError(f"{where} must be a table of strings")
        return value
    if not isinstance(value, str) or not value:
        raise GptOssError(f"{where} must be a string that is not empty")
    return value
