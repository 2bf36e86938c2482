"""What the tokens of one reply mean: events, as they arrive.

Takes tokens in and gives events out; waits for nothing and knows no engine that makes the tokens.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from .. import engine as engines
from ..engine import Token
from ..engine.stop import StopStrings
from ..errors import GptOssError
from ..harmony.messages import Message
from ..harmony.parse import Delta, Parser
from ..tokenizer import IncrementalDecoder, Tokenizer

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the analysis channel."""

    text: str


@dataclass(frozen=True)
class TextDelta:
    """More of what the user is meant to read: the final channel, and preambles on commentary. tokens: those that the
    text is made of; none for a text that came without a header. preamble: whether it stands on commentary."""

    text: str
    tokens: tuple[Token, ...] = ()
    preamble: bool = False


@dataclass(frozen=True)
class ToolCallDelta:
    """More of a call's arguments. The first one, perhaps without text, comes when the function is known."""

    id: str
    name: str
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete call of a function, after its deltas. arguments: JSON text as the model wrote it, not checked."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Usage:
    """Tokens. cached_tokens of the prompt did not have to be computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """ttft_s: seconds from asking to the first token. Rates in tokens per second, 0 where nothing was measured."""

    ttft_s: float
    prefill_tok_s: float
    decode_tok_s: float


@dataclass(frozen=True)
class Finished:
    """The last event. tokens: all that the model produced, Harmony's own included; messages: the same as parsed,
    ready to be appended to the conversation. reasoning_tokens: those of the analysis channel without its headers.
    drafted, accepted: tokens that were guessed ahead, and the right ones."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    tokens: tuple[Token, ...]
    messages: tuple[Message, ...] = ()
    reasoning_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


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
    """What the tokens of one stream mean. After a stop string matched, tokens mean nothing."""

    stops: StopStrings

    def push(self, token: Token) -> Iterable[Event]: ...

    def finish(self, end: engines.Finished) -> Iterable[Event]: ...


class _Said:
    """Which tokens a piece of text is made of: a character may take several, and stop strings hold text back."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Token]] = deque()  # with the characters before it
        self._read = 0
        self._shown = 0

    def heard(self, token: Token) -> None:
        self._waiting.append((self._read, token))

    def read(self, text: str) -> None:
        """The text that the tokens heard last have brought."""
        self._read += len(text)

    def delta(self, text: str, preamble: bool = False) -> TextDelta:
        """The next text that is shown."""
        self._shown += len(text)
        tokens = []
        while self._waiting and self._waiting[0][0] < self._shown:
            tokens.append(self._waiting.popleft()[1])
        return TextDelta(text, tuple(tokens), preamble)


@dataclass
class Turn:
    """One reply while it is being generated: each parsed piece becomes reasoning, text or part of a tool call."""

    tokenizer: Tokenizer
    parser: Parser
    stops: StopStrings
    tokens: list[Token] = field(default_factory=list)
    said: _Said = field(default_factory=_Said)
    reasoning_tokens: int = 0
    called: bool = False
    call: tuple[str, str] | None = None  # id and name of the function that is being called
    arguments: list[str] = field(default_factory=list)

    def push(self, token: Token) -> Iterator[Event]:
        if self.stops.matched is not None:
            return
        self.tokens.append(token)
        within = None if self.tokenizer.is_special(token.id) else self.parser.content_kind
        if within == "text":
            self.said.heard(token)
        self.reasoning_tokens += within == "reasoning"
        yield from self._route(self.parser.push(token.id))

    def finish(self, end: engines.Finished) -> Iterator[Event]:
        yield from self._route(self.parser.finish())
        if held := self.stops.flush():
            yield self.said.delta(held)
        reason: FinishReason = "stop" if self.stops.matched is not None else _reason(end)
        if reason != "length":  # half a call is none; its text is in Finished.messages
            yield from self._end_call()
        if self.called and reason == "stop":
            reason = "tool_calls"
        yield _finished(end, self.tokens, reason, tuple(self.parser.messages), self.reasoning_tokens)

    def _route(self, deltas: list[Delta]) -> Iterator[Event]:
        for delta in deltas:
            if delta.starts:
                yield from self._end_call()
            if delta.kind == "call":
                yield self._argue(delta)
            elif delta.kind == "reasoning" and delta.text:
                yield ReasoningDelta(delta.text)
            elif delta.kind == "text":
                self.said.read(delta.text)
                text, _ = self.stops.push(delta.text)
                if text:
                    yield self.said.delta(text, delta.channel == "commentary")

    def _argue(self, delta: Delta) -> ToolCallDelta:
        id, name = self.call = self.call or (f"call_{secrets.token_hex(8)}", delta.function or "")
        self.arguments.append(delta.text)
        return ToolCallDelta(id, name, delta.text)

    def _end_call(self) -> Iterator[Event]:
        if self.call is not None:
            yield ToolCall(*self.call, "".join(self.arguments))
            self.called = True
        self.call, self.arguments = None, []


@dataclass
class Continuation:
    """Raw text while it is being generated."""

    decoder: IncrementalDecoder | None
    stops: StopStrings
    tokens: list[Token] = field(default_factory=list)
    said: _Said = field(default_factory=_Said)

    def push(self, token: Token) -> Iterator[Event]:
        if self.stops.matched is None:
            self.tokens.append(token)
            self.said.heard(token)
            yield from self._show("" if self.decoder is None else self.decoder.push(token.id))

    def finish(self, end: engines.Finished) -> Iterator[Event]:
        yield from self._show("" if self.decoder is None else self.decoder.flush())
        if held := self.stops.flush():
            yield self.said.delta(held)
        yield _finished(end, self.tokens, "stop" if self.stops.matched is not None else _reason(end))

    def _show(self, text: str) -> Iterator[Event]:
        self.said.read(text)
        text, _ = self.stops.push(text)
        if text:
            yield self.said.delta(text)


def _reason(end: engines.Finished) -> FinishReason:
    """How a stream that ran to its end ended."""
    return "length" if end.reason == "length" else "stop"


def _finished(
    end: engines.Finished,
    tokens: list[Token],
    reason: FinishReason,
    messages: tuple[Message, ...] = (),
    reasoning_tokens: int = 0,
) -> Finished:
    computed = end.prompt_tokens - end.cached_tokens
    return Finished(
        finish_reason=reason,
        usage=Usage(end.prompt_tokens, len(tokens), end.cached_tokens),
        timings=Timings(
            ttft_s=end.ttft_s,
            prefill_tok_s=computed / end.prefill_s if end.prefill_s else 0.0,
            decode_tok_s=(end.completion_tokens - 1) / end.decode_s if end.decode_s else 0.0,
        ),
        tokens=tuple(tokens),
        messages=messages,
        reasoning_tokens=reasoning_tokens,
        drafted=end.drafted,
        accepted=end.accepted,
    )
