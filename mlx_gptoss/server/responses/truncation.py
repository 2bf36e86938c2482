"""Dropping the oldest turns of a conversation that the context cannot hold (`truncation: "auto"`).

The place of the cut moves in steps of a quarter of the context. So consecutive requests of a growing conversation are
mostly cut at the same place, and the prefix cache can provide what follows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from ...errors import PromptTooLong
from ...harmony.messages import Conversation, Message
from ...harmony.render import render, render_message
from ..models.named import ServedModel

STEPS = 4  # per context
MAX_CONTEXTS = 8  # in a conversation: all of it is encoded, to know where to cut


def truncated(conversation: Conversation, model: ServedModel, max_tokens: int | None) -> Conversation:
    """Return the conversation without its oldest turns, so that the context holds its prompt and a reply.

    max_tokens: of the reply; by default an eighth of the context is kept free. Instructions stay, also those between
    turns. A call stays together with its result. If the last turn alone is too long, its oldest calls are dropped.
    Returns the shortest conversation that this leaves if the context cannot hold even that. Raises PromptTooLong for a
    conversation of more than MAX_CONTEXTS times the context.
    """
    context, tokenizer = model.max_context, model.tokenizer
    limit = context - max(1, min(max_tokens or context // 8, context // 2))
    try:
        excess = len(render(conversation, tokenizer, MAX_CONTEXTS * context)) - limit
    except PromptTooLong:
        raise PromptTooLong(
            f"the conversation has more than {MAX_CONTEXTS} times the {context} tokens that the context holds; send "
            "its latest turns only"
        ) from None
    if excess <= 0:
        return conversation
    messages = conversation.messages
    sizes = [0 if m.role == "developer" else len(render_message(m, tokenizer)) for m in messages]
    before = [0, *accumulate(sizes)]
    step = -(-limit // STEPS)
    target = -(-excess // step) * step
    begin, opening = 0, None
    for begin, opening in _cuts(messages):
        if before[begin] - (0 if opening is None else sizes[opening]) >= target:
            break
    kept = [m for index, m in enumerate(messages[:begin]) if m.role == "developer" or index == opening]
    return replace(conversation, messages=(*kept, *messages[begin:]))


def _cuts(messages: Sequence[Message]) -> Iterator[tuple[int, int | None]]:
    """Yield the places where the conversation may begin, and the index of an earlier message that stays.

    First the beginnings of turns; then, within the last turn, the ends of results, where the user's message stays.
    """
    whole = _whole_from(messages)
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    yield from ((index, None) for index in users if index and whole[index])
    last = users[-1] if users else 0
    for index in range(last + 1, len(messages)):
        if messages[index].role == "assistant" and messages[index - 1].role == "tool" and whole[index]:
            yield index, last if users else None


def _whole_from(messages: Sequence[Message]) -> list[bool]:
    """For each index, whether all results from there on answer calls from there on."""
    missing: Counter[str | None] = Counter()
    whole, count = [True] * len(messages), 0
    for index in reversed(range(len(messages))):
        message = messages[index]
        if message.role == "tool":
            missing[message.name] += 1
            count += 1
        elif message.role == "assistant" and missing[message.recipient] > 0:
            missing[message.recipient] -= 1
            count -= 1
        whole[index] = count == 0
    return whole
