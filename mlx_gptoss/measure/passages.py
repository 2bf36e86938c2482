"""Split a text for evaluation: into documents, and into windows that predict every scored token once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from ..calibration.text import split_documents
from ..errors import InvalidRequest
from ..tokenizer import START, Tokenizer

Score = Literal["all", "replies"]


@dataclass(frozen=True)
class Document:
    """One document's tokens. ids[first:] are scored; first is at least 1."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Window:
    """One forward pass: the logits at the last len(targets) of `inputs` predict `targets`."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


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
        prompt, rest = ("", part) if score == "all" else _split_at_reply(part, number)
        before = tokenizer.encode_with_specials(prompt)
        document = Document((*before, *tokenizer.encode_with_specials(rest)), max(1, len(before)))
        if len(document.ids) > document.first:
            documents.append(document)
    if not documents:
        raise InvalidRequest("the text has nothing to predict; it needs at least two tokens")
    return documents


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
    for document in documents:
        ids, start = document.ids, document.first
        while start < len(ids) and left != 0:
            end = min(len(ids), max(context + 1, start + max(1, context // 2)))
            if left is not None:
                end = min(end, start + left)
                left -= end - start
            yield Window(ids[max(0, end - 1 - context) : end - 1], ids[start:end])
            start = end
