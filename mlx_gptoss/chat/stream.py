"""From a conversation to a stream of events: the one path that the Python API, the commands and the server share.

It knows the engine (ids), the tokenizer (text) and Harmony (what the text means), but no device and no file.
"""

from __future__ import annotations

import datetime
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..engine import Engine, Guide, LoadedAdapter, Request, Stream, Token
from ..engine.stop import StopStrings
from ..errors import GptOssError, InvalidRequest
from ..harmony.guide import guide_for
from ..harmony.messages import Conversation, Effort, Message, without_old_reasoning
from ..harmony.openai import from_chat
from ..harmony.openai_tools import tool_choice_of
from ..harmony.parse import Parser
from ..harmony.render import prefill_ids, render
from ..options import GenerationOptions
from ..options.check import shown
from ..sampling import Sampling
from ..tokenizer import CALL, END, RETURN, Tokenizer
from .reply import Event, RawReader, Reader, ReplyReader
from .structured import as_response_format
from .tool import AnyTool, functions_of

MAX_STOP_IDS = 64

Prompt = str | Sequence[Mapping[str, Any]] | Conversation


def as_conversation(
    prompt: Prompt,
    *,
    reasoning: Effort | None = None,
    system: str | None = None,
    tools: Sequence[AnyTool] = (),
) -> Conversation:
    """The prompt as a Conversation, dated today and without the reasoning that led to earlier answers.

    A Conversation is returned as it is; reasoning, system and tools are then refused (InvalidRequest).
    """
    if isinstance(prompt, Conversation):
        if reasoning is not None or system is not None or tools:
            raise InvalidRequest("a Conversation has its own reasoning, instructions and functions; set them in it")
        return prompt
    conversation = from_chat(
        _messages(prompt),
        reasoning=reasoning or "medium",
        system=system,
        tools=functions_of(tools),
        date=datetime.date.today().isoformat(),
    )
    return replace(conversation, messages=without_old_reasoning(conversation.messages))


