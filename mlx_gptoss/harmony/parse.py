"""Ids that the model emits, one by one -> pieces of messages. Never raises and never loses text.

Of every run of text between special tokens, a message's content gets a suffix, to the letter and in order; what stands
before it are header words (roles, recipients, channels, content types), and whitespace around them. Only a word of
which the stream's end or `<|start|>` leaves the beginning is dropped.

On well-formed output this is openai-harmony's StreamableParser, but that a content type without a recipient is not
taken for one. Malformed output goes where it most likely belongs:

- A header that ends without `<|message|>`, or that grows beyond what a header can be: its known parts are read, the
  rest is text of the message they describe (without any: visible text).
- A header with words that fit nowhere: they begin the message's text.
- `<|channel|>` within a text begins another message; when no channel follows, the text goes on where it was.
- `<|start|>` ends a message as `<|end|>` does; after an end, `<|start|>assistant` may be missing.
- Other special tokens within a text are dropped: they are not text.
- Bytes that are not UTF-8 become U+FFFD.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..tokenizer import CALL, CHANNEL, CONSTRAIN, END, ENDOFTEXT, MESSAGE, RETURN, START, Tokenizer
from .header import Header, HeaderPart, is_partial_header_word, read_header
from .messages import Message

_MESSAGE_ENDS = (END, RETURN, CALL, ENDOFTEXT)
_MAX_UNKNOWN_WORDS = 4  # that a header may hold before they are known to be header words
_MAX_HEADER_CHARACTERS = 512


@dataclass(frozen=True)
class Delta(Header):
    """A piece of a message, with the message's header.

    text: more of its content; "" when the message only starts.
    message: its index in `Parser.messages`, where it stands once it has ended.
    starts: whether this is the message's first delta. Every message has exactly one such.
    """

    text: str = ""
    message: int = 0
    starts: bool = False


@dataclass
class _OpenMessage:
    """The message being written."""

    header: Header
    index: int
    pieces: list[str] = field(default_factory=list)

    def delta(self, text: str) -> Delta:
        of = self.header
        starts = not self.pieces
        self.pieces.append(text)
        return Delta(of.role, of.channel, of.recipient, of.content_type, of.name, text, self.index, starts)

    def to_message(self) -> Message:
        of = self.header
        return Message(of.role, "".join(self.pieces), of.channel, of.recipient, of.content_type, of.name)


class Parser:
    """Reads what follows a rendered prompt, that is, what follows `<|start|>assistant`.

    A whole conversation, beginning with `<|start|>`, is read as well.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special_names = {id: name for name, id in tokenizer.specials.items()}
        self._decoder = tokenizer.decoder()
        self._messages: list[Message] = []
        self._open: _OpenMessage | None = None
        self._header: list[HeaderPart] | None = [HeaderPart(None, "")]  # as far as it is read; None within a text
        self._role_expected = False

    @property
    def messages(self) -> list[Message]:
        """The messages that have ended, in order."""
        return list(self._messages)

    @property
    def content_kind(self) -> Literal["reasoning", "text", "call"] | None:
        """What kind of message the next plain id adds text to; None in a header."""
        return self._open.header.kind if self._open is not None and self._header is None else None

    def push(self, id: int) -> list[Delta]:
        """The pieces that this id completes: usually one or none."""
        name = self._special_names.get(id)
        if name is None:
            return self._push_text(self._decoder.push(id))
        return [*self._push_text(self._decoder.flush()), *self._push_special(name)]

    def finish(self) -> list[Delta]:
        """End the stream, wherever it is. Half a header without text is no message."""
        return [*self._push_text(self._decoder.flush()), *self._end_message(cut_off=True)]

    def _push_special(self, name: str) -> list[Delta]:
        if name in _MESSAGE_ENDS:
            return self._end_message()
        if name == START:
            deltas = self._end_message(cut_off=True)
            self._role_expected = True
            return deltas
        if name == MESSAGE and self._header is not None:
            return self._begin_message(*read_header(self._header, role_expected=self._role_expected, complete=True))
        if name == CHANNEL and self._header is None:
            self._header = [HeaderPart(CHANNEL, "")]
        elif name in (CHANNEL, CONSTRAIN) and self._header is not None:
            if not self._header[-1].text.strip():
                self._header.pop()
            self._header.append(HeaderPart(name, ""))
        return []

    def _push_text(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._open is not None and self._header is None:
            return [self._open.delta(text)]
        header = self._header or [HeaderPart(None, "")]
        self._header = [*header[:-1], HeaderPart(header[-1].marker, header[-1].text + text)]
        return self._header_as_text() if self._is_too_long(self._header) else []

    def _is_too_long(self, parts: list[HeaderPart]) -> bool:
        _, text = self._read_unfinished(parts)
        words = len(text.split())
        return (
            words > _MAX_UNKNOWN_WORDS
            or "\n" in text.strip()
            or sum(len(part.text) for part in parts) > _MAX_HEADER_CHARACTERS
        )

    def _read_unfinished(self, parts: list[HeaderPart]) -> tuple[Header, str]:
        return read_header(parts, role_expected=self._role_expected, complete=False)

    def _begin_message(self, header: Header, text: str) -> list[Delta]:
        self._close_message()
        self._header = None
        self._open = _OpenMessage(header, len(self._messages))
        return [self._open.delta(text)]

    def _header_as_text(self) -> list[Delta]:
        """What looked like a header is text, from where it stops being one."""
        header, text = self._read_unfinished(self._header or [])
        if self._open is None or header != Header():
            return self._begin_message(header, text)
        self._header = None
        return [self._open.delta(text)] if text else []

    def _end_message(self, *, cut_off: bool = False) -> list[Delta]:
        """End the message, and the header if one is being read: without text it counts unless it was cut off."""
        deltas: list[Delta] = []
        if self._header is not None:
            header, text = self._read_unfinished(self._header)
            is_partial = self._header[-1].text.endswith(text) and is_partial_header_word(text)
            if not is_partial if cut_off else text or header != Header(header.role):
                deltas = self._header_as_text()
        self._close_message()
        self._header = [HeaderPart(None, "")]
        self._role_expected = False
        return deltas

    def _close_message(self) -> None:
        if self._open is not None:
            self._messages.append(self._open.to_message())
            self._open = None
