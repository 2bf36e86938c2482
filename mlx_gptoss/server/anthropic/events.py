"""A Message of Anthropic's, written as the events of its stream; fold_event() adds them up to the whole one."""

from __future__ import annotations

import secrets
from typing import Any, Literal

import pydantic_core

from ...chat.reply import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from .signature import signature_of

Thinking = Literal["shown", "omitted", "hidden"]
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


class MessageWriter:
    """Converts engine events to stream events. Call begin(), then write() for each event; Finished ends the message.

    model: the name to give. thinking: whether thinking blocks have the reasoning, have none, or are left out.
    """

    def __init__(self, model: str, thinking: Thinking) -> None:
        self._model = model
        self._thinking = thinking
        self._count = 0  # of the blocks that have started
        self._open: object = None  # what the open block is made of: its kind, or its call; None if no block is open
        self._thoughts: list[str] = []  # reasoning of the open thinking block

    def begin(self, prompt_tokens: int) -> list[dict[str, Any]]:
        """The first events. How many of the prompt's tokens were cached is only known at the end."""
        message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(prompt_tokens, 0, 0, 0),
        }
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def write(self, event: Event) -> list[dict[str, Any]]:
        """Convert one engine event."""
        match event:
            case ReasoningDelta() if self._thinking != "hidden":
                return self._thinking_delta(event.text)
            case TextDelta():
                start = self._switch(("text", event.preamble), {"type": "text", "text": ""})
                return [*start, self._delta({"type": "text_delta", "text": event.text})]
            case ToolCallDelta():
                id = f"toolu_{event.id.removeprefix('call_')}"
                start = self._switch(event.id, {"type": "tool_use", "id": id, "name": event.name, "input": {}})
                return [*start, self._delta({"type": "input_json_delta", "partial_json": event.text})]
            case Finished():
                return [*self._close(), _message_delta(event), {"type": "message_stop"}]
        return []  # hidden reasoning, or a complete ToolCall, whose deltas have already been sent

    def _thinking_delta(self, text: str) -> list[dict[str, Any]]:
        start = self._switch("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        self._thoughts.append(text)
        if self._thinking == "omitted":
            return start
        return [*start, self._delta({"type": "thinking_delta", "thinking": text})]

    def _switch(self, key: object, block: dict[str, Any]) -> list[dict[str, Any]]:
        """Close the open block and start this one, unless the open one is the same."""
        if key == self._open:
            return []
        closing = self._close()
        self._open, self._count = key, self._count + 1
        return [*closing, {"type": "content_block_start", "index": self._count - 1, "content_block": block}]

    def _close(self) -> list[dict[str, Any]]:
        if self._open is None:
            return []
        events = [{"type": "content_block_stop", "index": self._count - 1}]
        if self._open == "thinking":
            signature = signature_of("".join(self._thoughts), omitted=self._thinking == "omitted")
            events.insert(0, self._delta({"type": "signature_delta", "signature": signature}))
        self._open, self._thoughts = None, []
        return events

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._count - 1, "delta": delta}


def fold_event(message: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    """Add a stream event to the message, and return it. The first event brings the message."""
    kind = event["type"]
    if kind == "message_start":
        return {**event["message"]}
    if kind == "content_block_start":
        message["content"].append({**event["content_block"]})
    elif kind == "content_block_delta":
        _fold_delta(message["content"][event["index"]], event["delta"])
    elif kind == "content_block_stop":
        block = message["content"][event["index"]]
        if block["type"] == "tool_use":
            block["input"] = _parse_input(block["input"])
    elif kind == "message_delta":
        message |= {**event["delta"], "usage": event["usage"]}
    return message


def _fold_delta(block: dict[str, Any], delta: dict[str, Any]) -> None:
    for field, value in delta.items():
        if field == "partial_json":
            block["input"] = (block["input"] or "") + value
        elif field != "type":
            block[field] += value


def _parse_input(arguments: Any) -> dict[str, Any]:
    """The arguments of a call as an object: as far as they go, if the call was cut short."""
    try:
        value = pydantic_core.from_json(arguments or "{}", allow_partial=True)
    except (TypeError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _message_delta(finished: Finished) -> dict[str, Any]:
    """The event that says why the message ended, and its token counts."""
    stopped = finished.stop_string is not None and finished.finish_reason == "stop"
    reason = "stop_sequence" if stopped else STOP_REASONS[finished.finish_reason]
    usage = finished.usage
    return {
        "type": "message_delta",
        "delta": {"stop_reason": reason, "stop_sequence": finished.stop_string if stopped else None},
        "usage": _usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, finished.reasoning_tokens),
    }


def _usage(prompt: int, cached: int, generated: int, thinking: int) -> dict[str, Any]:
    """Token counts. input_tokens are those of the prompt that had to be computed.

    Each prompt is kept for the next one, whether it asks for that or not, so no token is counted as written to a cache.
    """
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": generated,
        "output_tokens_details": {"thinking_tokens": thinking},
    }