def _messages(prompt: Any) -> Sequence[Mapping[str, Any]]:
    """The messages of a prompt that is no Conversation; from_chat checks each. Raises InvalidRequest."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InvalidRequest("the prompt is empty; write a question")
        return [{"role": "user", "content": prompt}]
    if inspect.iscoroutine(prompt):
        prompt.close()  # without a warning that it was never awaited
        raise InvalidRequest("the prompt is a coroutine: write await before the call that made it")
    if isinstance(prompt, Mapping):
        raise InvalidRequest("the prompt is one message, and must be a list of messages: put it in brackets, [{...}]")
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise InvalidRequest(
            f"the prompt must be a question, a list of messages or a Conversation, not {shown(prompt)}"
        )
    for index, message in enumerate(prompt):
        if isinstance(message, Message):
            raise InvalidRequest(f"messages[{index}] is a Message; give Conversation().append(*messages)")
    return prompt


def stream_chat(
    engine: Engine,
    tokenizer: Tokenizer,
    conversation: Conversation,
    options: GenerationOptions,
    *,
    sampling: Sampling,
    stop_ids: frozenset[int],
    adapter: LoadedAdapter | None = None,
) -> Events:
    """Generate the assistant's next turn.

    options: without reasoning, system and tools, which the conversation has. A response_format replaces the
        conversation's own for this turn. It is enforced (harmony/guide.py), as are tool_choice and what functions take.
    stop_ids: token ids that end the turn, in addition to <|return|> and <|call|>. adapter: the LoRA adapter to use;
        None is the model without one.

    Raises InvalidRequest at once, not on the first next(), for an empty conversation, one longer than the context, and
    for what cannot be enforced.
    """
    if not conversation.messages:
        raise InvalidRequest("the conversation is empty; give at least one message")
    asked = conversation
    if options.response_format is not None:
        conversation = replace(conversation, response_format=as_response_format(options.response_format))
    choice = tool_choice_of(options.tool_choice, conversation.functions)
    guide = guide_for(conversation, tokenizer, choice)
    stop_ids = stop_ids | {tokenizer.special(RETURN), tokenizer.special(CALL), *_checked_stop_ids(options, engine)}
    ends = frozenset(tokenizer.special(name) for name in (END, RETURN, CALL))
    prompt = tuple(render(conversation, tokenizer, engine.limits.max_context))
    max_tokens = _max_tokens(engine, options.max_tokens)
    request = Request(prompt, max_tokens, sampling, stop_ids, guide, message_ends=ends, adapter=adapter)
    parser = Parser(tokenizer)
    for id in prefill_ids(conversation, tokenizer):
        parser.push(id)
        if guide is not None:
            _accept_prefill(guide, id)
    stream = engine.submit(request)
    return Events(stream, ReplyReader(tokenizer, parser, StopStrings(sampling.stop), asked.names, asked))


def stream_raw(
    engine: Engine,
    tokenizer: Tokenizer | None,
    prompt: tuple[int, ...],
    *,
    stop_ids: frozenset[int],
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
    adapter: LoadedAdapter | None = None,
) -> Events:
    """Continue token ids without a chat format: TextDelta events, special tokens left out, then Finished.

    Without a tokenizer there is no text, only Finished, and stop strings are refused (InvalidRequest).
    """
    sampling = sampling or Sampling()
    if tokenizer is None and sampling.stop:
        raise InvalidRequest("stop strings need a tokenizer, and this checkpoint has none; leave them out")
    stream = engine.submit(Request(prompt, _max_tokens(engine, max_tokens), sampling, stop_ids, adapter=adapter))
    decoder = None if tokenizer is None else tokenizer.decoder()
    return Events(stream, RawReader(decoder, StopStrings(sampling.stop)))


def _accept_prefill(guide: Guide, id: int) -> None:
    """Advance a guide by a token of the prefill. Raises InvalidRequest for one that it does not allow."""
    try:
        guide.accept(id)
    except GptOssError as error:
        message = "the last message, of the assistant, cannot be continued under this tool choice and response format"
        raise InvalidRequest(f"{message}; leave it out") from error


def _checked_stop_ids(options: GenerationOptions, engine: Engine) -> Sequence[int]:
    ids, size = options.stop_token_ids, engine.config.vocab_size
    if len(ids) > MAX_STOP_IDS or any(type(id) is not int or not 0 <= id < size for id in ids):
        allowed = f"a list of at most {MAX_STOP_IDS} token ids from 0 to {size - 1}"
        raise InvalidRequest(f"stop_token_ids must be {allowed}, not {shown(ids)}")
    return ids


def _max_tokens(engine: Engine, max_tokens: int | None) -> int:
    return engine.limits.max_context if max_tokens is None else max_tokens


class Events(Iterator[Event]):
    """An iterator over the events of one reply, for one consumer. It raises the error that failed the request.

    close() ends the generation within one step; so does dropping the iterator.
    """

    def __init__(self, stream: Stream, reader: Reader) -> None:
        self._stream = stream
        self._reader = reader
        self._pending: deque[Event] = deque()
        self._closed = False

    def __next__(self) -> Event:
        while not self._pending:
            if self._closed:
                raise StopIteration
            for token in self._stream:
                self._take(token)
                if self._pending:
                    break
            else:
                self._end()
        return self._pending.popleft()

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in the prompt. It is known before the first event."""
        return self._stream.prompt_tokens

    def ready(self) -> list[Event]:
        """The events available now, without waiting. Call it again until it returns none."""
        while not self._closed and (tokens := self._stream.ready()):
            for token in tokens:
                self._take(token)
        self._end()
        events = list(self._pending)
        self._pending.clear()
        return events

    def on_arrival(self, notify: Callable[[], None]) -> None:
        """Call `notify()` once now, and then on the engine's thread whenever there may be more events. It must not
        block."""
        self._stream.on_arrival(notify)

    def close(self) -> None:
        """End the generation; no more events follow. Any thread may call it."""
        self._closed = True
        self._pending.clear()
        self._stream.cancel()

    def _take(self, token: Token) -> None:
        self._pending.extend(self._reader.push(token))
        if self._reader.stops.matched is not None:
            self._stream.cancel()

    def _end(self) -> None:
        if self._stream.finished is not None and not self._closed:
            self._closed = True
            self._pending.extend(self._reader.finish(self._stream.finished))


def with_reply(conversation: Conversation, reply: tuple[Message, ...]) -> Conversation:
    """The conversation with a reply appended, ready for the next turn. Reasoning that led to an answer is dropped."""
    return conversation.append(*reply)
