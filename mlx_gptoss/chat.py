"""From a conversation to events, as they arrive. The one path that the Python API and the command line share.

Knows the engine (ids), the tokenizer (text) and Harmony (what the text means); knows no device and no file.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .engine import Engine, Request, Stream, Token
from .engine.stop import StopStrings
from .errors import GptOssError, InvalidRequest
from .harmony.messages import Conversation, Effort, Message, without_old_reasoning
from .harmony.openai import from_chat
from .harmony.parse import Delta, Parser
from .harmony.render import render
from .sampling import Sampling
from .tokenizer import CALL, RETURN, Tokenizer

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the analysis channel."""

    text: str


@dataclass(frozen=True)
class TextDelta:
    """More of what the user is meant to read: the final channel, and preambles on commentary."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete call of a function. arguments: JSON text as the model wrote it, not checked."""

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
    ready to be appended to the conversation. drafted, accepted: tokens that were guessed ahead, and the right ones."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    tokens: tuple[Token, ...]
    messages: tuple[Message, ...] = ()
    drafted: int = 0
    accepted: int = 0


Event = ReasoningDelta | TextDelta | ToolCall | Finished


Prompt = str | Sequence[Mapping[str, Any]] | Conversation


def as_conversation(
    prompt: Prompt,
    *,
    reasoning: Effort | None = None,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Conversation:
    """A prompt of any of the three kinds as a Conversation, dated today and without the reasoning that led to earlier
    answers, unless it is one already."""
    if isinstance(prompt, Conversation):
        if reasoning is not None or system is not None or tools:
            raise InvalidRequest("a Conversation has its own reasoning, instructions and functions; set them there")
        return prompt
    if isinstance(prompt, str) and not prompt.strip():
        raise InvalidRequest("the prompt is empty; write a question")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    conversation = from_chat(
        messages,
        reasoning=reasoning or "medium",
        system=system,
        tools=tools,
        date=datetime.date.today().isoformat(),
    )
    return replace(conversation, messages=without_old_reasoning(conversation.messages))


def stream_chat(
    engine: Engine,
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    stop_ids: frozenset[int],
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
) -> Iterator[Event]:
    """The assistant's next turn. max_tokens None: as many as the context holds.

    Raises InvalidRequest at once (not on the first next()) for an empty conversation or one longer than the context.
    Closing the iterator cancels the request.
    """
    if not conversation.messages:
        raise InvalidRequest("the conversation is empty; give at least one message")
    sampling = sampling or Sampling()
    stop_ids = stop_ids | {tokenizer.special(RETURN), tokenizer.special(CALL)}
    stream = _submit(engine, tuple(render(conversation, tokenizer)), max_tokens, sampling, stop_ids)
    return _Turn(stream, Parser(tokenizer), StopStrings(sampling.stop)).events()


def stream_raw(
    engine: Engine,
    tokenizer: Tokenizer | None,
    prompt: tuple[int, ...],
    *,
    stop_ids: frozenset[int],
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
) -> Iterator[Event]:
    """Plain continuation of token ids: TextDelta events, special tokens left out, and Finished. Otherwise as above.

    Without a tokenizer there is no text, only Finished; stop strings are then refused.
    """
    sampling = sampling or Sampling()
    if tokenizer is None and sampling.stop:
        raise InvalidRequest("stop strings need a tokenizer, and this checkpoint has none; leave them out")
    stream = _submit(engine, prompt, max_tokens, sampling, stop_ids)
    return _raw_events(stream, tokenizer, StopStrings(sampling.stop))


def _submit(
    engine: Engine, prompt: tuple[int, ...], max_tokens: int | None, sampling: Sampling, stop_ids: frozenset[int]
) -> Stream:
    most = engine.limits.max_context if max_tokens is None else max_tokens
    return engine.submit(Request(prompt, most, sampling, stop_ids))


@dataclass
class _Turn:
    """One reply while it is being generated: each parsed piece becomes reasoning, text or part of a tool call."""

    stream: Stream
    parser: Parser
    stops: StopStrings
    tokens: list[Token] = field(default_factory=list)
    called: bool = False
    name: str | None = None  # of the function that is being called
    arguments: list[str] = field(default_factory=list)

    def events(self) -> Iterator[Event]:
        try:
            for token in self.stream:
                self.tokens.append(token)
                yield from self._route(self.parser.push(token.id))
                if self.stops.matched is not None:
                    break
            yield from self._route(self.parser.finish())
            if held := self.stops.flush():
                yield TextDelta(held)
            reason: FinishReason = "stop" if self.stops.matched is not None else _reason(self.stream)
            if reason != "length":  # half a call is none; its text is in Finished.messages
                yield from self._end_call()
            if self.called and reason == "stop":
                reason = "tool_calls"
            yield _finished(self.stream, self.tokens, reason, tuple(self.parser.messages))
        finally:
            self.stream.cancel()

    def _route(self, deltas: list[Delta]) -> Iterator[Event]:
        for delta in deltas:
            if delta.starts:
                yield from self._end_call()
            if delta.kind == "call":
                self.name = delta.function
                self.arguments.append(delta.text)
            elif delta.kind == "reasoning" and delta.text:
                yield ReasoningDelta(delta.text)
            elif delta.kind == "text":
                text, _ = self.stops.push(delta.text)
                if text:
                    yield TextDelta(text)

    def _end_call(self) -> Iterator[Event]:
        if self.name is not None:
            yield ToolCall(f"call_{secrets.token_hex(8)}", self.name, "".join(self.arguments))
            self.called = True
        self.name, self.arguments = None, []


def _raw_events(stream: Stream, tokenizer: Tokenizer | None, stops: StopStrings) -> Iterator[Event]:
    decoder = None if tokenizer is None else tokenizer.decoder()
    tokens: list[Token] = []
    try:
        for token in stream:
            tokens.append(token)
            text, stopped = stops.push("" if decoder is None else decoder.push(token.id))
            if text:
                yield TextDelta(text)
            if stopped:
                break
        rest = stops.push("" if decoder is None else decoder.flush())[0] + stops.flush()
        if rest:
            yield TextDelta(rest)
        yield _finished(stream, tokens, "stop" if stops.matched is not None else _reason(stream), ())
    finally:
        stream.cancel()


def _reason(stream: Stream) -> FinishReason:
    """How a stream that ran to its end ended."""
    assert stream.finished is not None
    return "length" if stream.finished.reason == "length" else "stop"


def _finished(stream: Stream, tokens: list[Token], reason: FinishReason, messages: tuple[Message, ...]) -> Finished:
    """Ends the stream if a stop string has not let it run out, and adds up what it cost."""
    stream.cancel()
    end = stream.drain()
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
        drafted=end.drafted,
        accepted=end.accepted,
    )


def answered(conversation: Conversation, reply: tuple[Message, ...]) -> Conversation:
    """The conversation with a reply appended, ready for the next turn: reasoning that led to an answer is dropped."""
    return replace(conversation, messages=without_old_reasoning(conversation.messages + reply))


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
