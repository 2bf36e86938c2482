"""Tokens of one reply in, events out. It never waits and does not know the engine that produces the tokens."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from .. import engine as engines
from ..engine import Token
from ..engine.stop import StopStrings
from ..errors import GptOssError
from ..harmony.messages import Conversation, Message
from ..harmony.names import ToolNames
from ..harmony.parse import Delta, Parser
from ..tokenizer import IncrementalDecoder, Tokenizer

FinishReason = Literal["stop", "length", "tool_calls"]
_EMPTY = Conversation()


@dataclass(frozen=True)
class ReasoningDelta:
    """Reasoning: more text of the analysis channel."""

    text: str


@dataclass(frozen=True)
class TextDelta:
    """More text for the user: the final channel, and preambles on the commentary channel.

    tokens: the tokens of this text; empty for text that came without a header. preamble: whether it is on commentary.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    preamble: bool = False


@dataclass(frozen=True)
class ToolCallDelta:
    """More of a call's arguments. The first one, perhaps with empty text, comes as soon as the function is known."""

    id: str
    name: str
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete function call, after its deltas. arguments: JSON text as the model wrote it, not validated."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Usage:
    """Token counts. cached_tokens: tokens of the prompt that the prefix cache provided."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and reply together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Speeds. ttft_s: seconds from the request to the first token; queue_s: of these, until its first step. Rates are
    tokens per second, 0 if not measured."""

    ttft_s: float
    prefill_tok_s: float
    decode_tok_s: float
    queue_s: float = 0.0


@dataclass(frozen=True)
class Finished:
    """The last event of a stream.

    tokens: all tokens produced, Harmony's special tokens included. messages: the same, parsed, to be appended to the
    conversation. reasoning_tokens: tokens of the analysis channel without headers. drafted, accepted: tokens that
    speculation proposed, and those that were right. stop_string: the stop string that ended the text.
    conversation: the prompt with this turn appended, to continue with; empty for a raw continuation, which has none.
    """

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    tokens: tuple[Token, ...] = field(repr=False)
    messages: tuple[Message, ...] = ()
    reasoning_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    stop_string: str | None = None
    conversation: Conversation = field(default=_EMPTY, repr=False)


Event = ReasoningDelta | TextDelta | ToolCallDelta | ToolCall | Finished


def fold(events: Iterable[Event]) -> tuple[str, str, tuple[ToolCall, ...], Finished]:
    """A stream's reasoning, text, tool calls and last event."""
    reasoning, text, calls = [], [], []
    for event in events:
        match event:
            case ReasoningDelta():
                reasoning.append(event.text)
            case TextDelta():
                text.append(event.text)
            case ToolCall():
                calls.append(event)
            case Finished():
                return "".join(reasoning), "".join(text), tuple(calls), event
    raise GptOssError("the stream ended early: its engine was closed")


class Reader(Protocol):
    """Turns the tokens of one stream into events. Tokens after a matched stop string are ignored."""

    stops: StopStrings

    def push(self, token: Token) -> Iterable[Event]: ...

    def finish(self, end: engines.Finished) -> Iterable[Event]: ...


