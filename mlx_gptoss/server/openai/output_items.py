"""The output items of a response in progress, and the events that belong to each. ResponseWriter puts them in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .items import ID_PREFIXES, new_id
from .opaque import pack
from .response_tools import ClientTool

Emit = Callable[..., dict[str, Any]]  # (type, **fields) -> an event of the item
Events = Iterator[dict[str, Any]]


class OutputItem:
    """An output item in progress. index: its position in the response's `output`."""

    type: str

    def __init__(self) -> None:
        self.id: str = new_id(ID_PREFIXES[self.type])
        self.index: int = 0

    def begin(self, emit: Emit) -> Events:
        """The events after response.output_item.added."""
        yield from ()

    def end(self, emit: Emit) -> Events:
        """The events before response.output_item.done."""
        yield from ()

    def to_object(self, status: str) -> dict[str, Any]:
        """The item as a JSON object, as written so far."""
        return {"id": self.id, "type": self.type, "status": status}


class TextItem(OutputItem):
    """An item that is mostly one text."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)


class MessageOutput(TextItem):
    """Text for the user. phase: "commentary" before a call, "final_answer" otherwise."""

    type = "message"

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase
        self.annotations: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []

    def begin(self, emit: Emit) -> Events:
        """The events after response.output_item.added."""
        yield emit("response.content_part.added", content_index=0, part=self._part())

    def append(self, text: str, emit: Emit, logprobs: list[dict[str, Any]]) -> Events:
        """Add text."""
        self._pieces.append(text)
        self._logprobs += logprobs
        yield emit("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def annotate(self, annotation: dict[str, Any], emit: Emit) -> Events:
        """Add an annotation of the text so far, such as a citation."""
        index = len(self.annotations)
        self.annotations.append(annotation)
        yield emit(
            "response.output_text.annotation.added", content_index=0, annotation_index=index, annotation=annotation
        )

    def end(self, emit: Emit) -> Events:
        """The events before response.output_item.done."""
        yield emit("response.output_text.done", content_index=0, text=self.text, logprobs=list(self._logprobs))
        yield emit("response.content_part.done", content_index=0, part=self._part())

    def to_object(self, status: str) -> dict[str, Any]:
        """The item as a JSON object. Its content is empty until there is text."""
        content = [self._part()] if self._pieces else []
        return {**super().to_object(status), "role": "assistant", "phase": self.phase, "content": content}

    def _part(self) -> dict[str, Any]:
        logprobs, annotations = list(self._logprobs), list(self.annotations)
        return {"type": "output_text", "text": self.text, "annotations": annotations, "logprobs": logprobs}


class ReasoningOutput(TextItem):
    """Reasoning, whole, since there is nothing to hide.

    summarized: its text is its summary as well, in one part, for clients that read only summaries. packed: it is in
    `encrypted_content`, too, for clients that send back nothing else.
    """

    type = "reasoning"

    def __init__(self, summarized: bool, packed: bool) -> None:
        super().__init__()
        self._summarized = summarized
        self._packed = packed

    def begin(self, emit: Emit) -> Events:
        """The events after response.output_item.added."""
        yield emit("response.content_part.added", content_index=0, part=self._part("reasoning_text"))
        if self._summarized:
            yield emit("response.reasoning_summary_part.added", summary_index=0, part=self._part("summary_text"))

    def append(self, text: str, emit: Emit) -> Events:
        """Add text."""
        self._pieces.append(text)
        yield emit("response.reasoning_text.delta", content_index=0, delta=text)
        if self._summarized:
            yield emit("response.reasoning_summary_text.delta", summary_index=0, delta=text)

    def end(self, emit: Emit) -> Events:
        """The events before response.output_item.done."""
        yield emit("response.reasoning_text.done", content_index=0, text=self.text)
        yield emit("response.content_part.done", content_index=0, part=self._part("reasoning_text"))
        if self._summarized:
            yield emit("response.reasoning_summary_text.done", summary_index=0, text=self.text)
            yield emit("response.reasoning_summary_part.done", summary_index=0, part=self._part("summary_text"))

    def to_object(self, status: str) -> dict[str, Any]:
        """The item as a JSON object. Content and summary are empty until there is text."""
        written = bool(self._pieces)
        fields: dict[str, Any] = {
            "summary": [self._part("summary_text")] if self._summarized and written else [],
            "content": [self._part("reasoning_text")] if written else [],
        }
        if self._packed:
            fields["encrypted_content"] = pack(self.text) if written else None
        return {**super().to_object(status), **fields}

    def _part(self, type: str) -> dict[str, Any]:
        return {"type": type, "text": self.text}


class CallItem(TextItem):
    """A call that the client has to answer: of a function, or of a custom tool."""

    def __init__(self, call_id: str, tool: ClientTool) -> None:
        self.type = "custom_tool_call" if tool.custom else "function_call"
        super().__init__()
        self.call_id = call_id
        self._tool = tool

    def append(self, text: str, emit: Emit) -> Events:
        """Add text to the arguments, or to the input of a custom tool."""
        self._pieces.append(text)
        kind = "custom_tool_call_input" if self._tool.custom else "function_call_arguments"
        yield emit(f"response.{kind}.delta", delta=text)

    def end(self, emit: Emit) -> Events:
        """The events before response.output_item.done."""
        if self._tool.custom:
            yield emit("response.custom_tool_call_input.done", input=self.text)
        else:
            yield emit("response.function_call_arguments.done", arguments=self.text, name=self._tool.name)

    def to_object(self, status: str) -> dict[str, Any]:
        """The item as a JSON object."""
        fields = {"call_id": self.call_id, "name": self._tool.name}
        if self._tool.namespace is not None:
            fields["namespace"] = self._tool.namespace
        return {**super().to_object(status), **fields, "input" if self._tool.custom else "arguments": self.text}
