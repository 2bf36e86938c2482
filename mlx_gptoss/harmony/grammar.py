"""Grammar-constrained decoding of JSON: which tokens may come next under a schema. Only this module imports llguidance.

Schemas come from untrusted clients. Their size, the time to compile them and the memory of a running match are
bounded, and what cannot be enforced is refused before generation starts (json_schema.py).

Whitespace: between any two JSON tokens the grammar allows nothing, one space, or a line break with up to 24 columns of
indentation. That covers json.dumps with and without `indent`, which is how gpt-oss writes JSON, and rules out endless
white space.
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
MAX_LEXER_STATES = 25_000  # per match; a state takes 1 to 2 kB
MAX_PARSER_ITEMS = 10_000  # per position of a match: for example, the properties that may come next


class Vocabulary:
    """The tokens of a tokenizer, as bit masks (see backends.base.Row) and as llguidance's TokenizerWrapper takes them.

    text_mask: the mask of all tokens that are neither special nor empty.
    The attributes that end in `_token_id`, `tokens`, `special_token_ids` and `__call__` are read by llguidance.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id: int = tokenizer.special(RETURN)
        self.bos_token_id: int | None = None
        self.tokens: list[bytes] = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.special_token_ids: list[int] = sorted(tokenizer.specials.values())
        self._mask_bytes = 4 * -(-tokenizer.vocab_size // 32)
        special = set(self.special_token_ids)
        self.text_mask: bytes = self.mask(id for id, token in enumerate(self.tokens) if token and id not in special)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)

    def mask(self, ids: Iterable[int], base: bytes = b"") -> bytes:
        """Return the mask of the tokens `ids` and of those in the mask `base`: one bit per token, in 32-bit words."""
        bits = bytearray(base) or bytearray(self._mask_bytes)
        for id in ids:
            bits[id >> 3] |= 1 << (id & 7)
        return bytes(bits)


@lru_cache(maxsize=2)  # building the published vocabulary takes a second and 100 MB
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return the Vocabulary of a tokenizer, built once."""
    return Vocabulary(tokenizer)


class Grammar:
    """The set of all JSON texts that are valid under one schema. Immutable; threads may share it."""

    def __init__(self, schema: Any, tokenizer: Tokenizer, where: str) -> None:
        """Compile a JSON schema.

        where: what error messages call the schema, such as "response_format".
        Raises InvalidRequest for a schema that cannot be enforced.
        """
        self._initial = _compile(tokenizer, normalize_schema(schema, where), where)
        self._return = tokenizer.special(RETURN)

    def matcher(self, end: int) -> Matcher:
        """Return the matcher of a new text. `end` is the token id that ends the text."""
        return Matcher(self._initial.deep_copy(), self._return, end)


class Matcher:
    """The state of one text under a grammar: which tokens may come next, updated token by token."""

    def __init__(self, matcher: LLMatcher, internal_end: int, end: int) -> None:
        """internal_end: the end token that `matcher` was compiled with. end: the one that replaces it in masks."""
        self._matcher = matcher
        self._internal_end = internal_end
        self._end = end

    def mask(self) -> bytes:
        """Return the mask of the tokens that may come next. It holds the end token once the text is complete.

        Raises GptOssError if computing it exceeds the limits above.
        """
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error() or not any(bits):
            raise GptOssError(f"generation under the schema failed ({_error(self._matcher)}); use a simpler schema")
        byte, bit = self._internal_end >> 3, 1 << (self._internal_end & 7)
        if bits[byte] & bit:
            bits[byte] &= ~bit
            bits[self._end >> 3] |= 1 << (self._end & 7)
        return bytes(bits)

    def accept(self, token: int) -> None:
        """Append a token to the text. Raises GptOssError for one that the mask does not allow."""
        if not self._matcher.consume_token(token):
            raise GptOssError(f"token {token} is not allowed by the schema ({_error(self._matcher)})")


def warm_up(tokenizer: Tokenizer) -> None:
    """Load the vocabulary into llguidance, so that the first request with a schema does not have to.

    llguidance holds the interpreter's lock meanwhile, half a second for the published vocabulary, and every other
    stream would wait.
    """
    _llguidance_tokenizer(tokenizer)


@lru_cache(maxsize=2)
def _llguidance_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapped = TokenizerWrapper(vocabulary(tokenizer))
    return LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size, slices=LLTokenizer.json_slices())


@lru_cache(maxsize=64)  # agents send the same tools with every request
def _compile(tokenizer: Tokenizer, schema: str, where: str) -> LLMatcher:
    """Return a matcher at the start of a text. It is cached and shared: copy it before advancing it."""
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
    """Return llguidance's error message on one line, at most 300 characters."""
    return " ".join((matcher.get_error() or "no text is valid").replace("<non-verbose/>", "").split())[:300]