class TextTokens:
    """Assigns tokens to pieces of text: a character may take several tokens, and stop strings hold text back."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Token]] = deque()  # with the number of characters before each
        self._read = 0
        self._shown = 0

    def add(self, token: Token) -> None:
        self._waiting.append((self._read, token))

    def advance(self, text: str) -> None:
        """Take in the text that the tokens added last decoded to."""
        self._read += len(text)

    def delta(self, text: str, preamble: bool = False) -> TextDelta:
        """The event for the next text to show."""
        self._shown += len(text)
        tokens = []
        while self._waiting and self._waiting[0][0] < self._shown:
            tokens.append(self._waiting.popleft()[1])
        return TextDelta(text, tuple(tokens), preamble)


@dataclass
class ReplyReader:
    """Reads one Harmony reply: each parsed piece becomes reasoning, text or part of a tool call.

    asked: what it replies to.
    """

    tokenizer: Tokenizer
    parser: Parser
    stops: StopStrings
    names: ToolNames
    asked: Conversation = _EMPTY
    tokens: list[Token] = field(default_factory=list)
    text_tokens: TextTokens = field(default_factory=TextTokens)
    reasoning_tokens: int = 0
    called: bool = False
    call: tuple[str, str] | None = None  # id and function name of the open call
    arguments: list[str] = field(default_factory=list)

    def push(self, token: Token) -> Iterator[Event]:
        if self.stops.matched is not None:
            return
        self.tokens.append(token)
        within = None if self.tokenizer.is_special(token.id) else self.parser.content_kind
        if within == "text":
            self.text_tokens.add(token)
        self.reasoning_tokens += within == "reasoning"
        yield from self._route(self.parser.push(token.id))

    def finish(self, end: engines.Finished) -> Iterator[Event]:
        yield from self._route(self.parser.finish())
        if held := self.stops.flush():
            yield self.text_tokens.delta(held)
        reason: FinishReason = "stop" if self.stops.matched is not None else _finish_reason(end)
        if reason != "length":  # a call cut short is no call; its text is in Finished.messages
            yield from self._end_call()
        if self.called and reason == "stop":
            reason = "tool_calls"
        messages = tuple(self.parser.messages)
        finished = _finished(end, self.tokens, reason, self.stops.matched)
        yield replace(
            finished,
            messages=messages,
            reasoning_tokens=self.reasoning_tokens,
            conversation=self.asked.append(*messages),
        )

    def _route(self, deltas: list[Delta]) -> Iterator[Event]:
        for delta in deltas:
            if delta.starts:
                yield from self._end_call()
            if delta.kind == "call":
                yield self._call_delta(delta)
            elif delta.kind == "reasoning" and delta.text:
                yield ReasoningDelta(delta.text)
            elif delta.kind == "text":
                self.text_tokens.advance(delta.text)
                text, _ = self.stops.push(delta.text)
                if text:
                    yield self.text_tokens.delta(text, delta.channel == "commentary")

    def _call_delta(self, delta: Delta) -> ToolCallDelta:
        id, name = self.call = self.call or (f"call_{secrets.token_hex(8)}", self.names.original(delta.function or ""))
        self.arguments.append(delta.text)
        return ToolCallDelta(id, name, delta.text)

    def _end_call(self) -> Iterator[Event]:
        if self.call is not None:
            yield ToolCall(*self.call, "".join(self.arguments))
            self.called = True
        self.call, self.arguments = None, []


@dataclass
class RawReader:
    """Reads a raw continuation: all of it is text."""

    decoder: IncrementalDecoder | None
    stops: StopStrings
    tokens: list[Token] = field(default_factory=list)
    text_tokens: TextTokens = field(default_factory=TextTokens)

    def push(self, token: Token) -> Iterator[Event]:
        if self.stops.matched is None:
            self.tokens.append(token)
            self.text_tokens.add(token)
            yield from self._show("" if self.decoder is None else self.decoder.push(token.id))

    def finish(self, end: engines.Finished) -> Iterator[Event]:
        yield from self._show("" if self.decoder is None else self.decoder.flush())
        if held := self.stops.flush():
            yield self.text_tokens.delta(held)
        reason: FinishReason = "stop" if self.stops.matched is not None else _finish_reason(end)
        yield _finished(end, self.tokens, reason, self.stops.matched)

    def _show(self, text: str) -> Iterator[Event]:
        self.text_tokens.advance(text)
        text, _ = self.stops.push(text)
        if text:
            yield self.text_tokens.delta(text)


def _finish_reason(end: engines.Finished) -> FinishReason:
    """The finish reason of a stream that no stop string ended."""
    return "length" if end.reason == "length" else "stop"


def _finished(
    end: engines.Finished,
    tokens: list[Token],
    reason: FinishReason,
    stop_string: str | None,
) -> Finished:
    computed = end.prompt_tokens - end.cached_tokens
    return Finished(
        finish_reason=reason,
        usage=Usage(end.prompt_tokens, len(tokens), end.cached_tokens),
        timings=Timings(
            ttft_s=end.ttft_s,
            prefill_tok_s=computed / end.prefill_s if end.prefill_s else 0.0,
            decode_tok_s=(end.completion_tokens - 1) / end.decode_s if end.decode_s else 0.0,
            queue_s=end.queue_s,
        ),
        tokens=tuple(tokens),
        drafted=end.drafted,
        accepted=end.accepted,
        stop_string=stop_string,
    )
