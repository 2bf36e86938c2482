"""The headers that a reply may contain, as tries of token ids.

Headers are those that the model was trained to write, encoded as in training. The part that names the recipients is the
same for every header of a conversation and for every conversation with the same tools, so it is built once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from ..tokenizer import CHANNEL, CONSTRAIN, MESSAGE, Tokenizer
from .per_tokenizer import cached

# What may stand between the recipient or channel of a call and `<|message|>`, by what the recipient takes.
_CONTENT_TYPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "json": ((), (" ", CONSTRAIN, "json"), (" json",), (" code",)),
    "code": ((), (" code",)),
    "text": ((),),
}


@dataclass(frozen=True)
class Body:
    """What follows a header. recipient: of a call, such as "functions.get_weather"."""

    kind: Literal["analysis", "preamble", "final", "call"]
    recipient: str | None = None


HeaderTrie = dict[int, "HeaderTrie | Body"]  # token id -> what may follow it


@dataclass(frozen=True)
class Recipient:
    """Someone who may be called. takes: what the body of the call is."""

    name: str
    takes: Literal["json", "code", "text"] = "json"


@dataclass(frozen=True)
class RecipientTries:
    """The headers of calls after their channel and before it. They are shared: not to be modified."""

    after_channel: HeaderTrie
    before_channel: HeaderTrie


@cached(32)  # agents send the same tools with every request
def recipient_tries(tokenizer: Tokenizer, recipients: tuple[Recipient, ...]) -> RecipientTries:
    """Return the headers of calls of these recipients. Encoding their names takes most of the time."""
    after_channel: HeaderTrie = {}
    before_channel: HeaderTrie = {}
    channel, message = tokenizer.special(CHANNEL), tokenizer.special(MESSAGE)
    channels = [header_ids(tokenizer, name) for name in ("commentary", "analysis")]
    content_types = {takes: [header_ids(tokenizer, *form) for form in forms] for takes, forms in _CONTENT_TYPES.items()}
    for recipient in recipients:
        ends: HeaderTrie = {}
        for content_type in content_types[recipient.takes]:
            insert(ends, content_type, {message: Body("call", recipient.name)})
        channel_first: HeaderTrie = {}
        for ids in channels:
            insert(channel_first, ids, ends)
        name = tokenizer.encode(f" to={recipient.name}")
        insert(after_channel, name, ends)
        insert(before_channel, name, {channel: channel_first})
    return RecipientTries(after_channel, before_channel)


def header_trie(tokenizer: Tokenizer, kinds: Iterable[str], calls: RecipientTries | None) -> HeaderTrie:
    """Return the headers that may come now, from after "assistant" to `<|message|>`.

    kinds: of Body, without calls. calls: None if there may be no call.
    """
    message = tokenizer.special(MESSAGE)
    channels: HeaderTrie = {}
    for kind, channel, content_type in _channels(set(kinds)):
        insert(channels, header_ids(tokenizer, channel, *content_type), {message: Body(kind)})
    trie: HeaderTrie = {}
    if calls is not None:
        for channel in ("commentary", "analysis"):
            insert(channels, header_ids(tokenizer, channel), calls.after_channel)
        _merge(trie, calls.before_channel)
    trie[tokenizer.special(CHANNEL)] = channels
    return trie


def _channels(kinds: set[str]) -> Iterator[tuple[Literal["analysis", "preamble", "final"], str, tuple[str, ...]]]:
    """Yield the kinds of bodies with their channel and content type."""
    if "analysis" in kinds:
        yield "analysis", "analysis", ()
    if "preamble" in kinds:
        yield "preamble", "commentary", ()
    if "final" in kinds:
        yield "final", "final", ()
        yield "final", "final", (" ", CONSTRAIN, "json")


def insert(trie: HeaderTrie, ids: Iterable[int], end: HeaderTrie) -> None:
    """Let `end`, which other tries may share, follow `ids` in the trie."""
    for id in ids:
        step = trie.setdefault(id, {})
        assert isinstance(step, dict)  # `<|message|>` ends every header and occurs nowhere else in one
        trie = step
    _merge(trie, end)


def _merge(trie: HeaderTrie, other: HeaderTrie) -> None:
    """Add the paths of another trie, without changing it."""
    for id, step in other.items():
        known = trie.get(id)
        if isinstance(known, dict) and isinstance(step, dict):
            trie[id] = known = dict(known)
            _merge(known, step)
        else:
            trie[id] = step


def header_ids(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """Return the ids of a header. Each piece, a special token's name or text, is encoded apart, as in render.py."""
    ids: list[int] = []
    for piece in pieces:
        id = tokenizer.specials.get(piece)
        ids += tokenizer.encode(piece) if id is None else [id]
    return ids
