"""From the tools of a request to the tools that this server runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ...harmony.messages import BuiltinTool
from ..errors import ApiError, invalid_field
from .settings import HostedSettings, McpServer

BROWSER_TYPES = (
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
    "browser_search",
    "browser",
)
PYTHON_TYPES = ("code_interpreter", "python")
CLIENT_TYPES = ("function", "custom", "namespace")  # the client runs these
MAX_MCP_SERVERS = 16  # in one request
MAX_HEADERS = 32
MAX_TEXT = 8192  # characters of a URL or a header


@dataclass(frozen=True)
class McpChoice:
    """An MCP server for one request.

    allowed: names of the tools to declare; None for all. approval: whether calls need the client's approval, for all
    tools (True, False) or by name; tools that are not named need it.
    """

    server: McpServer
    allowed: frozenset[str] | None = None
    needs_approval: bool = True
    no_approval: frozenset[str] = frozenset()
    approval: frozenset[str] = frozenset()

    def must_approve(self, tool: str) -> bool:
        """Whether the client wants to approve calls of this tool."""
        return tool in self.approval or (self.needs_approval and tool not in self.no_approval)


@dataclass(frozen=True)
class Selection:
    """The tools of one request, sorted.

    builtin: gpt-oss's own tools that the server runs. mcp: MCP servers. container: the id of a python session to go on
    with. client_tools: tools that the client runs, unchanged. left_out: names of the kinds that are not served, for
    ignored.ignore(), such as "tools[].image_generation".
    """

    builtin: tuple[BuiltinTool, ...] = ()
    mcp: tuple[McpChoice, ...] = ()
    container: str | None = None
    client_tools: tuple[Mapping[str, Any], ...] = ()
    left_out: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.builtin or self.mcp)


@dataclass
class _Sorter:
    settings: HostedSettings | None
    builtin: list[BuiltinTool] = field(default_factory=list)
    mcp: dict[str, McpChoice] = field(default_factory=dict)
    container: str | None = None
    client_tools: list[Mapping[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, tool: Mapping[str, Any], index: int) -> None:
        kind, settings = tool.get("type"), self.settings
        if kind in CLIENT_TYPES or not isinstance(kind, str):
            self.client_tools.append(tool)
        elif kind in BROWSER_TYPES and settings is not None and settings.browser is not None:
            self.builtin.append("browser")
        elif kind in PYTHON_TYPES and settings is not None and settings.python is not None:
            self.builtin.append("python")
            container = tool.get("container")
            self.container = container if isinstance(container, str) else self.container
        elif kind == "mcp" and settings is not None and settings.mcp is not None:
            choice = _mcp_choice(tool, f"tools[{index}]", settings)
            if choice.server.label in self.mcp:
                raise invalid_field(f"tools[{index}].server_label", f"is {choice.server.label!r} a second time")
            self.mcp[choice.server.label] = choice
            if len(self.mcp) > MAX_MCP_SERVERS:
                raise invalid_field("tools", f"names more than {MAX_MCP_SERVERS} MCP servers")
        else:
            self.left_out.append(f"tools[].{kind[:40]}")


def hosted_tools_of(tools: Sequence[Mapping[str, Any]] | None, settings: HostedSettings | None) -> Selection:
    """Sort the tools of a request into those that this server runs, those that the client runs, and the others.

    A function of the client that is called as a built-in tool ("python", "browser.search") takes that tool's place.
    Raises ApiError 400 for an MCP server that is not configured or whose URL is not allowed, and for wrong types.
    """
    sorter = _Sorter(settings)
    for index, tool in enumerate(tools or ()):
        sorter.add(tool, index)
    names = {_function_name(tool) for tool in sorter.client_tools}
    shadowed = {name for name in sorter.builtin if any(n == name or n.startswith(f"{name}.") for n in names)}
    return Selection(
        tuple(dict.fromkeys(name for name in sorter.builtin if name not in shadowed)),
        tuple(sorter.mcp.values()),
        sorter.container,
        tuple(sorter.client_tools),
        (*dict.fromkeys(sorter.left_out), *(f"tools[].{name}" for name in sorted(shadowed))),
    )


def _function_name(tool: Mapping[str, Any]) -> str:
    inner = tool.get("function")
    name = inner.get("name") if isinstance(inner, Mapping) else tool.get("name")
    return name if isinstance(name, str) else ""


def _mcp_choice(tool: Mapping[str, Any], param: str, settings: HostedSettings) -> McpChoice:
    """Read one tool of the type mcp."""
    assert settings.mcp is not None
    label, url = tool.get("server_label"), tool.get("server_url")
    if not isinstance(label, str) or not label or len(label) > 64:
        raise invalid_field(f"{param}.server_label", "must be a string of 1 to 64 characters")
    if url is None:
        server = settings.mcp.servers.get(label)
        if server is None:
            known = ", ".join(sorted(settings.mcp.servers)) or "none"
            raise invalid_field(f"{param}.server_label", f"is {label!r}; the MCP servers configured here are: {known}")
    else:
        server = McpServer(label, url=_allowed_url(url, param, settings.mcp.allow_urls), headers=_headers(tool, param))
    return McpChoice(server, _names(tool.get("allowed_tools"), f"{param}.allowed_tools"), **_approval(tool, param))


def _allowed_url(url: Any, param: str, prefixes: Sequence[str]) -> str:
    if not isinstance(url, str) or len(url) > MAX_TEXT:
        raise invalid_field(f"{param}.server_url", f"must be a string of at most {MAX_TEXT} characters")
    if not any(url_has_prefix(url, prefix) for prefix in prefixes):
        raise ApiError(
            400,
            f"{param}.server_url is not allowed: the server's operator has to list it in allow_urls",
            param=f"{param}.server_url",
            code="mcp_url_not_allowed",
        )
    return url


def url_has_prefix(url: str, prefix: str) -> bool:
    """Whether a URL lies under a prefix: the same scheme, host and port, and a path below the prefix's."""
    try:
        one, other = urlsplit(url), urlsplit(prefix)
        same = (one.scheme, one.hostname, one.port) == (other.scheme, other.hostname, other.port)
    except ValueError:
        return False
    plain = one.scheme in ("http", "https") and one.hostname and one.username is None and one.password is None
    folder = other.path if other.path.endswith("/") else f"{other.path}/"
    steps = one.path.lower().replace("%2e", ".").replace("\\", "/").split("/")
    below = one.path == other.path or one.path.startswith(folder)
    return bool(same and plain and below and ".." not in steps and "." not in steps)


