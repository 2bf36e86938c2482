"""A stream's events folded into one value: a Reply, or the Completion of a raw stream."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..engine import Token
from ..errors import GptOssError
from ..harmony.messages import Conversation
from .reply import Event, FinishReason, Timings, ToolCall, Usage, fold
from .structured import parse_answer


@dataclass(frozen=True)
class Completion:
    """A raw continuation.

    ids: the tokens produced, with the stop id if one ended it. logprobs: their natural log-probabilities under the raw
    logits. top: for each token the likeliest (id, logprob) alternatives, as many as Sampling.logprobs says.
    finish_reason: "stop" or "length".
    """

    ids: tuple[int, ...] = field(repr=False)
    logprobs: tuple[float, ...] = field(repr=False)
    top: tuple[tuple[tuple[int, float], ...], ...] = field(repr=False)
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class Reply:
    """One assistant turn.

    text: the answer. reasoning: the analysis before it. finish_reason: "stop", "length" or "tool_calls". ids, logprobs:
    all tokens produced, Harmony's special tokens included. conversation: the prompt with this turn appended.
    response_format: what the answer was held to. A notebook shows a Reply as Markdown.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    ids: tuple[int, ...] = field(repr=False)
    logprobs: tuple[Token, ...] = field(repr=False)
    conversation: Conversation = field(repr=False)
    response_format: Any = field(default=None, repr=False)

    @cached_property
    def parsed(self) -> Any:
        """The answer's value: an instance of the pydantic class given as response_format; of a JSON schema, what
        json.loads gives. None without a response_format, and if the turn ended in a call.

        Raises GptOssError for an answer that was cut off, and what the class's own validators raise.
        """
        form = self.response_format or self.conversation.response_format
        if form is None or form == {"type": "text"} or self.finish_reason == "tool_calls":
            return None
        if self.finish_reason == "length":
            raise GptOssError("the answer was cut off before its JSON ended; raise max_tokens or max_context")
        return parse_answer(self.text, form)

    def _repr_markdown_(self) -> str:
        """For notebooks: the reasoning, folded; the answer; calls as code."""
        thought = html.escape(self.reasoning).replace("\n", "<br>")
        parts = [f"<details><summary>Reasoning</summary>{thought}</details>"] if thought else []
        parts += [self.text] if self.text else []
        for call in self.tool_calls:
            fence = "`" * max(3, 1 + _longest_run(call.arguments))
            parts.append(f"{fence}\n{call.name}({call.arguments})\n{fence}")
        parts += ["*(cut off)*"] if self.finish_reason == "length" else []
        return "\n\n".join(parts)


def reply_of(events: Iterable[Event], response_format: Any = None) -> Reply:
    """Fold the events of a chat into a Reply. response_format: that of the request."""
    reasoning, text, calls, finished = fold(events)
    return Reply(
        text=text,
        reasoning=reasoning,
        tool_calls=calls,
        finish_reason=finished.finish_reason,
        usage=finished.usage,
        timings=finished.timings,
        ids=tuple(token.id for token in finished.tokens),
        logprobs=finished.tokens,
        conversation=finished.conversation,
        response_format=response_format,
    )


def completion_of(events: Iterable[Event]) -> Completion:
    """Fold the events of a raw stream into a Completion."""
    _, text, _, finished = fold(events)
    return Completion(
        ids=tuple(token.id for token in finished.tokens),
        logprobs=tuple(token.logprob for token in finished.tokens),
        top=tuple(token.top for token in finished.tokens),
        text=text,
        finish_reason=finished.finish_reason,
        usage=finished.usage,
        timings=finished.timings,
    )


def _longest_run(text: str) -> int:
    """The length of the longest run of backticks."""
    return max(map(len, "".join(c if c == "`" else " " for c in text).split()), default=0)
