"""The tools of MCP servers, through the package mcp: servers started as commands, or reached over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from ..errors import ApiError
from ..fields import check_schema
from .errors import ToolError
from .packages import load_package
from .settings import McpServer, McpSettings

if TYPE_CHECKING:
    import mcp

MAX_TOOLS = 256  # of one server
MAX_DESCRIPTION_CHARS = 4096
STOP_S = 10.0
CONNECTION_CLOSED = -32000  # the code of mcp's error

log: logging.Logger = logging.getLogger(__name__)


class McpServers:
    """The servers of the [mcp] settings, each connected to at its first use, and those that requests name.

    Raises GptOssError if the package mcp is not installed. Close it in the end.
    """

    def __init__(self, settings: McpSettings) -> None:
        load_package("mcp", "mcp")
        self._settings = settings
        self._shared: dict[str, McpTools] = {}

    async def tools_of(self, servers: Sequence[McpServer]) -> list[McpTools]:
        """Connect to servers and list their tools. A server that cannot be reached has an error instead of tools."""
        connections = [self._connection(server) for server in servers]
        await asyncio.gather(*(connection.connect() for connection in connections))
        return connections

    def _connection(self, server: McpServer) -> McpTools:
        if self._settings.servers.get(server.label) is not server:
            return McpTools(server, self._settings.max_result_chars, private=True)
        if server.label not in self._shared:
            self._shared[server.label] = McpTools(server, self._settings.max_result_chars)
        return self._shared[server.label]

    async def close(self) -> None:
        """Close all connections; servers that were started end."""
        await asyncio.gather(*(connection.close() for connection in self._shared.values()))


class McpTools:
    """The connection to one MCP server.

    tools: {"name", "description", "input_schema", "annotations"} each. error: why there are none.
    private: whether one request alone uses it.
    """

    def __init__(self, server: McpServer, max_result_chars: int, private: bool = False) -> None:
        self.label = server.label
        self.tools: list[Mapping[str, Any]] = []
        self.error: str | None = None
        self._server = server
        self._max_chars = max_result_chars
        self._private = private
        self._lock = asyncio.Lock()
        self._client: mcp.Client | None = None
        self._holder: asyncio.Task[None] | None = None  # holds the connection open: it has to end in its own task
        self._stop = asyncio.Event()

    async def connect(self) -> None:
        """Connect, unless connected, and list the tools. Sets `error` if that fails."""
        async with self._lock:
            if self._client is not None:
                return
            self._stop, self.error = asyncio.Event(), None
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._holder = asyncio.ensure_future(self._hold(ready, self._stop))
            try:
                await asyncio.wait_for(asyncio.shield(ready), self._server.start_timeout_s)
            except asyncio.TimeoutError:
                self.error = f"no answer within {self._server.start_timeout_s:g} seconds"
            except Exception as error:
                self.error = _reason(error)
            except BaseException:
                await self._end()
                raise
            if self.error is not None:
                log.warning("the MCP server %s cannot be used: %s", self.label, self.error)
                await self._end()

    async def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, str | None]:
        """Call a tool. Returns its result as text, and the error if it reports one. Raises ToolError."""
        if self._client is None:
            await self.connect()
        if self._client is None:
            raise ToolError(f"the MCP server {self.label} cannot be reached: {self.error}")
        try:
            result = await asyncio.wait_for(self._client.call_tool(name, dict(arguments)), self._server.timeout_s)
        except asyncio.TimeoutError:
            raise ToolError(f"no result within {self._server.timeout_s:g} seconds") from None
        except Exception as error:
            code = error.code if isinstance(error, load_package("mcp", "mcp").MCPError) else CONNECTION_CLOSED
            if code == CONNECTION_CLOSED:
                await self.close()  # the next call makes a new connection
            raise ToolError(_reason(error)) from error
        text = _result_text(result)
        if len(text) > self._max_chars:
            text = f"{text[: self._max_chars]}\n[... {len(text)} characters in all, the rest is left out ...]"
        return text, (text[:1000] or "the tool failed") if result.is_error else None

    async def close_if_private(self) -> None:
        """Close a connection that one request alone uses."""
        if self._private:
            await self.close()

    async def close(self) -> None:
        """Close the connection."""
        async with self._lock:
            await self._end()

    async def _hold(self, ready: asyncio.Future[None], stop: asyncio.Event) -> None:
        """Open the connection, keep it until `stop`, and close it."""
        client_class: type[mcp.Client] = load_package("mcp", "mcp").Client
        try:
            async with AsyncExitStack() as stack:
                transport = await _transport(self._server, stack)
                timeout_s = max(self._server.start_timeout_s, self._server.timeout_s)
                client = await stack.enter_async_context(client_class(transport, read_timeout_seconds=timeout_s))
                self.tools = await _list_tools(client)
                self._client = client
                ready.set_result(None)
                await stop.wait()
        except Exception as error:
            if not ready.done():
                ready.set_exception(error)
            else:
                log.warning("the MCP server %s is lost: %s", self.label, _reason(error))
        finally:
            self._client = None
            if not ready.done():
                ready.cancel()

    async def _end(self) -> None:
        holder, self._holder, self._client = self._holder, None, None
        self._stop.set()
        if holder is None:
            return
        done, _ = await asyncio.wait({holder}, timeout=STOP_S)
        if not done:
            holder.cancel()
            await asyncio.wait({holder}, timeout=STOP_S)


async def _transport(server: McpServer, stack: AsyncExitStack) -> Any:
    """What mcp.Client connects through. stack: closes it."""
    package = load_package("mcp", "mcp")
    if server.command is not None:
        return package.StdioServerParameters(
            command=server.command, args=list(server.args), env=dict(server.env), cwd=server.cwd
        )
    assert server.url is not None
    http = load_package("mcp.client.streamable_http", "mcp")
    client = await stack.enter_async_context(http.create_mcp_http_client(headers=dict(server.headers)))
    return http.streamable_http_client(server.url, http_client=client)


async def _list_tools(client: mcp.Client) -> list[Mapping[str, Any]]:
    """The tools of a server, without those whose schemas are over the limits."""
    found: list[Mapping[str, Any]] = []
    cursor = None
    while len(found) < MAX_TOOLS:
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            try:
                check_schema(tool.input_schema, tool.name)
            except ApiError as error:
                log.warning("the MCP tool %s is left out: %s", tool.name, error)
                continue
            annotations = None if tool.annotations is None else tool.annotations.model_dump(exclude_none=True)
            found.append(
                {
                    "name": tool.name,
                    "description": (tool.description or "")[:MAX_DESCRIPTION_CHARS],
                    "input_schema": tool.input_schema,
                    "annotations": annotations,
                }
            )
        cursor = page.next_cursor
        if cursor is None:
            break
    return found[:MAX_TOOLS]


def without_titles(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema whose properties have no titles that only repeat their names, as pydantic makes them."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return schema
    plain = {}
    for name, value in properties.items():
        repeats = isinstance(value, Mapping) and value.get("title") == name.replace("_", " ").title()
        plain[name] = {key: one for key, one in value.items() if key != "title"} if repeats else value
    return {**schema, "properties": plain}


def _result_text(result: Any) -> str:
    """A result as text. What is not text is named."""
    pieces = []
    for block in result.content:
        if block.type == "text":
            pieces.append(block.text)
        elif block.type == "resource" and getattr(block.resource, "text", None) is not None:
            pieces.append(block.resource.text)
        elif block.type == "resource_link":
            pieces.append(f"{block.name}: {block.uri}")
        else:
            pieces.append(f"[{block.type} left out: the model reads text only]")
    if not pieces and result.structured_content is not None:
        pieces.append(json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(pieces)


def _reason(error: BaseException) -> str:
    """An error in one line; of a group, its first."""
    while getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
