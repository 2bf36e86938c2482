"""Split a text for evaluation: into documents, and into windows that predict every scored token once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..calibration.text import split_documents
from ..errors import InvalidRequest
from ..tokenizer import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Tokenizer
from .results import Places

Score = Literal["all", "replies"]
CHANNELS = ("analysis", "commentary", "final")


@dataclass(frozen=True)
class Document:
    """One document's tokens. ids[first:] are scored; first is at least 1.

    channels: of the assistant's message that each token is in, "" elsewhere. reply: index of the first token of the
    assistant's turn that ends the document; None if it does not end in one.
    """

    ids: tuple[int, ...]
    first: int
    channels: tuple[str, ...] = ()
    reply: int | None = None


@dataclass(frozen=True)
class Window:
    """One forward pass: the logits at the last len(targets) of `inputs` predict `targets`.

    channels: of the targets. document, start: which document they are from, and where in it they begin. reply: as in
    Document, if all of the reply is predicted.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    channels: tuple[str, ...] = ()
    document: int = 0
    start: int = 0
    reply: int | None = None


def read_documents(text: str, tokenizer: Tokenizer, score: Score = "all") -> list[Document]:
    """The documents of a text that have a token to score. Special tokens in the text are encoded as such.

    score: "all" scores every token but a document's first. "replies" scores the assistant's messages after the last
        message of another role; its earlier messages are history without reasoning, unlike a model's own output.
    Raises InvalidRequest if no document has a token to score, or for "replies" if one has no reply.
    """
    if score not in ("all", "replies"):
        raise InvalidRequest(f"score must be all or replies, not {score!r}")
    documents = []
    for number, part in enumerate(split_documents(text), 1):
        if score == "replies" or _ends_in_reply(part):
            prompt, rest = _split_at_reply(part, number)
        else:
            prompt, rest = "", part
        before = tokenizer.encode_with_specials(prompt)
        ids = (*before, *tokenizer.encode_with_specials(rest))
        first = max(1, len(before)) if score == "replies" else 1
        if len(ids) > first:
            documents.append(Document(ids, first, _channels(ids, tokenizer), len(before) if prompt else None))
    if not documents:
        raise InvalidRequest("the text has nothing to predict; it needs at least two tokens")
    return documents


def _ends_in_reply(document: str) -> bool:
    """Whether the assistant's turn comes last, after a message of another role."""
    messages = document.split(START)
    is_assistants = [message.startswith("assistant") for message in messages[1:]]
    return bool(is_assistants) and is_assistants[-1] and not all(is_assistants)


def _channels(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, ...]:
    """The channel of the assistant's message that each token is in, from after `<|message|>` to its end; else ""."""
    marks = {tokenizer.special(name): name for name in (START, CHANNEL, MESSAGE, END, RETURN, CALL, CONSTRAIN)}
    found = []
    channel, inside = "", False
    begins = 0
    for index, id in enumerate(ids):
        mark = marks.get(id)
        found.append(channel if inside else "")
        if mark in (START, END, RETURN, CALL):
            channel, inside = "", False
        elif mark == CHANNEL:
            begins, channel = index + 1, ""
        elif mark in (MESSAGE, CONSTRAIN):
            if begins and not channel:
                words = tokenizer.decode(ids[begins:index]).split()
                channel, begins = words[0] if words else "", 0
            inside = mark == MESSAGE and channel in CHANNELS
    return tuple(found)


def _split_at_reply(document: str, number: int) -> tuple[str, str]:
    """The prompt, up to and including `<|start|>assistant`, and the assistant's reply."""
    messages = document.split(START)  # the first is the text before any message
    last_of_others = max(i for i, message in enumerate(messages) if i == 0 or not message.startswith("assistant"))
    if last_of_others + 1 == len(messages):
        raise InvalidRequest(
            f"document {number} of the text ends without a reply ({START}assistant...); score all tokens instead"
        )
    end = len(START.join(messages[: last_of_others + 1])) + len(START + "assistant")
    return document[:end], document[end:]


def windows(documents: Iterable[Document], context: int, max_tokens: int | None = None) -> Iterator[Window]:
    """Windows of at most `context` inputs that predict every scored token once, up to max_tokens of them."""
    left = max_tokens
    for number, document in enumerate(documents):
        ids, start = document.ids, document.first
        while start < len(ids) and left != 0:
            end = min(len(ids), max(context + 1, start + max(1, context // 2)))
            if left is not None:
                end = min(end, start + left)
                left -= end - start
            reply = document.reply if left is None else None  # the last one may be cut
            part = document.channels[start:end]
            yield Window(ids[max(0, end - 1 - context) : end - 1], ids[start:end], part, number, start, reply)
            start = end


def places(windows: Sequence[Window]) -> Places:
    """Where the predictions of all windows are in the text."""
    window: list[int] = []
    channel: list[str] = []
    reply: list[int] = []
    for index, one in enumerate(windows):
        count = len(one.targets)
        window += [index] * count
        channel += one.channels or ("",) * count
        begin = one.start + count if one.reply is None else one.reply
        reply += [one.document if one.start + place >= begin else -1 for place in range(count)]
    return Places(np.array(window), np.array(channel), np.array(reply))
