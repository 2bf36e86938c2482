"""Text to ids and back: the byte-level BPE of a tokenizer.json, with Harmony's special tokens kept apart from text.

Special tokens are known by name only; their ids come from the file (199998 and up in the published models).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from .errors import CheckpointError, PromptTooLong
from .untrusted import tokenizer_file
from .untrusted.cancel import check_cancelled
from .untrusted.json_file import read_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BPE

STARTOFTEXT = "<|startoftext|>"
ENDOFTEXT = "<|endoftext|>"
RETURN = "<|return|>"
CONSTRAIN = "<|constrain|>"
CHANNEL = "<|channel|>"
START = "<|start|>"
END = "<|end|>"
MESSAGE = "<|message|>"
CALL = "<|call|>"

SPECIALS = (STARTOFTEXT, ENDOFTEXT, RETURN, CONSTRAIN, CHANNEL, START, END, MESSAGE, CALL)
"""The special tokens that this program reads or writes. A file may define more (reserved ones); they are never text."""

SLICE_CHARACTERS = 1 << 16
MAX_WORD_CHARACTERS = 1 << 17
# A letter before anything that ends a word: no token of any split pattern goes on from here. Letters, marks and
# apostrophes may go on with it, and digits with what Python takes for a letter but Unicode for a number, such as "½".
_WORD_END = re.compile(
    r"[^\W\d_](?=[\x00-\x26\x28-\x2F\x3A-\x40\x5B-\x60\x7B-\x7E\u3000-\u3002\uFF0C])|[A-Za-z](?=[0-9])"
)


class Tokenizer:
    """One vocabulary. Immutable; may be shared between threads.

    specials: name -> id of every special token of the file.
    longest_token: the most characters that one token stands for.
    vocab_size: one more than the largest id. The model's own vocabulary is often padded beyond it.
    """

    def __init__(self, bpe: BPE, vocab_size: int = 0) -> None:
        """Takes ownership of `bpe` and makes it treat special tokens in text as plain text.

        vocab_size: at least that of `bpe`, whose ids may have gaps.

        Raises CheckpointError if its decoder is not byte-level, because tokens are then not bytes.
        """
        if "ByteLevel" not in str(bpe.decoder):
            raise CheckpointError("the tokenizer is not byte-level BPE: a gpt-oss tokenizer.json is needed")
        added = bpe.get_added_tokens_decoder()
        # A special token that the file does not flag as special would be parsed out of users' text.
        bpe.add_special_tokens([token.content for token in added.values() if token.content in SPECIALS])
        bpe.encode_special_tokens = True
        self._bpe = bpe
        self._added = {id: token.content for id, token in added.items()}
        self._bytes: dict[int, bytes] = {}
        self.specials: Mapping[str, int] = MappingProxyType(
            {token.content: id for id, token in added.items() if token.special or token.content in SPECIALS}
        )
        self._special_ids = frozenset(self.specials.values())
        longest_first = sorted(self.specials, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        sizes = [vocab_size, bpe.get_vocab_size(with_added_tokens=False), *(id + 1 for id in added)]
        self.vocab_size: int = max(sizes)
        tokens = bpe.get_vocab(with_added_tokens=False)
        self.longest_token: int = max(map(len, [*tokens, *self._added.values()]), default=1)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json` from a checkpoint's folder, or from its parent if the folder is `original/`.

        Raises CheckpointError if it is missing or broken.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file() and folder.name == "original":
            file = folder.parent / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"no tokenizer.json in {folder}: copy it there from the model's original repository")
        return cls.from_file(file)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read one tokenizer.json, whatever its name. Raises CheckpointError if it cannot be read."""
        return cls.from_bytes(read_file(Path(path), tokenizer_file.MAX_BYTES), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Tokenizer:
        """Parse the content of a tokenizer.json, which is not trusted; `name` is used in errors."""
        from tokenizers import Tokenizer as BPE

        vocab_size = tokenizer_file.check(data, name)
        try:
            bpe = BPE.from_str(data.decode())
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(
                f"cannot read the tokenizer {name} ({str(error)[:200]}): download the file again"
            ) from error
        bpe.no_truncation()
        bpe.no_padding()
        bpe.post_processor = None
        return cls(bpe, vocab_size)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Special tokens in it are encoded as text, so that nobody can inject one.

        Lone surrogates, which have no UTF-8, become U+FFFD. A word of more than MAX_WORD_CHARACTERS is cut into words.
        """
        return list(chain.from_iterable(self.encode_slices(text)))

    def encode_with_specials(self, text: str) -> list[int]:
        """Ids of a raw prompt in which written special tokens count as special tokens."""
        return list(chain.from_iterable(self.encode_slices(text, specials=True)))

    def encode_within(self, limit: int, text: str, *, specials: bool = False) -> list[int]:
        """encode(), or with `specials` encode_with_specials(), of a prompt that may have `limit` tokens.

        Raises PromptTooLong for a longer one as soon as it is known to be longer, most often by its length alone.
        """
        ids: list[int] = []
        self.check_length(limit, len(text))
        for part in self.encode_slices(text, specials=specials):
            ids += part
            self.check_length(limit, 0, len(ids))
        return ids

    def check_length(self, limit: int, characters: int, ids: int = 0) -> None:
        """Raise PromptTooLong if `ids` tokens and those of a text of `characters` must be more than `limit`."""
        if ids + characters // self.longest_token > limit:
            raise PromptTooLong(
                f"the prompt has more than {limit} tokens, all that the context holds; shorten the prompt or load the "
                "model with a larger max_context"
            )

    def encode_slices(self, text: str, *, specials: bool = False) -> Iterator[list[int]]:
        """The ids that encode() or, with `specials`, encode_with_specials() returns, slice by slice, so that a caller
        can stop when they are too many.

        Other threads run meanwhile: unlike `encode`, the library's `encode_batch_fast` releases the interpreter's lock.
        Raises Cancelled before the next slice if nobody waits for the result any more.
        """
        for plain, special in self._split_specials(text) if specials else ((text, None),):
            for part in _slices(plain):
                check_cancelled()
                yield self._bpe.encode_batch_fast([_scalar_text(part)], add_special_tokens=False)[0].ids
            if special is not None:
                yield [special]

    def _split_specials(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield each plain text with the id of the special token that ends it, and the rest with None.

        A search looks at one slice: it holds the interpreter's lock.
        """
        begin = at = 0
        while at < len(text):
            match = self._special_pattern.search(text, at, at + SLICE_CHARACTERS + self.longest_token)
            if match is None:
                at += SLICE_CHARACTERS
                continue
            yield text[begin : match.start()], self.specials[match.group()]
            begin = at = match.end()
        yield text[begin:], None

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """Text of ids. Special tokens are left out, or written out if `specials`.

        Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary (padding rows) become nothing.
        """
        decoder = self.decoder(specials=specials)
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def decoder(self, *, specials: bool = False) -> IncrementalDecoder:
        """A decoder for one stream; its pieces add up to `decode` of all ids."""
        return IncrementalDecoder(self, specials)

    def special(self, name: str) -> int:
        """Id of the special token `name`. Raises CheckpointError if the file has none of that name."""
        try:
            return self.specials[name]
        except KeyError:
            raise CheckpointError(
                f"the tokenizer has no special token {name}: Harmony needs it; use a gpt-oss tokenizer.json"
            ) from None

    def is_special(self, id: int) -> bool:
        return id in self._special_ids

    def token_bytes(self, id: int) -> bytes:
        """The bytes of a token, which may be part of a character; b"" for an id outside the vocabulary.

        For a special token, the bytes of its name.
        """
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self._look_up(id)
        return known

    def _look_up(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        token = self._bpe.id_to_token(id) if 0 <= id < self.vocab_size else None
        if not token:
            return b""
        if any(character not in _BYTE_OF for character in token):  # not byte-level: the text itself
            return token.encode()
        return bytes(_BYTE_OF[character] for character in token)


def _slices(text: str) -> Iterator[str]:
    """Cut a long text at ends of words, so that its slices have the ids of the whole.

    A word may be longer than a slice, up to MAX_WORD_CHARACTERS. Where none ends within that, the cut is made all the
    same, and the ids there may differ from those of the whole: the time and the memory of one call stay bounded.
    """
    start, end = 0, SLICE_CHARACTERS
    while end < len(text):
        word = _WORD_END.search(text, end, end + SLICE_CHARACTERS)
        end = end + SLICE_CHARACTERS if word is None else word.end()
        if word is None:
            if end - start < MAX_WORD_CHARACTERS or end >= len(text):
                continue
            if "\ud800" <= text[end - 1] < "\udc00":  # the first half of a surrogate pair
                end += 1
        yield text[start:end]
        start, end = end, end + SLICE_CHARACTERS
    yield text[start:]


class IncrementalDecoder:
    """Decodes one stream of ids as it arrives, in linear time. A character is returned once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, specials: bool = False) -> None:
        self._tokenizer = tokenizer
        self._write_specials = specials
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this id completes. A special token that interrupts a character ends it as U+FFFD."""
        if not self._tokenizer.is_special(id):
            return self._utf8.decode(self._tokenizer.token_bytes(id))
        text = self.flush()
        return text + self._tokenizer.token_bytes(id).decode() if self._write_specials else text

    def flush(self) -> str:
        """U+FFFD if the stream ended within a character, otherwise nothing. Resets the decoder."""
        return self._utf8.decode(b"", final=True)


def _scalar_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE (GPT-2's) writes for each byte, inverted.

    Printable Latin-1 bytes stand for themselves; the others, in order, are U+0100, U+0101, ...
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
