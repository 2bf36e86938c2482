"""What stands between `<|start|>` and `<|message|>`: who speaks, on which channel, to whom, in what form.

`assistant<|channel|>commentary to=functions.add <|constrain|>json` is the usual form; the recipient may also stand
before the channel, and the content type without its marker.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ..tokenizer import CHANNEL, CONSTRAIN
from .messages import Role

CHANNELS = ("analysis", "commentary", "final")
NAMESPACE = "functions."
MAX_RECIPIENT_CHARACTERS = 256  # characters

_NON_TOOL_RECIPIENTS = (None, "all", "user", "assistant")
_CONTENT_TYPES = ("json", "code")
_TOOL_NAME = re.compile(r"functions\.\S+|browser\.\S+|python")
_CONTENT_TYPE = re.compile(r"[\w.+/-]+")


@dataclass(frozen=True)
class Header:
    """A message without its content; the fields are those of `Message`."""

    role: Role = "assistant"
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None

    @property
    def kind(self) -> Literal["reasoning", "text", "call"]:
        """Where the content goes.

        "call": addressed to a tool, on whatever channel (on `final` only `functions.` is believed);
        "reasoning": the analysis channel; "text": all else, so that nothing said is hidden by mistake.
        """
        if self.function is not None:
            return "call"
        return "reasoning" if self.channel == "analysis" else "text"

    @property
    def function(self) -> str | None:
        """The name of the function called, without its namespace; None when this is no call."""
        recipient = self.recipient
        if recipient is None or recipient in _NON_TOOL_RECIPIENTS:
            return None
        if self.channel == "final" and not recipient.startswith(NAMESPACE):
            return None
        return recipient.removeprefix(NAMESPACE)


@dataclass(frozen=True)
class HeaderPart:
    """Header text, and the special token before it (`<|channel|>`, `<|constrain|>`) if there was one."""

    marker: str | None
    text: str


def read_header(parts: Sequence[HeaderPart], *, role_expected: bool, complete: bool) -> tuple[Header, str]:
    """The header that `parts` spell, and the text among them that belongs to no header.

    In each part, words are taken from the front; from the first that fits nowhere, the part is text. Whitespace
    alone is not text. `complete` says that `<|message|>` followed: only then is a word believed to be a channel or
    a content type for its place alone; before that it must be a known one.
    """
    reader = _HeaderReader(role_expected, complete)
    left = [reader.read_part(part) for part in parts]
    header = Header(reader.role, reader.channel, reader.recipient, reader.content_type, reader.name)
    return header, "".join(text for text in left if text.strip())


def is_partial_header_word(text: str) -> bool:
    """Whether `text`, at which a stream was cut off, is the beginning of a word that headers are made of."""
    return any(word.startswith(text.strip()) for word in (*CHANNELS, "to=", "assistant", "json"))


class _HeaderReader:
    """The fields found so far. Each `_take_...` says whether it could use the word."""

    def __init__(self, role_expected: bool, complete: bool) -> None:
        self.role: Role = "assistant"
        self.name: str | None = None
        self.channel: str | None = None
        self.recipient: str | None = None
        self.content_type: str | None = None
        self._role_expected = role_expected
        self._complete = complete
        self._first = True

    def read_part(self, part: HeaderPart) -> str:
        """Use the words of one part; return the text from the first useless one on."""
        end = 0
        marker = part.marker
        for word in re.finditer(r"\S+", part.text):
            if not (self._read_author(word[0], marker) or self._read_recipient(word[0], marker)):
                if not (self._read_channel(word[0], marker) or self._read_content_type(word[0], marker)):
                    break
                marker = None
            end = word.end()
            self._first = False
        return part.text[end:]

    def _read_author(self, word: str, marker: str | None) -> bool:
        """The first word: a role, `role:name`, or a tool's own name. "assistant" may be said again."""
        if not self._first or marker is not None:
            return False
        role, colon, name = word.partition(":")
        if role in get_args(Role) and (self._role_expected or word == "assistant"):
            self.role, self.name = cast(Role, role), name if colon else None
            return True
        if self._role_expected and _TOOL_NAME.fullmatch(word):
            self.role, self.name = "tool", word
            return True
        return False

    def _read_recipient(self, word: str, marker: str | None) -> bool:
        recipient = word.removeprefix("to=")
        if word == recipient and marker == CONSTRAIN and self.recipient is not None:
            return False  # `to=python <|constrain|>python`
        if len(recipient) > MAX_RECIPIENT_CHARACTERS or not (word != recipient or _TOOL_NAME.fullmatch(word)):
            return False
        if self.recipient is None and recipient:
            self.recipient = recipient
        return recipient in ("", self.recipient)

    def _read_channel(self, word: str, marker: str | None) -> bool:
        if word in CHANNELS and (marker == CHANNEL or self._complete) and self.channel in (None, *CHANNELS):
            self.channel = word
            return True
        if marker == CHANNEL and self._complete and self.channel is None:
            self.channel = word
        return marker == CHANNEL and word == self.channel

    def _read_content_type(self, word: str, marker: str | None) -> bool:
        if marker == CHANNEL or self.content_type is not None:
            return marker == CONSTRAIN and self.content_type == f"{CONSTRAIN}{word}"
        addressed = self._complete and (marker == CONSTRAIN or self.recipient is not None)
        if word not in _CONTENT_TYPES and not (addressed and _CONTENT_TYPE.fullmatch(word)):
            return False
        self.content_type = f"{CONSTRAIN}{word}" if marker == CONSTRAIN else word
        return True
