"""Parsing of message headers: the words between `<|start|>` and `<|message|>`.

A header names the author, the channel, the recipient and the content type. The usual form of a call is

    assistant<|channel|>commentary to=functions.add <|constrain|>json

The recipient may also precede the channel, and the content type may come without `<|constrain|>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ..tokenizer import CHANNEL, CONSTRAIN
from .messages import Role
from .names import NAMESPACE

CHANNELS = ("analysis", "commentary", "final")
MAX_RECIPIENT_CHARACTERS = 256

_NON_TOOL_RECIPIENTS = (None, "all", "user", "assistant")
_KNOWN_CONTENT_TYPES = ("json", "code")
_TOOL_NAME = re.compile(r"functions\.\S+|browser\.\S+|python")
_CONTENT_TYPE = re.compile(r"[\w.+/-]+")


@dataclass(frozen=True)
class Header:
    """A message without its content. The fields are those of `Message`."""

    role: Role = "assistant"
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None

    @property
    def kind(self) -> Literal["reasoning", "text", "call"]:
        """What the content is.

        "call": arguments for a tool, on any channel. On `final`, only recipients in `functions.` count as tools.
        "reasoning": anything else on the analysis channel.
        "text": everything else, so that a reply with a strange header is shown instead of hidden.
        """
        if self.function is not None:
            return "call"
        return "reasoning" if self.channel == "analysis" else "text"

    @property
    def function(self) -> str | None:
        """The name of the called tool, without "functions."; None if the message is not a call."""
        recipient = self.recipient
        if recipient is None or recipient in _NON_TOOL_RECIPIENTS:
            return None
        if self.channel == "final" and not recipient.startswith(NAMESPACE):
            return None
        return recipient.removeprefix(NAMESPACE)


@dataclass(frozen=True)
class HeaderPart:
    """Header text and the special token before it: `<|channel|>`, `<|constrain|>` or, for the first part, None."""

    marker: str | None
    text: str


def read_header(parts: Sequence[HeaderPart], *, role_expected: bool, complete: bool) -> tuple[Header, str]:
    """Parse a header. Returns the header and the text in it that is not part of a header.

    In each part, header words are read from the front. From the first word that fits no field, the rest of the part
    is text; it is dropped if it is only whitespace.

    role_expected: whether `<|start|>` precedes the header, so that its first word is the author.
    complete: whether `<|message|>` follows the header. If so, an unknown word in the place of a channel or content
        type is taken for one; if not, only known words are.
    """
    reader = _HeaderReader(role_expected, complete)
    rests = [reader.read_part(part) for part in parts]
    header = Header(reader.role, reader.channel, reader.recipient, reader.content_type, reader.name)
    return header, "".join(text for text in rests if text.strip())


def is_partial_header_word(text: str) -> bool:
    """Whether `text`, the end of a truncated stream, is the beginning of a word that occurs in headers."""
    return any(word.startswith(text.strip()) for word in (*CHANNELS, "to=", "assistant", "json"))


class _HeaderReader:
    """Collects the fields of one header. Each `_read_...` method returns whether the word belongs to its field."""

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
        """Read the header words of one part. Returns the text from the first other word on."""
        end = 0
        marker = part.marker
        for match in re.finditer(r"\S+", part.text):
            word = match[0]
            if not (self._read_author(word, marker) or self._read_recipient(word, marker)):
                if not (self._read_channel(word, marker) or self._read_content_type(word, marker)):
                    break
                marker = None  # it applies to one channel or content type
            end = match.end()
            self._first = False
        return part.text[end:]

    def _read_author(self, word: str, marker: str | None) -> bool:
        """The first word of a header: a role, `role:name`, or the name of a tool.

        "assistant" is accepted even where no role is expected: the prompt ends with it, and models repeat it.
        """
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
        """`to=NAME`, or the bare name of a tool. `to=` alone is skipped.

        A second, different recipient is not accepted.
        """
        recipient = word.removeprefix("to=")
        if word == recipient and marker == CONSTRAIN and self.recipient is not None:
            return False  # `to=python <|constrain|>python`: the second "python" is the content type
        if len(recipient) > MAX_RECIPIENT_CHARACTERS or not (word != recipient or _TOOL_NAME.fullmatch(word)):
            return False
        if self.recipient is None and recipient:
            self.recipient = recipient
        return recipient in ("", self.recipient)

    def _read_channel(self, word: str, marker: str | None) -> bool:
        """A known channel, or, after `<|channel|>` in a complete header, any word.

        Of several known channels the last one counts. An unknown one is not replaced.
        """
        if word in CHANNELS and (marker == CHANNEL or self._complete) and self.channel in (None, *CHANNELS):
            self.channel = word
            return True
        if marker == CHANNEL and self._complete and self.channel is None:
            self.channel = word
        return marker == CHANNEL and word == self.channel

    def _read_content_type(self, word: str, marker: str | None) -> bool:
        """The word "json" or "code", or, in a complete header with a marker or a recipient, any MIME-like word.

        A content type may be repeated after another `<|constrain|>`.
        """
        if marker == CHANNEL or self.content_type is not None:
            return marker == CONSTRAIN and self.content_type == f"{CONSTRAIN}{word}"
        addressed = self._complete and (marker == CONSTRAIN or self.recipient is not None)
        if word not in _KNOWN_CONTENT_TYPES and not (addressed and _CONTENT_TYPE.fullmatch(word)):
            return False
        self.content_type = f"{CONSTRAIN}{word}" if marker == CONSTRAIN else word
        return True
