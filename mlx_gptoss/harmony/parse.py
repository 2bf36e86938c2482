"""Streaming parser: token ids from the model -> pieces of messages. Never raises and never loses text.

Guarantee: of every run of text between special tokens, a suffix becomes message content, unchanged and in order. The
rest of the run is header words (roles, recipients, channels, content types) and the whitespace around them. The only
text that is dropped is a partial header word that the end of the stream or `<|start|>` cuts off.

On well-formed output the parser agrees with openai-harmony's StreamableParser, with one exception: that one reads the
content type of a message without a recipient as its recipient, and this one reads it as the content type. Malformed
output goes where it most likely belongs:

- A header that ends without `<|message|>`, or that exceeds the size of any header: its known parts are read, and the
  rest is the text of the message that they describe. If there are none, it is visible text.
- A header with words that fit no field: they become the beginning of the message's text.
- `<|channel|>` within a text starts another message. If no channel follows, the text continues in the same message.
- `<|start|>` ends a message, as `<|end|>` does. After an end, `<|start|>assistant` may be missing.
- Other special tokens within a text are dropped.
- Bytes that are not UTF-8 become U+FFFD.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..tokenizer import CALL, CHANNEL, CONSTRAIN, END, ENDOFTEXT, MESSAGE, RETURN, START, Tokenizer
from .header import Header, HeaderPart, is_partial_header_word, read_header
from .messages import Message

_MESSAGE_ENDS = (END, RETURN, CALL, ENDOFTEXT)
# A header that exceeds one of these without `<|message|>` is text.
_MAX_UNKNOWN_WORDS = 4
_MAX_HEADER_CHARACTERS = 512


@dataclass(frozen=True)
class Delta(Header):
    """A piece of a message, with the header of the message.

    text: the next part of its content; "" when the message only starts.
    message: the index of the message in `Parser.messages`, which holds it once it has ended.
    starts: whether this is the first delta of the message. Every message has exactly one such delta.
    """

    text: str = ""
    message: int = 0
    starts: bool = False


@dataclass
class _OpenMessage:
    """The message that is being read."""

    header: Header
    index: int
    pieces: list[str] = field(default_factory=list)

    def delta(self, text: str) -> Delta:
        header = self.header
        starts = not self.pieces
        self.pieces.append(text)
        return Delta(
            *(header.role, header.channel, header.recipient, header.content_type, header.name),
            text=text,
            message=self.index,
            starts=starts,
        )

    def to_message(self) -> Message:
        header, content = self.header, "".join(self.pieces)
        return Message(header.role, content, header.channel, header.recipient, header.content_type, header.name)


class Parser:
    """Parses the ids that follow a rendered prompt, that is, the ids after `<|start|>assistant`.

    A whole conversation that begins with `<|start|>` is parsed, too.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special_names = {id: name for name, id in tokenizer.specials.items()}
        self._decoder = tokenizer.decoder()
        self._messages: list[Message] = []
        self._open: _OpenMessage | None = None
        self._header: list[HeaderPart] | None = [HeaderPart(None, "")]  # the header so far; None within content
        self._role_expected = False

    @property
    def messages(self) -> list[Message]:
        """The messages that have ended, in order."""
        return list(self._messages)

    @property
    def content_kind(self) -> Literal["reasoning", "text", "call"] | None:
        """The kind of message that the next ordinary token belongs to; None within a header."""
        return self._open.header.kind if self._open is not None and self._header is None else None

    def push(self, id: int) -> list[Delta]:
        """Read one id. Returns the deltas that it completes, usually one or none."""
        name = self._special_names.get(id)
        if name is None:
            return self._push_text(self._decoder.push(id))
        return [*self._push_text(self._decoder.flush()), *self._push_special(name)]

    def finish(self) -> list[Delta]:
        """End the stream, wherever it is. Returns the last deltas. A truncated header without text is no message."""
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
        return self._header_as_text() if self._exceeds_header_limits(self._header) else []

    def _exceeds_header_limits(self, parts: list[HeaderPart]) -> bool:
        _, text = self._read_unfinished(parts)
        characters = sum(len(part.text) for part in parts)
        return len(text.split()) > _MAX_UNKNOWN_WORDS or "\n" in text.strip() or characters > _MAX_HEADER_CHARACTERS

    def _read_unfinished(self, parts: list[HeaderPart]) -> tuple[Header, str]:
        return read_header(parts, role_expected=self._role_expected, complete=False)

    def _begin_message(self, header: Header, text: str) -> list[Delta]:
        self._close_message()
        self._header = None
        self._open = _OpenMessage(header, len(self._messages))
        return [self._open.delta(text)]

    def _header_as_text(self) -> list[Delta]:
        """Give up the current header: from its first unknown word on, it is text."""
        header, text = self._read_unfinished(self._header or [])
        if self._open is None or header != Header():
            return self._begin_message(header, text)
        self._header = None  # `<|channel|>` without a channel: the open message continues
        return [self._open.delta(text)] if text else []

    def _end_message(self, *, cut_off: bool = False) -> list[Delta]:
        """End the open message, and the current header if there is one.

        A header that an end token ends becomes a message if it has text or any field. One that is cut off becomes a
        message unless its text is a partial header word (or empty).
        """
        deltas: list[Delta] = []
        if self._header is not None:
            header, text = self._read_unfinished(self._header)
            is_partial = self._header[-1].text.endswith(text) and is_partial_header_word(text)
            has_content = not is_partial if cut_off else bool(text) or header != Header(header.role)
            if has_content:
                deltas = self._header_as_text()
        self._close_message()
        self._header = [HeaderPart(None, "")]
        self._role_expected = False
        return deltas

    def _close_message(self) -> None:
        if self._open is not None:
            self._messages.append(self._open.to_message())
            self._open = None
