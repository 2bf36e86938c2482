"""JSON that obeys a schema, token by token: which tokens may come next. The only module that knows llguidance.

Schemas come from strangers: their size, the time to compile them and the memory of a text under way are bounded, and
what cannot be enforced is refused before anything is generated (json_schema.py).

Of whitespace, a space or a line break with up to 24 columns of indentation may stand between any two symbols: JSON as
json.dumps writes it, with and without indent, which is how gpt-oss writes it, and no endless blanks.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import GptOssError, InvalidRequest
from ..tokenizer import RETURN, Tokenizer
from .json_schema import normalize_schema

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WHITESPACE = r"\x20|\x0A[\x20\x09]{0,24}"
MAX_LEXER_STATES = 25_000  # of a text's lexer, 1 to 2 kB each
MAX_PARSER_ITEMS = 10_000  # of a text's parser in one place, such as properties that may come next


class Vocabulary:
    """A tokenizer's tokens as masks (backends.base.Row) and as llguidance takes them. text: all that are text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.special(RETURN)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.specials.values())
        self._mask_bytes = 4 * -(-tokenizer.vocab_size // 32)
        special = set(self.special_token_ids)
        self.text_mask = self.mask(id for id, token in enumerate(self.tokens) if token and id not in special)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)

    def mask(self, ids: Iterable[int], base: bytes = b"") -> bytes:
        """The mask of these tokens, and of those in `base`."""
        bits = bytearray(base) or bytearray(self._mask_bytes)
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
        self._matcher = _compile(tokenizer, normalize_schema(schema, where), where)
        self._return = tokenizer.special(RETURN)

    def matcher(self, end: int) -> Matcher:
        """A new text, to be ended by the token `end`."""
        return Matcher(self._matcher.deep_copy(), self._return, end)


class Matcher:
    """One text while it is being written."""

    def __init__(self, matcher: LLMatcher, internal_end: int, end: int) -> None:
        """internal_end: the token that `matcher` takes for the end."""
        self._matcher = matcher
        self._internal_end = internal_end
        self._end = end

    def mask(self) -> bytes:
        """The tokens that may come next; the end is one of them once the text is whole.

        Raises GptOssError if that takes more than the limits allow.
        """
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error() or not any(bits):
            raise GptOssError(
                f"the schema could not be followed any further ({_error(self._matcher)}); give a simpler one"
            )
        place, bit = self._internal_end >> 3, 1 << (self._internal_end & 7)
        if bits[place] & bit:
            bits[place] &= ~bit
            bits[self._end >> 3] |= 1 << (self._end & 7)
        return bytes(bits)

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise GptOssError(f"token {token} does not obey the schema ({_error(self._matcher)})")


def warm_up(tokenizer: Tokenizer) -> None:
    """What the first schema would otherwise wait for, and every stream with it: llguidance takes a vocabulary in with
    the interpreter's lock held, the published one for half a second."""
    _llguidance_tokenizer(tokenizer)


@lru_cache(maxsize=2)
def _llguidance_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    known = vocabulary(tokenizer)
    return LLTokenizer(TokenizerWrapper(known), n_vocab=tokenizer.vocab_size, slices=LLTokenizer.json_slices())


@lru_cache(maxsize=64)  # agents send the same tools with every request
def _compile(tokenizer: Tokenizer, schema: str, where: str) -> LLMatcher:
    """A matcher at the beginning of a text, never to be advanced."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, max_items_in_row=MAX_PARSER_ITEMS, verbose_errors=False)
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    except ValueError as error:
        raise InvalidRequest(f"{where} cannot be enforced: {error}") from error
    matcher = LLMatcher(_llguidance_tokenizer(tokenizer), grammar, log_level=0, limits=limits)
    if matcher.is_error() or not any(matcher.compute_bitmask()) or matcher.is_error() or matcher.is_accepting():
        raise InvalidRequest(f"{where} cannot be enforced: {_error(matcher)}")
    return matcher


def _error(matcher: LLMatcher) -> str:
    """What llguidance says, on one line."""
    return " ".join((matcher.get_error() or "no text obeys it").replace("<non-verbose/>", "").split())[:300]