def _headers(tool: Mapping[str, Any], param: str) -> dict[str, str]:
    headers = tool.get("headers") or {}
    if tool.get("authorization") is not None:
        headers = {**headers, "Authorization": f"Bearer {tool['authorization']}"} if type(headers) is dict else headers
    texts = [*headers, *headers.values()] if type(headers) is dict else [None]
    good = all(
        isinstance(text, str) and text.isascii() and text.isprintable() and len(text) <= MAX_TEXT for text in texts
    )
    if not good or len(headers) > MAX_HEADERS:
        raise invalid_field(f"{param}.headers", f"must be an object of at most {MAX_HEADERS} printable ASCII strings")
    return dict(headers)


def _names(value: Any, param: str) -> frozenset[str] | None:
    """A list of tool names, or {"tool_names": [...]}; None stays None."""
    names = value.get("tool_names") if isinstance(value, Mapping) else value
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise invalid_field(param, "must be a list of tool names")
    return frozenset(names)


def _approval(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    value = tool.get("require_approval")
    if value in (None, "always", "never"):
        return {"needs_approval": value != "never"}
    if not isinstance(value, Mapping):
        raise invalid_field(f"{param}.require_approval", "must be 'always', 'never' or an object of the two")
    always = _names(value.get("always"), f"{param}.require_approval.always")
    never = _names(value.get("never"), f"{param}.require_approval.never")
    return {"needs_approval": True, "no_approval": never or frozenset(), "approval": always or frozenset()}
