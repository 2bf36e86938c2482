"""The state of the tools: one HostedTools for the server, one Session for a response, one State for a conversation."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...chat.reply import ToolCall
from ...harmony.builtin import BUILTIN_TOOLS
from ...harmony.messages import Conversation, Function
from ..errors import invalid_field
from .browser import BrowserSession
from .errors import ToolError
from .events import HostedCall, HostedResult, HostedTool, ToolList
from .fetch import Fetcher
from .mcp_servers import McpServers, McpTools, without_titles
from .python_session import PythonSessions
from .search import SearchEngine
from .selection import McpChoice, Selection
from .settings import HostedSettings

MAX_ERROR_CHARS = 1000
log: logging.Logger = logging.getLogger(__name__)


@dataclass
class State:
    """What a conversation keeps between its responses. container_id: its python session, once there is one."""

    browser: BrowserSession | None = None
    container_id: str | None = None


@dataclass(frozen=True)
class Owner:
    """What runs the calls of a function. name: the tool's own."""

    tool: HostedTool
    name: str
    server_label: str | None = None
    mcp: McpTools | None = field(default=None, compare=False)


class HostedTools:
    """The tools of one server. Make it before the server starts, and close() it in the end.

    settings: what is switched on. count_tokens: the tokens of a text, for the size of what the browser shows; until it
    is set, a token is four characters.

    Raises GptOssError if a package is missing, or if python is on and no sandbox works here.
    """

    def __init__(self, settings: HostedSettings) -> None:
        self.settings = settings
        self.count_tokens: Callable[[str], int] = lambda text: -(-len(text) // 4)
        self._states: OrderedDict[str, State] = OrderedDict()
        self._fetcher = None if settings.browser is None else Fetcher(settings.browser)
        self._engine = None if settings.browser is None else SearchEngine(settings.browser)
        self.python: PythonSessions | None = None if settings.python is None else PythonSessions(settings.python)
        self._mcp = None if settings.mcp is None else McpServers(settings.mcp)
        self._closing: set[asyncio.Task[None]] = set()

    def requestable(self) -> list[dict[str, Any]]:
        """The tools as a request of the Responses endpoint names them, without a need for approval."""
        found: list[dict[str, Any]] = []
        if self.settings.browser is not None:
            found.append({"type": "web_search"})
        if self.settings.python is not None:
            found.append({"type": "code_interpreter", "container": {"type": "auto"}})
        servers = self.settings.mcp.servers if self.settings.mcp is not None else {}
        return found + [{"type": "mcp", "server_label": label, "require_approval": "never"} for label in servers]

    async def session(
        self,
        selection: Selection,
        *,
        previous: str | None = None,
        client_names: Sequence[str] = (),
    ) -> Session:
        """The tools of one response. MCP servers are asked for their tools here.

        previous: the id under which the conversation's state was kept. client_names: the client's functions.
        Raises ApiError 400 if the request names a container that has ended.
        """
        kept = self._states.get(previous) if previous is not None else None
        state = State() if kept is None else replace(kept, browser=kept.browser and kept.browser.copy())
        if selection.container is not None:
            if self.python is None or not self.python.exists(selection.container):
                raise invalid_field("tools", f"name the container {selection.container!r}, which has ended")
            state.container_id = selection.container
        session = Session(self, selection, state, frozenset(client_names))
        if "browser" in selection.builtin and state.browser is None:
            assert self._fetcher is not None and self._engine is not None and self.settings.browser is not None
            state.browser = BrowserSession(
                self._fetcher, self._engine, self.count_tokens, self.settings.browser.view_tokens
            )
        if selection.mcp:
            assert self._mcp is not None
            session.add_mcp(await self._mcp.tools_of([choice.server for choice in selection.mcp]))
        return session

    def keep(self, id: str, session: Session) -> None:
        """Keep the conversation's state for a later session(previous=id). The least recently kept one goes first."""
        self._states[id] = session.state
        self._states.move_to_end(id)
        while len(self._states) > self.settings.max_conversations:
            self._states.popitem(last=False)

    def forget(self, id: str) -> None:
        """Drop what was kept under this id."""
        self._states.pop(id, None)

    def release(self, connections: Sequence[McpTools]) -> None:
        """Close connections that were made for one request."""
        for tools in connections:
            task = asyncio.ensure_future(tools.close_if_private())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """End every process and connection."""
        if self.python is not None:
            await self.python.close()
        if self._mcp is not None:
            await self._mcp.close()
        if self._fetcher is not None and self._engine is not None:
            await self._fetcher.close()
            await self._engine.close()
        await asyncio.gather(*self._closing, return_exceptions=True)


class Session:
    """The tools of one response.

    browser: its browser, or None. tool_lists: what the MCP servers offer, to be shown first. state: for keep().
    """

    def __init__(self, hosted: HostedTools, selection: Selection, state: State, client_names: frozenset[str]) -> None:
        self._hosted = hosted
        self._selection = selection
        self.state = state
        self._client_names = client_names
        self._owners: dict[str, Owner] = {}  # the names of functions that MCP servers run
        self._functions: list[Function] = []
        self._connections: list[McpTools] = []
        self.tool_lists: list[ToolList] = []

    @property
    def browser(self) -> BrowserSession | None:
        """The browser, if the request has it."""
        return self.state.browser if "browser" in self._selection.builtin else None

    @property
    def max_tool_calls(self) -> int:
        """The limit for a request that sets none."""
        return self._hosted.settings.max_tool_calls

    @property
    def has_client_tools(self) -> bool:
        """Whether the client has functions, which may be called when no tool of the server may be."""
        return bool(self._client_names)

    def add_mcp(self, connections: Sequence[McpTools]) -> None:
        """Declare the tools of MCP servers, as functions named LABEL__TOOL."""
        self._connections += connections
        for tools in connections:
            choice = self._choice(tools.label)
            listed = [tool for tool in tools.tools if choice.allowed is None or tool["name"] in choice.allowed]
            self.tool_lists.append(ToolList(tools.label, listed, tools.error))
            for tool in listed:
                name = f"{tools.label}__{tool['name']}"
                while name in self._owners or name in self._client_names:
                    name += "_"
                self._owners[name] = Owner("mcp", tool["name"], tools.label, tools)
                self._functions.append(Function(name, tool["description"], without_titles(tool["input_schema"])))

    def declare(self, conversation: Conversation) -> Conversation:
        """The conversation with the declarations of these tools."""
        builtin = tuple(dict.fromkeys((*conversation.builtin_tools, *self._selection.builtin)))
        texts = dict(conversation.tool_texts)
        if "python" in self._selection.builtin:
            assert self._hosted.python is not None
            texts["python"] = self._hosted.python.describe(BUILTIN_TOOLS["python"].description)
        functions = (*conversation.functions, *self._functions)
        return replace(conversation, builtin_tools=builtin, functions=functions, tool_texts=tuple(texts.items()))

    def tool_choice(self, choice: str | Mapping[str, Any]) -> Any:
        """A request's tool_choice for the model. An MCP tool has another name there; others cannot be forced."""
        if isinstance(choice, str):
            callable = self._client_names or self._functions
            return "auto" if choice == "required" and not callable else choice
        kind = choice.get("type")
        if kind == "mcp" and choice.get("name") is not None:
            for name, owner in self._owners.items():
                if (owner.server_label, owner.name) == (choice.get("server_label"), choice["name"]):
                    return {"type": "function", "name": name}
        return choice if kind in ("function", "custom", "allowed_tools") else "auto"

    def owner(self, name: str) -> Owner | None:
        """What runs the calls of this function; None for the client."""
        if name in self._owners:
            return self._owners[name]
        tool = name.split(".")[0]  # a client's function of that name has taken the tool's place (selection.py)
        found = next((builtin for builtin in self._selection.builtin if builtin == tool), None)
        return None if found is None else Owner(found, name)

    def hosted_call(self, call: ToolCall) -> HostedCall:
        """A call of one of these tools, with what the client is told of it."""
        owner = self.owner(call.name)
        assert owner is not None
        action = container = None
        if owner.tool == "browser" and self.browser is not None:
            action = self.browser.action(owner.name, call.arguments)
        if owner.tool == "python":
            container = self.container_id()
        return HostedCall(call.id, owner.tool, owner.name, call.arguments, owner.server_label, action, container)

    def approved_call(self, id: str, server_label: str, name: str, arguments: str) -> ToolCall:
        """The call of an MCP tool that the client has approved, for HostedReply.start(approved=).

        Raises ApiError 400 if the request does not have that tool.
        """
        for function, owner in self._owners.items():
            if (owner.server_label, owner.name) == (server_label, name):
                return ToolCall(id, function, arguments)
        self.release()
        raise invalid_field("tools", f"do not have the approved tool {name!r:.100} of {server_label!r:.100}")

    def must_approve(self, call: HostedCall | Owner) -> bool:
        """Whether the client wants to approve the call before it runs."""
        return call.server_label is not None and self._choice(call.server_label).must_approve(call.name)

    async def run(self, call: HostedCall) -> HostedResult:
        """Run a call. An error becomes its result, for the model to see."""
        try:
            if call.tool == "browser":
                assert self.browser is not None
                text, sources = await self.browser.run(call.name, call.arguments)
                return HostedResult(call, text, sources=sources)
            if call.tool == "python":
                assert self._hosted.python is not None and call.container_id is not None
                output = await self._hosted.python.run(call.container_id, call.arguments)
                return HostedResult(call, output.text, output.error)
            return await self._run_mcp(call)
        except ToolError as error:
            text = str(error)[:MAX_ERROR_CHARS]
            return HostedResult(call, f"error: {text}" if call.tool == "mcp" else text, text)
        except Exception as error:  # one call fails, not the response
            log.error("a call of %s failed", call.name, exc_info=error)
            text = f"error: the tool failed ({type(error).__name__})"
            return HostedResult(call, text, text)

    async def _run_mcp(self, call: HostedCall) -> HostedResult:
        tools = next(tools for tools in self._connections if tools.label == call.server_label)
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ToolError(f"the arguments are not JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise ToolError("the arguments must be a JSON object")
        return HostedResult(call, *await tools.call(call.name, arguments))

    def release(self) -> None:
        """Close what was opened for this response alone."""
        self._hosted.release(self._connections)
        self._connections = []

    def _choice(self, label: str) -> McpChoice:
        return next(choice for choice in self._selection.mcp if choice.server.label == label)

    def container_id(self) -> str:
        """The conversation's python session, a new one if it has ended."""
        assert self._hosted.python is not None
        if self.state.container_id is None or not self._hosted.python.exists(self.state.container_id):
            self.state.container_id = self._hosted.python.new_session()
        return self.state.container_id
