"""Output items of calls that the server runs: web_search_call, code_interpreter_call, mcp_call, and lists of tools."""

from __future__ import annotations

from typing import Any

from ..hosted.events import ApprovalRequest, HostedCall, HostedCallDelta, HostedResult, ToolList
from ..hosted.items import ARGUMENT_EVENTS, ITEM_TYPES, hosted_item
from .output_items import Emit, Events, OutputItem


class HostedCallOutput(OutputItem):
    """A call in progress. The model writes it (append), then it runs (run), then there is a result (finish)."""

    def __init__(self, opening: HostedCallDelta | HostedCall) -> None:
        self.type = ITEM_TYPES[opening.tool]
        super().__init__()
        self.call_id: str = opening.id
        self._event: HostedCallDelta | HostedCall | HostedResult = opening

    def begin(self, emit: Emit) -> Events:
        """The events after response.output_item.added."""
        yield emit(f"response.{self.type}.in_progress")

    def append(self, text: str, emit: Emit) -> Events:
        """More of the arguments."""
        if text and self.type in ARGUMENT_EVENTS:
            yield emit(f"{ARGUMENT_EVENTS[self.type][0]}.delta", delta=text)

    def run(self, call: HostedCall, emit: Emit) -> Events:
        """The call is complete, and runs now."""
        self._event = call
        if self.type in ARGUMENT_EVENTS:
            name, field = ARGUMENT_EVENTS[self.type]
            yield emit(f"{name}.done", **{field: call.arguments})
        if self.type == "web_search_call":
            yield emit("response.web_search_call.searching")
        elif self.type == "code_interpreter_call":
            yield emit("response.code_interpreter_call.interpreting")

    def finish(self, result: HostedResult) -> None:
        """The call has a result. The item can be closed."""
        self._event = result

    def end(self, emit: Emit) -> Events:
        """The events before response.output_item.done."""
        if isinstance(self._event, HostedResult):
            failed = self.type == "mcp_call" and self._event.error is not None
            yield emit(f"response.{self.type}.{'failed' if failed else 'completed'}")

    def to_object(self, status: str) -> dict[str, Any]:
        """The item as a JSON object. Its own status counts once it has run."""
        item = hosted_item(self._event)
        status = item["status"] if isinstance(self._event, HostedResult) else status
        return {"id": self.id, **item, "status": status}


class ToolListOutput(OutputItem):
    """What an MCP server offers."""

    type = "mcp_list_tools"

    def __init__(self, tools: ToolList) -> None:
        super().__init__()
        self._tools = tools

    def begin(self, emit: Emit) -> Events:
        """The events after response.output_item.added."""
        yield emit("response.mcp_list_tools.in_progress")

    def end(self, emit: Emit) -> Events:
        """The events before response.output_item.done."""
        yield emit(f"response.mcp_list_tools.{'completed' if self._tools.error is None else 'failed'}")

    def to_object(self, status: str) -> dict[str, Any]:
        """The item as a JSON object."""
        return {"id": self.id, **hosted_item(self._tools)}


class ApprovalOutput(OutputItem):
    """A call of an MCP tool that the client has to approve."""

    type = "mcp_approval_request"

    def __init__(self, request: ApprovalRequest) -> None:
        super().__init__()
        self._request = request

    def to_object(self, status: str) -> dict[str, Any]:
        """The item as a JSON object."""
        return {"id": self.id, **hosted_item(self._request)}
