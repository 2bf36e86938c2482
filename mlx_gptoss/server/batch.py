"""Answers a batch file: each line goes through the same code as a request to the server, without HTTP.

Twice as many lines are in progress as there are slots, so that the next one is ready when a slot becomes free.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from ..errors import InvalidRequest
from .batch_files import AnswerFile, LineError, RequestFile, answer_entry, check_line, is_failed, parse_line
from .disconnect import cancel_and_wait
from .errors import from_exception, from_validation, invalid_field
from .fields import RequestModel
from .openai import chat_completions, completions, response_request, responses
from .service import Service

FullResponse = Callable[[Any, Service], Awaitable[dict[str, Any]]]

ENDPOINTS: dict[str, tuple[type[RequestModel], FullResponse]] = {
    "/v1/chat/completions": (chat_completions.ChatRequest, chat_completions.full_response),
    "/v1/responses": (response_request.ResponsesRequest, responses.full_response),
    "/v1/completions": (completions.CompletionRequest, completions.full_response),
}


class Batch:
    """A batch: a file of requests and a file of answers, in OpenAI's format. A context manager.

    retry: repeat the requests that failed in an earlier run.
    total: number of requests. done, failed: number of answers, those of earlier runs included. earlier: those of
    earlier runs alone. prompt_tokens, completion_tokens: of this run.
    Raises InvalidRequest if a file has the wrong content, and GptOssError if the answers cannot be written or another
    process is writing them.
    """

    prompt_tokens: int
    completion_tokens: int

    def __init__(self, requests: Path, answers: Path, *, retry: bool = False) -> None:
        if answers.exists() and requests.exists() and answers.samefile(requests):
            raise InvalidRequest(f"{answers} is the file of requests: name another file for the answers")
        self._requests = RequestFile(requests)
        self._answers = AnswerFile(answers, self._requests, retry=retry)
        self.total: int = self._requests.total
        self.earlier: int = self.done
        self.prompt_tokens = self.completion_tokens = 0
        self._started = self._ended = 0.0

    @property
    def done(self) -> int:
        """Number of answers in the file."""
        return self._answers.done

    @property
    def failed(self) -> int:
        """Number of them that are errors."""
        return self._answers.failed

    @property
    def seconds(self) -> float:
        """Seconds from the start of this run to its latest answer."""
        return self._ended - self._started

    @property
    def completion_tok_s(self) -> float:
        """Generated tokens per second in this run."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    def run(self, service: Service, progress: Callable[[], None]) -> None:
        """Answer the lines that have no answer yet. progress: called whenever more answers have been written to disk.

        Raises GptOssError if the answers cannot be written or the engine was closed, and KeyboardInterrupt on Ctrl-C.
        Answers that are already written stay in the file.
        """
        self._started = self._ended = time.perf_counter()
        asyncio.run(self._run(service, progress))

    async def _run(self, service: Service, progress: Callable[[], None]) -> None:
        pending = self._requests.pending()
        in_flight: set[asyncio.Task[dict[str, Any]]] = set()
        max_in_flight = 2 * service.model.status.slots
        try:
            while True:
                for line in islice(pending, max_in_flight - len(in_flight)):
                    in_flight.add(asyncio.create_task(_answer_line(service, *line)))
                if not in_flight:
                    return
                done, in_flight = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
                entries = await asyncio.gather(*done)
                self._answers.append(entries)
                self._count(entries)
                progress()
        finally:
            await cancel_and_wait(*in_flight)

    def _count(self, entries: Iterable[dict[str, Any]]) -> None:
        self._ended = time.perf_counter()
        for entry in entries:
            if not is_failed(entry):
                usage = entry["response"]["body"]["usage"]
                self.prompt_tokens += usage.get("prompt_tokens", 0) + usage.get("input_tokens", 0)
                self.completion_tokens += usage.get("completion_tokens", 0) + usage.get("output_tokens", 0)

    def close(self) -> None:
        """Unlock and close the answer file."""
        self._answers.close()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


async def _answer_line(service: Service, number: int, line: bytes, duplicate: bool) -> dict[str, Any]:
    """Return the answer to one line. Raises GptOssError if the engine was closed: the line then stays unanswered."""
    custom_id = None
    try:
        fields = parse_line(line)
        if duplicate:
            message = f"the custom_id {fields['custom_id']!r} is used by an earlier line: give each line its own"
            raise LineError("duplicate_custom_id", message, "custom_id")
        custom_id = fields["custom_id"]
        check_line(fields, tuple(ENDPOINTS))
    except LineError as error:
        return answer_entry(custom_id, error=error.body(number))
    status, body = await _respond(service, fields["url"], fields["body"])
    response = {"status_code": status, "request_id": f"req_{secrets.token_hex(16)}", "body": body}
    return answer_entry(custom_id, response=response)


async def _respond(service: Service, url: str, content: Any) -> tuple[int, dict[str, Any]]:
    """Return the status and the body that the server would send."""
    request_class, full_response = ENDPOINTS[url]
    try:
        try:
            body = request_class.model_validate(content)
        except ValidationError as error:
            errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
            raise from_validation(RequestValidationError(errors)) from None
        if getattr(body, "stream", None):
            raise invalid_field("stream", "is not supported in a batch: leave it out")
        return 200, await full_response(body, service)
    except Exception as error:
        api_error = from_exception(error)
    if api_error.status >= 500:
        _ = service.model.status  # raises if the engine was closed
    return api_error.status, api_error.body()
