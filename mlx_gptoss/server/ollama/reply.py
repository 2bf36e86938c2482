"""One reply of /api/chat or /api/generate: engine events to lines. The full response is the sum of the lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...chat.reply import Event, Finished, ReasoningDelta, TextDelta, ToolCall
from ...chat.stream import Events
from ...errors import GptOssError
from ..disconnect import cancel_on_disconnect, on_thread
from ..errors import JsonResponse, from_exception
from ..event_queue import EventQueue
from ..ignored import ignore
from ..openai.chat_completions import logprob_entry
from ..service import Service
from .errors import error_body
from .fields import GenerationFields
from .ndjson import LineStream, encode_line, timestamp


@dataclass(frozen=True)
class Piece:
    """What one line adds to the reply: text, reasoning, complete tool calls, and logprobs of the text's tokens."""

    text: str = ""
    thinking: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    logprobs: tuple[dict[str, Any], ...] = ()

    @classmethod
    def sum(cls, pieces: Iterable[Piece]) -> Piece:
        """The whole reply."""
        pieces = list(pieces)
        return cls(
            "".join(piece.text for piece in pieces),
            "".join(piece.thinking for piece in pieces),
            tuple(call for piece in pieces for call in piece.calls),
            tuple(entry for piece in pieces for entry in piece.logprobs),
        )


class Reply:
    """One request that generates.

    fields_of: where the dialect puts a piece, such as {"message": {"role", "content", ...}}.
    """

    def __init__(self, body: GenerationFields, service: Service, fields_of: Callable[[Piece], dict[str, Any]]) -> None:
        self._body = body
        self._service = service
        self._fields_of = fields_of
        self._started = time.perf_counter_ns()
        self._calls = 0
        self._finished: Finished | None = None

    async def respond(self, request: Request, start: partial[Events]) -> Response:
        """Submit `start` to the engine and answer with lines, or with one object if the request says so."""
        ignore(request, await on_thread(request, self._body.ignored_fields))
        queue = await cancel_on_disconnect(request, self._service.start(start))
        if self._body.streamed:
            return LineStream(self.stream(queue), partial(self._service.finish, queue))
        return JsonResponse(await cancel_on_disconnect(request, self.full_response(queue)))

    async def idle_response(self, request: Request) -> Response:
        """The answer to a request with nothing to generate, by which clients load and unload a model. One without a
        process of its own stays loaded."""
        ignore(request, self._body.ignored_fields())
        if self._body.idle_reason == "load":
            await cancel_on_disconnect(request, self._service.load())
        elif self._service.pool is not None:
            await cancel_on_disconnect(request, self._service.unload())
        return JsonResponse(self._line(Piece(), {"done": True, "done_reason": self._body.idle_reason}))

    async def stream(self, queue: EventQueue) -> AsyncIterator[bytes]:
        """Yield lines. An error in the middle becomes the last line."""
        try:
            async for pieces in self._pieces(queue):
                yield b"".join(encode_line(self._line(piece, {"done": False})) for piece in pieces)
            yield encode_line(self._line(Piece(), self._end()))
        except Exception as error:
            yield encode_line(error_body(from_exception(error)))

    async def full_response(self, queue: EventQueue) -> dict[str, Any]:
        """The sum of all lines."""
        pieces = [piece async for batch in self._pieces(queue) for piece in batch]
        return self._line(Piece.sum(pieces), self._end())

    async def _pieces(self, queue: EventQueue) -> AsyncIterator[list[Piece]]:
        recorder = self._service.metrics.track_reply()
        try:
            async for batch in queue.batches():
                pieces = []
                for _, event in batch:
                    recorder.record(event)
                    pieces += self._piece(event)
                if pieces:
                    yield pieces
        finally:
            self._service.finish(queue)

    def _piece(self, event: Event) -> list[Piece]:
        """Convert one engine event."""
        match event:
            case ReasoningDelta() if self._body.think is not False:
                return [Piece(thinking=event.text)]
            case TextDelta():
                tokens = event.tokens if self._body.logprobs else ()
                tokenizer = self._service.model.tokenizer
                return [Piece(event.text, logprobs=tuple(logprob_entry(token, tokenizer) for token in tokens))]
            case ToolCall():
                return [Piece(calls=(self._call(event),))]
            case Finished():
                self._finished = event
        return []  # the deltas of a call: it is sent when it is complete

    def _call(self, call: ToolCall) -> dict[str, Any]:
        """A tool call with its arguments as an object. Raises GptOssError if the model wrote something else."""
        try:
            arguments = json.loads(call.arguments, parse_float=_finite, parse_constant=_finite)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise GptOssError(f"the model called {call.name!r} with arguments that are not a JSON object: try again")
        index, self._calls = self._calls, self._calls + 1
        return {"id": call.id, "function": {"index": index, "name": call.name, "arguments": arguments}}

    def _line(self, piece: Piece, end: dict[str, Any]) -> dict[str, Any]:
        head = {"model": self._service.model_id, "created_at": timestamp()}
        logprobs = {"logprobs": list(piece.logprobs)} if piece.logprobs else {}
        return {**head, **self._fields_of(piece), **end, **logprobs}

    def _end(self) -> dict[str, Any]:
        """The fields of the last line: why the reply ended, token counts, and durations in nanoseconds."""
        assert self._finished is not None
        usage, timings = self._finished.usage, self._finished.timings
        computed = usage.prompt_tokens - usage.cached_tokens
        return {
            "done": True,
            "done_reason": "length" if self._finished.finish_reason == "length" else "stop",
            "total_duration": time.perf_counter_ns() - self._started,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(computed, timings.prefill_tok_s),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(usage.completion_tokens - 1, timings.decode_tok_s),
        }


def _finite(text: str) -> float:
    """A number that JSON can hold. Raises ValueError for NaN and infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _nanoseconds(tokens: int, rate: float) -> int:
    """How long `tokens` took at a rate per second; 0 if it was not measured."""
    return round(tokens / rate * 1e9) if rate > 0 else 0
