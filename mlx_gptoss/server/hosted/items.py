"""Calls of hosted tools as items of the Responses API."""

from __future__ import annotations

from typing import Any

from .events import ApprovalRequest, Citation, HostedCall, HostedCallDelta, HostedResult, ToolList

ITEM_TYPES = {"browser": "web_search_call", "python": "code_interpreter_call", "mcp": "mcp_call"}
ID_PREFIXES = {
    "web_search_call": "ws",
    "code_interpreter_call": "ci",
    "mcp_call": "mcp",
    "mcp_list_tools": "mcpl",
    "mcp_approval_request": "mcpr",
}
# The events that carry the arguments, without ".delta" and ".done", and the field of the latter.
ARGUMENT_EVENTS = {
    "code_interpreter_call": ("response.code_interpreter_call_code", "code"),
    "mcp_call": ("response.mcp_call_arguments", "arguments"),
}


def hosted_item(event: HostedCallDelta | HostedCall | HostedResult | ApprovalRequest | ToolList) -> dict[str, Any]:
    """The item of an event, as it stands then, without its id.

    A HostedCallDelta gives the item that opens a call, in progress. The types are those of ITEM_TYPES, and
    mcp_list_tools and mcp_approval_request.
    """
    if isinstance(event, ToolList):
        tools = [dict(tool) for tool in event.tools]
        return {"type": "mcp_list_tools", "server_label": event.server_label, "tools": tools, "error": event.error}
    if isinstance(event, ApprovalRequest):
        call = event.call
        fields = {"server_label": call.server_label, "name": call.name, "arguments": call.arguments}
        return {"type": "mcp_approval_request", **fields}
    if isinstance(event, HostedCallDelta):
        call = HostedCall(event.id, event.tool, event.name, "", event.server_label, None, event.container_id)
        return _item(call, None)
    return _item(event.call, event) if isinstance(event, HostedResult) else _item(event, None)


def _item(call: HostedCall, result: HostedResult | None) -> dict[str, Any]:
    failed = result is not None and result.error is not None
    status = "in_progress" if result is None else "failed" if failed else "completed"
    item: dict[str, Any] = {"type": ITEM_TYPES[call.tool], "status": status}
    if call.tool == "browser":
        action = dict(call.action or {"type": "search", "query": ""})
        if result is not None and action["type"] == "search":
            action["sources"] = [{"type": "url", "url": url} for url in result.sources]
        return {**item, "action": action}
    if call.tool == "python":
        outputs = None if result is None else [{"type": "logs", "logs": result.text}]
        # A traceback is an output like any other: the interpreter did its work.
        status = "in_progress" if result is None else "completed"
        return {**item, "status": status, "code": call.arguments, "container_id": call.container_id, "outputs": outputs}
    content = [{"type": "text", "text": result.error}] if result is not None else []
    return {
        **item,
        "server_label": call.server_label,
        "name": call.name,
        "arguments": call.arguments,
        "output": None if result is None or failed else result.text,
        "error": {"type": "mcp_tool_execution_error", "content": content} if failed else None,
        "approval_request_id": None,
    }


def annotation(citation: Citation) -> dict[str, Any]:
    """A citation as an annotation of the Responses API."""
    return {
        "type": "url_citation",
        "start_index": citation.start_index,
        "end_index": citation.end_index,
        "url": citation.url,
        "title": citation.title,
    }
