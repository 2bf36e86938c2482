"""The fields of requests to /v1/responses and its kin."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from ...errors import InvalidRequest
from ...harmony.messages import Effort
from ...sampling import MAX_LOGPROBS
from ..errors import ApiError, from_exception, invalid_field
from ..fields import (
    MAX_INT64,
    MAX_MESSAGES,
    MAX_TOOLS,
    MaxTokens,
    Metadata,
    Name,
    Object,
    RequestModel,
    SamplingFields,
    StreamOptions,
    Tools,
    check_schema,
    effort_of,
)
from .items import Item, MessageItem, OtherItem

INCLUDE_LOGPROBS = "message.output_text.logprobs"
INCLUDE_REASONING = "reasoning.encrypted_content"


class Reasoning(RequestModel):
    """effort: medium by default. summary: anything but "none" adds the reasoning's text as its summary.

    generate_summary is OpenAI's earlier name of summary.
    """

    effort: Name | None = None
    summary: Name | None = None
    generate_summary: Name | None = None


class TextOptions(RequestModel):
    """format: text, json_object, or json_schema with a schema."""

    format: Object | None = None


class ConversationReference(RequestModel):
    """A conversation of /v1/conversations."""

    id: Name


class ContextRequest(RequestModel):
    """What the model sees: the conversation so far, the tools and the instructions.

    tools: of the types function, custom and namespace; others are left out if there are some of these.
    truncation: auto drops the oldest turns of a conversation that the context cannot hold.
    """

    model: Name | None = None
    input: str | Annotated[list[Item], Field(max_length=MAX_MESSAGES)] | None = None
    instructions: str | None = None
    previous_response_id: Name | None = None
    conversation: Name | ConversationReference | None = None
    tools: Tools | None = None
    tool_choice: Name | Object | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    prompt: Any = None

    @cached_property
    def items(self) -> Sequence[Item]:
        """The input as items."""
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input)]
        return self.input or []

    @property
    def all_tools(self) -> list[dict[str, Any]]:
        """The tools, and those in items of the type additional_tools, which some clients use instead."""
        items = (item for item in self.items if isinstance(item, OtherItem) and item.type == "additional_tools")
        lists = [item.fields.get("tools") for item in items]
        added = [tool for tools in lists if isinstance(tools, list) for tool in tools if isinstance(tool, dict)]
        return [*(self.tools or ()), *added]

    @property
    def conversation_id(self) -> str | None:
        """The id of the conversation."""
        return self.conversation.id if isinstance(self.conversation, ConversationReference) else self.conversation

    @property
    def effort(self) -> Effort:
        """The reasoning effort, medium by default."""
        return effort_of(self.reasoning.effort if self.reasoning else None, "reasoning.effort") or "medium"

    @property
    def summary(self) -> str | None:
        """The kind of reasoning summary that is asked for; None for none."""
        kind = (self.reasoning.summary or self.reasoning.generate_summary) if self.reasoning else None
        return None if kind == "none" else kind

    @property
    def format(self) -> dict[str, Any]:
        """The response format, text by default."""
        return (self.text.format if self.text else None) or {"type": "text"}

    def check(self) -> None:
        """Raise ApiError for fields that contradict each other, and for schemas over the limits."""
        self._check_rejected()
        if self.prompt is not None:
            message = "is not supported: templates are stored at OpenAI; send their text as instructions and input"
            raise invalid_field("prompt", message, "unsupported_parameter")
        if self.conversation is not None and self.previous_response_id is not None:
            raise invalid_field("conversation", "cannot be used with previous_response_id: give one of the two")
        tools = self.all_tools
        if len(tools) > MAX_TOOLS:
            raise invalid_field("tools", f"has more than {MAX_TOOLS} tools, those in items included")
        for index, tool in enumerate(tools):
            check_schema(tool, f"tools[{index}]")

    def _check_rejected(self) -> None:
        try:
            self.check_rejected()
        except ApiError as error:
            message = str(error).replace("response_format", "text.format")
            raise ApiError(error.status, message, param=error.param, code=error.code) from None


class ResponsesRequest(ContextRequest, SamplingFields):
    """The fields of OpenAI that have an effect, and those of SamplingFields.

    include: message.output_text.logprobs and reasoning.encrypted_content; other values have no effect.
    max_tool_calls: limits calls of tools that the server runs.
    background: the response is made without the client, which polls it.
    """

    metadata: Metadata | None = None
    user: Name | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: MaxTokens = None
    max_tool_calls: int | None = Field(None, ge=0, le=MAX_INT64)
    include: list[Name] | None = Field(None, max_length=1000)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    background: bool | None = None

    @property
    def logprobs(self) -> bool:
        """Whether the output text gets logprobs."""
        return INCLUDE_LOGPROBS in (self.include or ())

    def check(self) -> None:
        """Raise ApiError as ContextRequest.check does, and for a background response that nobody could read."""
        super().check()
        if self.background and self.store is False:
            raise invalid_field("background", "needs the response to be stored: leave out store")

    def ignored_fields(self) -> set[str]:
        """The paths of what has no effect in this request."""
        ignored = super().ignored_fields()
        known = {INCLUDE_LOGPROBS, INCLUDE_REASONING}
        ignored |= {f"include[].{value}" for value in self.include or () if value not in known}
        ignored |= {"stream_options"} if self.stream_options is not None and not self.stream else set()
        return ignored | ({"top_logprobs"} if self.top_logprobs and not self.logprobs else set())


def request_error(error: InvalidRequest) -> ApiError:
    """The error response for what the model cannot be asked, in the words of this API's fields."""
    found = from_exception(error)
    if str(error).startswith(("the grammar of ", "the parameters of ")):
        return ApiError(found.status, str(error), param="tools", code=found.code)
    for ours, theirs in (("response_format.json_schema", "text.format"), ("response_format", "text.format")):
        if found.param is not None and found.param.startswith(ours):
            param = theirs + found.param[len(ours) :]
            return ApiError(found.status, param + str(found)[len(found.param) :], param=param, code=found.code)
    return found
