"""Converts the events of one reply to the events of the Responses API, and builds the response object from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ...chat.reply import Finished, ReasoningDelta, TextDelta, ToolCallDelta
from ...tokenizer import Tokenizer
from ..errors import ApiError
from ..hosted.events import (
    AnyEvent,
    ApprovalRequest,
    Citation,
    HostedCall,
    HostedCallDelta,
    HostedResult,
    ToolList,
)
from ..hosted.items import annotation
from .chat_completions import logprob_entry
from .hosted_output import ApprovalOutput, HostedCallOutput, ToolListOutput
from .output_items import CallItem, Emit, MessageOutput, OutputItem, ReasoningOutput
from .response_tools import ClientTool


@dataclass(frozen=True)
class WriterOptions:
    """What a request asks for besides the output.

    logprobs: of the output text. summary: the reasoning's text as its summary, too. packed_reasoning: reasoning items
    hold their text in `encrypted_content`.
    """

    logprobs: bool = False
    summary: bool = False
    packed_reasoning: bool = False


class ResponseWriter:
    """Converts one reply, or several with calls of hosted tools between them.

    response: the response object as written so far. calls: the id and the function's name of each call that the client
    has to answer, in order. finished: the last event of the reply, once it has arrived.
    """

    def __init__(
        self,
        response: dict[str, Any],
        tokenizer: Tokenizer,
        client_tool: Callable[[str], ClientTool],
        options: WriterOptions,
    ) -> None:
        """client_tool: how the client names a function that the model calls."""
        self.response = response
        self.calls: list[tuple[str, str]] = []
        self.finished: Finished | None = None
        self._tokenizer = tokenizer
        self._client_tool = client_tool
        self._options = options
        self._open: OutputItem | None = None
        self._sequence = 0

    def begin(self) -> list[dict[str, Any]]:
        """The events before any output. A background response is queued until start()."""
        created = self._event("response.created", response=dict(self.response))
        if self.response["status"] == "queued":
            return [created, self._event("response.queued", response=dict(self.response))]
        return [created, self._event("response.in_progress", response=dict(self.response))]

    def start(self) -> list[dict[str, Any]]:
        """The events of a response that leaves the queue; none if it was not queued."""
        if self.response["status"] != "queued":
            return []
        self.response["status"] = "in_progress"
        return [self._event("response.in_progress", response=dict(self.response))]

    def write(self, event: AnyEvent) -> Iterator[dict[str, Any]]:
        """Convert one event of the reply."""
        match event:
            case ReasoningDelta():
                item = self._open
                if not isinstance(item, ReasoningOutput):
                    item = ReasoningOutput(self._options.summary, self._options.packed_reasoning)
                    yield from self.open(item)
                yield from item.append(event.text, self._emitter(item))
            case TextDelta():
                yield from self._text(event)
            case ToolCallDelta():
                item = self._open
                if not (isinstance(item, CallItem) and item.call_id == event.id):
                    self.calls.append((event.id, event.name))
                    item = CallItem(event.id, self._client_tool(event.name))
                    yield from self.open(item)
                yield from item.append(event.text, self._emitter(item))
            case Finished():
                yield from self._finish(event)
            case Citation():
                if isinstance(self._open, MessageOutput):
                    yield from self._open.annotate(annotation(event), self._emitter(self._open))
            case ToolList():
                yield from self.open(ToolListOutput(event))
                yield from self.close("completed")
            case ApprovalRequest():
                yield from self.open(ApprovalOutput(event))
                yield from self.close("completed")
            case HostedCallDelta() | HostedCall() | HostedResult():
                yield from self._hosted_call(event)

    def _hosted_call(self, event: HostedCallDelta | HostedCall | HostedResult) -> Iterator[dict[str, Any]]:
        """A step of a call that the server runs."""
        item, opening = self._open, event.call if isinstance(event, HostedResult) else event
        if not (isinstance(item, HostedCallOutput) and item.call_id == opening.id):
            item = HostedCallOutput(opening)
            yield from self.open(item)
        if isinstance(event, HostedCallDelta):
            yield from item.append(event.text, self._emitter(item))
        elif isinstance(event, HostedCall):
            yield from item.run(event, self._emitter(item))
        else:
            item.finish(event)
            yield from self.close("completed")

    def open(self, item: OutputItem) -> Iterator[dict[str, Any]]:
        """Close the open item, and begin this one. It is closed by the next one, or at the end."""
        yield from self.close("completed")
        self._open = item
        item.index = len(self.response["output"])
        yield self._event("response.output_item.added", output_index=item.index, item=item.to_object("in_progress"))
        yield from item.begin(self._emitter(item))

    def close(self, status: str) -> Iterator[dict[str, Any]]:
        """Close the open item, if there is one, and add it to the response."""
        item, self._open = self._open, None
        if item is None:
            return
        yield from item.end(self._emitter(item))
        closed = item.to_object(status)
        self.response["output"] = [*self.response["output"], closed]
        yield self._event("response.output_item.done", output_index=item.index, item=closed)

    def fail(self, error: ApiError) -> dict[str, Any]:
        """Return the last event of a response that failed or was cancelled. What was written so far stays in it."""
        cancelled = error.code == "cancelled"
        self.response["status"] = "cancelled" if cancelled else "failed"
        if self._open is not None:
            self.response["output"] = [*self.response["output"], self._open.to_object("incomplete")]
        if not cancelled:
            self.response["error"] = {"code": error.code or "server_error", "message": str(error)}
        return self._event("response.failed", response=dict(self.response))

    def end(self) -> dict[str, Any]:
        """Return the last event of a response that ended by itself or at its token limit."""
        return self._event(f"response.{self.response['status']}", response=dict(self.response))

    def _text(self, event: TextDelta) -> Iterator[dict[str, Any]]:
        item, phase = self._open, "commentary" if event.preamble else "final_answer"
        if not (isinstance(item, MessageOutput) and item.phase == phase):
            item = MessageOutput(phase)
            yield from self.open(item)
        logprobs = [logprob_entry(token, self._tokenizer) for token in event.tokens] if self._options.logprobs else []
        yield from item.append(event.text, self._emitter(item), logprobs)

    def _finish(self, event: Finished) -> Iterator[dict[str, Any]]:
        """Close the last item and fill in status and usage."""
        self.finished = event
        status = "incomplete" if event.finish_reason == "length" else "completed"
        yield from self.close(status)
        self.response["status"] = status
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["completed_at"] = int(time.time())
        self.response["usage"] = usage_object(event)

    def _emitter(self, item: OutputItem) -> Emit:
        def emit(type: str, **fields: Any) -> dict[str, Any]:
            return self._event(type, item_id=item.id, output_index=item.index, **fields)

        return emit

    def _event(self, type: str, **fields: Any) -> dict[str, Any]:
        self._sequence += 1
        return {"type": type, "sequence_number": self._sequence - 1, **fields}


def usage_object(event: Finished) -> dict[str, Any]:
    """The token counts of a reply."""
    return {
        "input_tokens": event.usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": event.usage.cached_tokens},
        "output_tokens": event.usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": event.reasoning_tokens},
        "total_tokens": event.usage.prompt_tokens + event.usage.completion_tokens,
    }
