"""POST /v1/responses/compact: a long conversation as a few items that a next request sends in its place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...chat.reply import Finished, ReasoningDelta, TextDelta
from ...harmony.messages import Message
from ...harmony.render import instructions_text
from ..body import BodyRoute
from ..disconnect import cancel_on_disconnect, on_thread
from ..errors import JsonResponse
from ..event_queue import EventQueue
from ..ignored import ignore
from ..service import Service, ServiceDep
from .context import read_context, submitter
from .conversation_items import SUMMARY_INTRODUCTION, ConversationItems
from .events import usage_object
from .items import new_id
from .opaque import pack
from .request import ContextRequest

MAX_SUMMARY_TOKENS = 4096
PROMPT = """\
Summarize this conversation for a model that will continue it without seeing it. Write down what the user wants, what \
has been done and found out, the names, numbers, files and commands that matter, and what remains to be done. Do not \
answer and do not call a tool; write only the summary."""

router: APIRouter = APIRouter(route_class=BodyRoute)


@router.post("/v1/responses/compact")
async def compact(body: ContextRequest, request: Request, service: ServiceDep) -> Response:
    """Return the messages of the user and the developer, and one item in which the model summarizes the conversation.

    The summary leaves out the oldest turns if the context cannot hold them.
    """
    service = await service.select(body.model)
    context = await on_thread(request, read_context, body, service)
    ignore(request, context.ignored)
    limit = min(MAX_SUMMARY_TOKENS, service.model.max_context // 4)
    ask = Message("developer", instructions_text(PROMPT))  # not the user's, so that a cut keeps the turn before it
    conversation = replace(
        context.conversation, messages=(*context.conversation.messages, ask), response_format=None, reasoning="low"
    )
    submit = submitter(service, conversation, truncate=True, max_tokens=limit, tool_choice="none")
    queue = await cancel_on_disconnect(request, service.start(submit))
    summary, end = await cancel_on_disconnect(request, _read(queue, service))
    compaction = {"id": new_id("cmp"), "type": "compaction", "encrypted_content": pack(summary)}
    return JsonResponse(
        {
            "id": new_id("resp"),
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [*_kept_messages(context.history), compaction],
            "usage": usage_object(end),
        }
    )


async def _read(queue: EventQueue, service: Service) -> tuple[str, Finished]:
    """The summary: the text of the reply, or its reasoning if the limit left no room for text."""
    text, reasoning, end = "", "", None
    recorder = service.metrics.track_reply()
    try:
        async for batch in queue.batches():
            for _, event in batch:
                recorder.record(event)
                if isinstance(event, TextDelta):
                    text += event.text
                elif isinstance(event, ReasoningDelta):
                    reasoning += event.text
                elif isinstance(event, Finished):
                    end = event
    finally:
        service.finish(queue)
    assert end is not None
    return text or reasoning, end


def _kept_messages(history: ConversationItems) -> Iterator[dict[str, Any]]:
    """The messages of the developer and the user as items. An earlier summary is part of the new one."""
    for text in history.instructions:
        yield _message("developer", text)
    for message in history.messages:
        if message.role == "developer":
            yield _message("developer", message.content.removeprefix(instructions_text("")))
        elif message.role == "user" and not message.content.startswith(SUMMARY_INTRODUCTION):
            yield _message("user", message.content)


def _message(role: str, text: str) -> dict[str, Any]:
    content = [{"type": "input_text", "text": text}]
    return {"id": new_id("msg"), "type": "message", "status": "completed", "role": role, "content": content}
