"""Converts the events of one reply to the events of the Responses API, and builds the response object from them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ...chat.reply import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from ...tokenizer import Tokenizer
from ..errors import ApiError
from .chat_completions import logprob_entry
from .items import new_id

ID_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


@dataclass
class OutputItem:
    """An output item in progress.

    key: with `type`, identifies the item that a delta belongs to: the phase of a message, the id of a call.
    index: its position in the response's `output`. fields: those of the item besides its text.
    """

    type: str
    key: Any
    index: int
    fields: dict[str, Any]
    id: str = ""
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = new_id(ID_PREFIXES[self.type])

    def part(self) -> dict[str, Any]:
        """Its only content part, as written so far."""
        text = "".join(self.text)
        if self.type == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self.logprobs)}

    def to_object(self, status: str) -> dict[str, Any]:
        """The item as a JSON object. Its content is empty until there is text."""
        head = {"id": self.id, "type": self.type, "status": status, **self.fields}
        if self.type == "function_call":
            return {**head, "arguments": "".join(self.text)}
        return {**head, "content": [self.part()] if self.text else []}


class ResponseWriter:
    """Converts one reply.

    response: the response object as written so far. call_ids: ids of the function calls in it, in order.
    finished: the last event of the reply, once it has arrived.
    """

    def __init__(self, response: dict[str, Any], tokenizer: Tokenizer, logprobs: bool) -> None:
        self.response = response
        self.call_ids: list[str] = []
        self.finished: Finished | None = None
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._open: OutputItem | None = None
        self._sequence = 0

    def begin(self) -> list[dict[str, Any]]:
        """The events before any output."""
        return [self._event(f"response.{step}", response=dict(self.response)) for step in ("created", "in_progress")]

    def write(self, event: Event) -> Iterator[dict[str, Any]]:
        """Convert one event of the reply."""
        match event:
            case ReasoningDelta():
                yield from self._append("reasoning", None, event.text, {"summary": []})
            case TextDelta():
                phase = "commentary" if event.preamble else "final_answer"
                logprobs = [logprob_entry(token, self._tokenizer) for token in event.tokens] if self._logprobs else []
                yield from self._append("message", phase, event.text, {"role": "assistant", "phase": phase}, logprobs)
            case ToolCallDelta():
                fields = {"call_id": event.id, "name": event.name}
                yield from self._append("function_call", event.id, event.text, fields)
            case Finished():
                yield from self._finish(event)

    def fail(self, error: ApiError) -> dict[str, Any]:
        """Return the last event of a response that failed or was cancelled. What was written so far stays in it."""
        cancelled = error.code == "cancelled"
        self.response["status"] = "cancelled" if cancelled else "failed"
        if self._open is not None:
            self.response["output"] = [*self.response["output"], self._open.to_object("incomplete")]
        if not cancelled:
            self.response["error"] = {"code": error.code or "server_error", "message": str(error)}
        return self._event("response.failed", response=dict(self.response))

    def _append(
        self, type: str, key: Any, text: str, fields: dict[str, Any], logprobs: list[dict[str, Any]] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Append text to the open item if it has this type and key, else close it and open a new one."""
        item = self._open
        if item is None or (item.type, item.key) != (type, key):
            yield from self._close_item("completed")
            item = self._open = OutputItem(type, key, len(self.response["output"]), fields)
            yield self._event("response.output_item.added", output_index=item.index, item=item.to_object("in_progress"))
            if type == "function_call":
                self.call_ids.append(fields["call_id"])
            else:
                yield self._item_event(item, "response.content_part.added", content_index=0, part=item.part())
        item.text.append(text)
        if type == "function_call":
            yield self._item_event(item, "response.function_call_arguments.delta", delta=text)
        elif type == "reasoning":
            yield self._item_event(item, "response.reasoning_text.delta", content_index=0, delta=text)
        else:
            logprobs = logprobs or []
            item.logprobs += logprobs
            yield self._item_event(item, "response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _close_item(self, status: str) -> Iterator[dict[str, Any]]:
        """Close the open item, if there is one, and add it to the response."""
        item, self._open = self._open, None
        if item is None:
            return
        text = "".join(item.text)
        if item.type == "function_call":
            name = item.fields["name"]
            yield self._item_event(item, "response.function_call_arguments.done", arguments=text, name=name)
        elif item.type == "reasoning":
            yield self._item_event(item, "response.reasoning_text.done", content_index=0, text=text)
        else:
            logprobs = list(item.logprobs)
            yield self._item_event(item, "response.output_text.done", content_index=0, text=text, logprobs=logprobs)
        if item.type != "function_call":
            yield self._item_event(item, "response.content_part.done", content_index=0, part=item.part())
        closed = item.to_object(status)
        self.response["output"] = [*self.response["output"], closed]
        yield self._event("response.output_item.done", output_index=item.index, item=closed)

    def _finish(self, event: Finished) -> Iterator[dict[str, Any]]:
        """Close the last item and fill in status and usage."""
        self.finished = event
        status = "incomplete" if event.finish_reason == "length" else "completed"
        yield from self._close_item(status)
        self.response["status"] = status
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["completed_at"] = int(time.time())
        self.response["usage"] = {
            "input_tokens": event.usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": event.usage.cached_tokens},
            "output_tokens": event.usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": event.reasoning_tokens},
            "total_tokens": event.usage.prompt_tokens + event.usage.completion_tokens,
        }

    def end(self) -> dict[str, Any]:
        """Return the last event of a response that ended by itself or at its token limit."""
        return self._event(f"response.{self.response['status']}", response=dict(self.response))

    def _item_event(self, item: OutputItem, type: str, **fields: Any) -> dict[str, Any]:
        return self._event(type, item_id=item.id, output_index=item.index, **fields)

    def _event(self, type: str, **fields: Any) -> dict[str, Any]:
        self._sequence += 1
        return {"type": type, "sequence_number": self._sequence - 1, **fields}
