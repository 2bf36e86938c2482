"""POST /v1/completions: continue raw text or token ids, without a conversation and without the Harmony format."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ...chat.reply import Event, Finished, TextDelta
from ...chat.stream import Events
from ...engine import Token
from ...sampling import Sampling
from ...tokenizer import Tokenizer
from ..body import BodyRoute
from ..disconnect import on_thread
from ..errors import from_exception, invalid_field
from ..event_queue import EventQueue
from ..fields import MaxTokens, Name, SamplingFields, StreamOptions, TokenIds, with_choice_seed
from ..ignored import ignore
from ..service import Service, ServiceDep
from ..sse import DONE, STREAMING_RESPONSES, encode_event, encode_events
from .chat_completions import MAX_CHOICES
from .respond import respond

DEFAULT_MAX_TOKENS = 16  # OpenAI's

MAX_ECHO_CHARACTERS = 4 << 20  # of all choices together

Ids = Annotated[TokenIds, Field(min_length=1)]

router: APIRouter = APIRouter(route_class=BodyRoute)


class CompletionRequest(SamplingFields):
    """The fields of OpenAI that this model supports.

    prompt: text (special tokens in it are recognized), token ids, or a list of either. max_tokens: 16 by default.
    echo: put the prompt before the completion. logprobs: number of alternatives per token.
    """

    model: Name | None = None
    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=MAX_CHOICES)]
    max_tokens: MaxTokens = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def prompts(self) -> Sequence[Any]:
        """The prompts, each a string or token ids."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]

    def check(self) -> None:
        """Raise ApiError for what cannot be honoured."""
        self.check_rejected()
        if self.echo and self.logprobs is not None:
            raise invalid_field("echo", "with logprobs is not supported: set only one of them")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise invalid_field("n", f"times the number of prompts must be at most {MAX_CHOICES}")


@router.post("/v1/completions", responses=STREAMING_RESPONSES)
async def create(body: CompletionRequest, request: Request, service: ServiceDep) -> Response:
    """Continue a text."""
    service = await service.select(body.model)
    completion = await on_thread(request, _Completion, body, service)
    ignore(request, completion.ignored)
    return await respond(completion, request, service, stream=bool(body.stream))


async def full_response(body: CompletionRequest, service: Service) -> dict[str, Any]:
    """Generate a full response, for one line of a batch file."""
    service = await service.select(body.model)
    completion = _Completion(body, service)
    return await completion.full_response(await service.start(*completion.replies()))


class _Completion:
    """One request: n choices per prompt, and their conversion from engine events to chunks.

    Raises ApiError if the request is invalid.
    """

    def __init__(self, body: CompletionRequest, service: Service) -> None:
        body.check()
        self.ignored: set[str] = body.ignored_fields()
        self._body = body
        self._service = service
        self._choices = [
            _Choice(index, service.model.tokenizer, body.logprobs is not None)
            for index in range(len(body.prompts) * (body.n or 1))
        ]
        self._base = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_id,
        }

    def replies(self) -> list[partial[Events]]:
        """One callable per choice that submits it to the engine, for Service.start()."""
        body = self._body
        sampling = body.sampling(self._service.model.default_sampling, body.logprobs or 0)
        return [partial(self._start, choice, sampling) for choice in self._choices]

    def _start(self, choice: _Choice, sampling: Sampling) -> Events:
        """Tokenize the prompt of one choice and submit it. Runs on a worker thread, since a prompt may be long."""
        model, (prompt_index, choice_of_prompt) = self._service.model, divmod(choice.index, self._body.n or 1)
        prompt = self._body.prompts[prompt_index]
        if isinstance(prompt, str):
            prompt = model.tokenizer.encode_within(model.max_context, prompt, specials=True)
        if self._body.echo:
            choice.echo_text = model.tokenizer.decode(prompt, specials=True)
            if sum(len(choice.echo_text) for choice in self._choices) > MAX_ECHO_CHARACTERS:
                raise invalid_field("echo", f"would return more than {MAX_ECHO_CHARACTERS} characters: leave it out")
        max_tokens = self._body.max_tokens or DEFAULT_MAX_TOKENS
        return self._service.stream_raw(
            prompt, max_tokens=max_tokens, sampling=with_choice_seed(sampling, choice_of_prompt)
        )

    async def chunks(self, queue: EventQueue) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield batches of entries for a chunk's `choices`, echoed prompts first."""
        recorders = [self._service.metrics.track_reply() for _ in self._choices]
        try:
            yield [choice.chunk(choice.echo_text) for choice in self._choices if choice.echo_text]
            async for batch in queue.batches():
                for index, event in batch:
                    recorders[index].record(event)
                yield [chunk for index, event in batch for chunk in self._choices[index].chunks(event)]
        finally:
            self._service.finish(queue)

    async def stream(self, queue: EventQueue) -> AsyncIterator[bytes]:
        """Yield server-sent events. An error in the middle becomes the last event, without [DONE]."""
        options = self._body.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        try:
            async for chunks in self.chunks(queue):
                yield encode_events({**self._base, "choices": [chunk], **usage} for chunk in chunks)
            if usage:
                yield encode_event({**self._base, "choices": [], "usage": self._usage()})
        except Exception as error:
            yield encode_event(from_exception(error).body())
        else:
            yield DONE

    async def full_response(self, queue: EventQueue) -> dict[str, Any]:
        """The sum of all chunks."""
        choices = [choice.chunk("") for choice in self._choices]
        async for chunks in self.chunks(queue):
            for chunk in chunks:
                choice = choices[chunk["index"]]
                choice["text"] += chunk["text"]
                choice["finish_reason"] = chunk["finish_reason"]
                for name, values in (chunk["logprobs"] or {}).items():
                    choice["logprobs"][name] += values
        return {**self._base, "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        ends = [choice.finished.usage for choice in self._choices if choice.finished is not None]
        prompts = ends[:: self._body.n or 1]
        prompt = sum(usage.prompt_tokens for usage in prompts)
        generated = sum(usage.completion_tokens for usage in ends)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        }


class _Choice:
    """One continuation of a prompt; converts its events to entries of a chunk."""

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: bool) -> None:
        self.index = index
        self.echo_text = ""
        self.finished: Finished | None = None
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._offset = 0  # characters sent so far

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """Convert one engine event."""
        if isinstance(event, TextDelta):
            return [self.chunk(event.text, event.tokens)]
        if isinstance(event, Finished):
            self.finished = event
            return [self.chunk("", reason=event.finish_reason)]
        return []

    def chunk(self, text: str, tokens: Sequence[Token] = (), reason: str | None = None) -> dict[str, Any]:
        """An entry of a chunk's `choices`. tokens: those of the text, for logprobs. reason: the finish reason."""
        logprobs = self._logprobs_object(tokens) if self._logprobs else None
        self._offset += len(text)
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs_object(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        """OpenAI's older format: parallel lists. A token inside a character has the text offset of that character."""
        texts = [self._tokenizer.decode([token.id]) for token in tokens]
        offsets = [self._offset + sum(map(len, texts[:index])) for index in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._tokenizer.decode([id]): value for id, value in token.top} for token in tokens],
            "text_offset": offsets,
        }
