"""POST /v1/completions: raw text or token ids, continued. No conversation, no Harmony."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ..chat.reply import Event, Finished, TextDelta
from ..chat.stream import Events
from ..engine import Token
from ..sampling import Sampling
from ..tokenizer import Tokenizer
from .arrivals import Arrivals, unless_gone
from .chat_completions import MOST_CHOICES
from .errors import Json, from_exception, refuse
from .fields import BIG, SamplingFields, StreamOptions, WithoutEffect, seeded
from .service import Here, Service
from .sse import ANSWERS, DONE, EventStream, frame, frames

DEFAULT_MAX_TOKENS = 16  # OpenAI's

Ids = Annotated[list[int], Field(min_length=1)]

router = APIRouter()


class CompletionRequest(SamplingFields, WithoutEffect):
    """prompt: text, in which special tokens are meant, or token ids, or a list of either. max_tokens: 16 by default.
    echo: the prompt's text comes first. logprobs: so many alternatives for each token."""

    model: str | None = None
    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=MOST_CHOICES)]
    max_tokens: int | None = Field(None, ge=1, le=BIG)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def prompts(self) -> Sequence[Any]:
        """Each a string or ids."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]

    def check(self) -> None:
        """What the types alone cannot say."""
        if self.echo and self.logprobs is not None:
            raise refuse("echo", "with logprobs would need those of the prompt: ask for one of them")
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "needs stream: true")
        if len(self.prompts) * (self.n or 1) > MOST_CHOICES:
            raise refuse("n", f"times the number of prompts must be at most {MOST_CHOICES}")


@router.post("/v1/completions", responses=ANSWERS)
async def create(body: CompletionRequest, request: Request, service: Here) -> Response:
    """What comes after a text."""
    completion = _Completion(body, service)
    arrivals = await unless_gone(request, service.start(*completion.replies()))
    if body.stream:
        return EventStream(completion.stream(arrivals), partial(service.finish, arrivals))
    return Json(await unless_gone(request, completion.whole(arrivals)))


async def whole(body: CompletionRequest, service: Service) -> dict[str, Any]:
    """The same for a line of a batch."""
    completion = _Completion(body, service)
    return await completion.whole(await service.start(*completion.replies()))


class _Completion:
    """One request's choices, n for each prompt, from events to chunks."""

    def __init__(self, body: CompletionRequest, service: Service) -> None:
        service.check_model(body.model)
        body.check()
        self._body = body
        self._service = service
        self._choices = [
            _Choice(index, service.model.tokenizer, body.logprobs is not None)
            for index in range(len(body.prompts) * (body.n or 1))
        ]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_id,
        }

    def replies(self) -> list[partial[Events]]:
        body = self._body
        sampling = body.sampling(self._service.model.default_sampling, body.logprobs or 0)
        return [partial(self._start, choice, sampling) for choice in self._choices]

    def _start(self, choice: _Choice, sampling: Sampling) -> Events:
        """Submit one choice. Not on the event loop: a prompt may be long."""
        model, (place, number) = self._service.model, divmod(choice.index, self._body.n or 1)
        prompt = self._body.prompts[place]
        ids = model.tokenizer.encode_with_specials(prompt) if isinstance(prompt, str) else prompt
        if self._body.echo:
            choice.echoed = model.tokenizer.decode(ids, specials=True)
        most = self._body.max_tokens or DEFAULT_MAX_TOKENS
        return model.stream_raw(ids, max_tokens=most, sampling=seeded(sampling, number))

    async def pieces(self, arrivals: Arrivals) -> AsyncIterator[list[dict[str, Any]]]:
        """Entries of a chunk's `choices`, in batches."""
        watches = [self._service.metrics.watch() for _ in self._choices]
        try:
            yield [choice.piece(choice.echoed) for choice in self._choices if choice.echoed]
            async for batch in arrivals.batches():
                for index, event in batch:
                    watches[index].saw(event)
                yield [piece for index, event in batch for piece in self._choices[index].pieces(event)]
        finally:
            self._service.finish(arrivals)

    async def stream(self, arrivals: Arrivals) -> AsyncIterator[bytes]:
        options = self._body.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        try:
            async for made in self.pieces(arrivals):
                yield frames({**self._head, "choices": [piece], **usage} for piece in made)
            if usage:
                yield frame({**self._head, "choices": [], "usage": self._usage()})
        except Exception as error:
            yield frame(from_exception(error).body())
        else:
            yield DONE

    async def whole(self, arrivals: Arrivals) -> dict[str, Any]:
        """All pieces, added up."""
        choices = [choice.piece("") for choice in self._choices]
        async for made in self.pieces(arrivals):
            for piece in made:
                choice = choices[piece["index"]]
                choice["text"] += piece["text"]
                choice["finish_reason"] = piece["finish_reason"]
                for name, values in (piece["logprobs"] or {}).items():
                    choice["logprobs"][name] += values
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        ends = [choice.end.usage for choice in self._choices if choice.end is not None]
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
    """One continuation: its events become pieces of text."""

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: bool) -> None:
        self.index = index
        self.echoed = ""
        self.end: Finished | None = None
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._offset = 0  # characters so far

    def pieces(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, TextDelta):
            return [self.piece(event.text, event.tokens)]
        if isinstance(event, Finished):
            self.end = event
            return [self.piece("", reason=event.finish_reason)]
        return []

    def piece(self, text: str, tokens: Sequence[Token] = (), reason: str | None = None) -> dict[str, Any]:
        shown = self._shown(tokens) if self._logprobs else None
        self._offset += len(text)
        return {"index": self.index, "text": text, "logprobs": shown, "finish_reason": reason}

    def _shown(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        """OpenAI's older form: lists side by side. A token in the middle of a character begins where that does."""
        name = [self._tokenizer.decode([token.id]) for token in tokens]
        offsets = [self._offset + sum(map(len, name[:place])) for place in range(len(name))]
        return {
            "tokens": name,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._tokenizer.decode([id]): value for id, value in token.top} for token in tokens],
            "text_offset": offsets,
        }
