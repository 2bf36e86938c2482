"""JSON that obeys a schema, token by token: which tokens may come next. The only module that knows llguidance.

Schemas come from strangers: their size, the time to compile them and the memory of a text under way are bounded, and
what cannot be enforced is refused before anything is generated (enforceable.py).

Of whitespace, a space or a line break with up to 24 columns of indentation may stand between any two symbols: JSON as
json.dumps writes it, with and without indent, which is how gpt-oss writes it, and no endless blanks.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import GptOssError, InvalidRequest
from ..tokenizer import RETURN, Tokenizer
from .enforceable import enforceable

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WHITESPACE = r"\x20|\x0A[\x20\x09]{0,24}"
MOST_STATES = 25_000  # of a text's lexer, 1 to 2 kB each
MOST_ITEMS = 10_000  # of a text's parser in one place, such as properties that may come next


class Vocabulary:
    """A tokenizer's tokens as masks (backends.base.Row) and as llguidance takes them. text: all that are text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.special(RETURN)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.specials.values())
        self._size = 4 * -(-tokenizer.vocab_size // 32)
        special = set(self.special_token_ids)
        self.text = self.mask(id for id, token in enumerate(self.tokens) if token and id not in special)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)

    def mask(self, ids: Iterable[int], base: bytes = b"") -> bytes:
        """The mask of these tokens, and of those in `base`."""
        bits = bytearray(base) or bytearray(self._size)
        for id in ids:
            bits[id >> 3] |= 1 << (id & 7)
        return bytes(bits)


@lru_cache(maxsize=2)  # a model's own; for the published vocabulary it takes a second and 100 MB
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


class Grammar:
    """All JSON texts that obey one schema. Never changes; may be shared between threads."""

    def __init__(self, schema: Any, tokenizer: Tokenizer, where: str) -> None:
        """Raises InvalidRequest for a schema that cannot be enforced; errors call it `where`."""
        self._matcher = _compiled(tokenizer, enforceable(schema, where), where)
        self._return = tokenizer.special(RETURN)

    def begin(self, end: int) -> Text:
        """A new text, to be ended by the token `end`."""
        return Text(self._matcher.deep_copy(), self._return, end)


class Text:
    """One text while it is being written."""

    def __init__(self, matcher: LLMatcher, accepted: int, end: int) -> None:
        """accepted: the token that `matcher` takes for the end."""
        self._matcher = matcher
        self._accepted = accepted
        self._end = end

    def mask(self) -> bytes:
        """The tokens that may come next; the end is one of them once the text is whole.

        Raises GptOssError if that takes more than the limits allow.
        """
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error() or not any(bits):
            raise GptOssError(
                f"the schema could not be followed any further ({_reason(self._matcher)}); give a simpler one"
            )
        place, bit = self._accepted >> 3, 1 << (self._accepted & 7)
        if bits[place] & bit:
            bits[place] &= ~bit
            bits[self._end >> 3] |= 1 << (self._end & 7)
        return bytes(bits)

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise GptOssError(f"token {token} does not obey the schema ({_reason(self._matcher)})")


def prepare(tokenizer: Tokenizer) -> None:
    """What the first schema would otherwise wait for, and every stream with it: llguidance takes a vocabulary in with
    the interpreter's lock held, the published one for half a second."""
    _llguidance_tokenizer(tokenizer)


@lru_cache(maxsize=2)
def _llguidance_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    known = vocabulary(tokenizer)
    return LLTokenizer(TokenizerWrapper(known), n_vocab=tokenizer.vocab_size, slices=LLTokenizer.json_slices())


@lru_cache(maxsize=64)  # agents send the same tools with every request
def _compiled(tokenizer: Tokenizer, schema: str, where: str) -> LLMatcher:
    """A matcher at the beginning of a text, never to be advanced."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MOST_STATES, max_items_in_row=MOST_ITEMS, verbose_errors=False)
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    except ValueError as error:
        raise InvalidRequest(f"{where} cannot be enforced: {error}") from error
    matcher = LLMatcher(_llguidance_tokenizer(tokenizer), grammar, log_level=0, limits=limits)
    if matcher.is_error() or not any(matcher.compute_bitmask()) or matcher.is_error() or matcher.is_accepting():
        raise InvalidRequest(f"{where} cannot be enforced: {_reason(matcher)}")
    return matcher


def _reason(matcher: LLMatcher) -> str:
    """What llguidance says, on one line."""
    return " ".join((matcher.get_error() or "no text obeys it").replace("<non-verbose/>", "").split())[:300]
