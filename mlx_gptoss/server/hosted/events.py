"""Events of the tools that the server runs, in addition to the model's own events (chat/reply.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...chat.reply import Event

HostedTool = Literal["browser", "python", "mcp"]


@dataclass(frozen=True)
class HostedCallDelta:
    """More of the arguments of a call, as the model writes them. The first one, perhaps empty, opens the call.

    tool: what runs it. name: "browser.search", "browser.open", "browser.find", "python", or the MCP tool's own name.
    server_label: the MCP server, or None. container_id: as in HostedCall.
    """

    id: str
    tool: HostedTool
    name: str
    text: str
    server_label: str | None = None
    container_id: str | None = None


@dataclass(frozen=True)
class HostedCall:
    """A complete call. Its HostedResult follows when it has run, or an ApprovalRequest in its place.

    arguments: as the model wrote them: JSON, or the code for "python".
    action: for the browser, what it is about to do, in the words of OpenAI's web_search_call: {"type": "search",
        "query"}, {"type": "open_page", "url"} or {"type": "find_in_page", "url", "pattern"}.
    container_id: for python, the session that it runs in.
    """

    id: str
    tool: HostedTool
    name: str
    arguments: str
    server_label: str | None = None
    action: Mapping[str, Any] | None = None
    container_id: str | None = None


@dataclass(frozen=True)
class HostedResult:
    """The result of a call.

    text: what the model is given. error: why the call failed; None if it did not.
    sources: for a search, the URLs that were found.
    """

    call: HostedCall
    text: str
    error: str | None = None
    sources: Sequence[str] = ()


@dataclass(frozen=True)
class ApprovalRequest:
    """A call that the client wants to approve first (require_approval). The turn ends with it, and it has not run."""

    call: HostedCall


@dataclass(frozen=True)
class ToolList:
    """The tools of an MCP server that the model may call. These events come first.

    tools: {"name", "description", "input_schema", "annotations"} each, as items of the type mcp_list_tools have them.
    error: why the server could not be reached; its tools are then missing.
    """

    server_label: str
    tools: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    error: str | None = None


@dataclass(frozen=True)
class Citation:
    """A citation in the text of the message so far, whose TextDelta precedes it.

    start_index, end_index: the characters of the message's text that are the citation (end excluded).
    """

    start_index: int
    end_index: int
    url: str
    title: str


HostedEvent = HostedCallDelta | HostedCall | HostedResult | ApprovalRequest | ToolList | Citation
AnyEvent = Event | HostedEvent
