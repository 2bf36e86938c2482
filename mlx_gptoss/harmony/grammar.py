"""Grammar-constrained decoding: which tokens may come next in JSON under a schema, or in text under a grammar.

Only this module imports llguidance.

Schemas and grammars come from untrusted clients. Their size, the time to compile them and the memory of a running match
are bounded, and what cannot be enforced is refused before generation starts (json_schema.py). The arguments of
functions are the exception: agents declare functions with whatever their libraries make of a type, and expect calls of
them, so what cannot be enforced is left out there, with a warning.

Whitespace: between any two JSON tokens the grammar allows nothing, one space, or a line break with up to 24 columns of
indentation. That covers json.dumps with and without `indent`, which is how gpt-oss writes JSON, and rules out endless
white space. Numbers and nesting are bounded in json_limits.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

from ..errors import GptOssError, InvalidRequest
from ..tokenizer import RETURN, Tokenizer
from .json_limits import JsonLimits, begins_with_digit, opens
from .json_schema import MAX_CHARACTERS, normalize_parameters, normalize_schema
from .messages import Syntax
from .per_tokenizer import cached

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_log = logging.getLogger(__name__)

WHITESPACE = r"\x20|\x0A[\x20\x09]{0,24}"
MAX_LEXER_STATES = 25_000  # per match; a state takes 1 to 2 kB
MAX_PARSER_ITEMS = 10_000  # per position of a match: for example, the properties that may come next
MAX_TEXT_ITEMS = 2_000  # the same for text grammars, which may be ambiguous: a mask of 2,000 items takes 10 ms
MAX_DEFINITION = 1 << 16  # characters of a Lark grammar or a regular expression
CACHED_BYTES = 64 << 20  # in each cache, by `_size`: agents send the same 30 to 150 functions with every request

_ANY_OBJECT = '{"type": "object"}'
_NO_PARAMETERS = {"type": "object", "additionalProperties": False}


class Vocabulary:
    """The tokens of a tokenizer, as bit masks (see backends.base.Row) and as llguidance's TokenizerWrapper takes them.

    The attributes that end in `_token_id`, `tokens`, `special_token_ids` and `__call__` are read by llguidance. It
    holds the Vocabulary out of the garbage collector's sight, so a Vocabulary does not hold its tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id: int = tokenizer.special(RETURN)
        self.bos_token_id: int | None = None
        self.tokens: list[bytes] = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.special_token_ids: list[int] = sorted(tokenizer.specials.values())
        self._mask_bytes = 4 * -(-tokenizer.vocab_size // 32)
        self._digit_mask = self.mask(id for id, token in enumerate(self.tokens) if begins_with_digit(token))
        self._opening_mask = self.mask(id for id, token in enumerate(self.tokens) if opens(token))
        self._encode = WeakMethod(tokenizer.encode)

    def __call__(self, text: str) -> list[int]:
        encode = self._encode()
        if encode is None:
            raise RuntimeError("the tokenizer of this vocabulary no longer exists")
        return encode(text)

    def json_limits(self) -> JsonLimits:
        """Return the limits of a new JSON text."""
        return JsonLimits(self.tokens, self._digit_mask, self._opening_mask)

    def mask(self, ids: Iterable[int]) -> bytes:
        """Return the mask of the tokens `ids`: one bit per token, in 32-bit words."""
        bits = bytearray(self._mask_bytes)
        for id in ids:
            bits[id >> 3] |= 1 << (id & 7)
        return bytes(bits)


@cached(1)  # building the published vocabulary takes a second and 100 MB
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return the Vocabulary of a tokenizer, built once."""
    return Vocabulary(tokenizer)


class Grammar:
    """A set of texts, such as all JSON texts that are valid under one schema. Immutable; threads may share it.

    Made by json_grammar, arguments_grammar and text_grammar.
    """

    def __init__(self, initial: LLMatcher, vocabulary: Vocabulary, *, json: bool) -> None:
        """initial: a matcher at the start of a text, which is copied. json: whether the texts are JSON."""
        self._initial = initial
        self._vocabulary = vocabulary
        self._json = json

    def matcher(self, end: int) -> Matcher:
        """Return the matcher of a new text. `end` is the token id that ends the text."""
        limits = self._vocabulary.json_limits() if self._json else None
        return Matcher(self._initial.deep_copy(), self._vocabulary.eos_token_id, end, limits)


def json_grammar(schema: Any, tokenizer: Tokenizer, where: str) -> Grammar:
    """Return the JSON texts that are valid under a schema.

    where: what error messages call the schema, such as "response_format".
    Raises InvalidRequest for a schema that cannot be enforced.
    """
    return _json_grammar(tokenizer, normalize_schema(schema, where), where)


def arguments_grammar(parameters: Mapping[str, Any] | None, tokenizer: Tokenizer, where: str, strict: bool) -> Grammar:
    """Return the JSON objects that are valid as arguments under a function's `parameters`; None is no parameters.

    What cannot be enforced is refused if the function is `strict` (InvalidRequest). Otherwise the rest is enforced (see
    normalize_parameters), or any JSON object is valid, and a warning is logged.
    """
    schema = _NO_PARAMETERS if parameters is None else parameters
    if strict:
        return _json_grammar(tokenizer, normalize_parameters(schema, where, strict=True)[0], where)
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError, RecursionError):
        text = ""
    return _relaxed_grammar(tokenizer, text if len(text) <= MAX_CHARACTERS else "", where)


def _size(*texts: str) -> int:
    """About the bytes of a grammar, from its definition: 40 to 70 kB, 15 to 25 more once texts were matched, as copies
    share what the lexer finds out, and 130 for each character of an object with many properties: the most measured."""
    return (80 << 10) + 128 * sum(map(len, texts))


@cached(CACHED_BYTES, _size)
def _relaxed_grammar(tokenizer: Tokenizer, parameters: str, where: str) -> Grammar:
    """Return the arguments of a function that is not strict. parameters: as JSON; empty if they are not JSON or too
    long."""
    try:
        if not parameters:
            raise InvalidRequest(f"{where} must be plain JSON of at most {MAX_CHARACTERS} characters")
        text, dropped = normalize_parameters(json.loads(parameters), where, strict=False)
        grammar = _json_grammar(tokenizer, text, where)
    except InvalidRequest as error:
        _log.warning("%s; its calls may have any JSON object", error)
        return _json_grammar(tokenizer, _ANY_OBJECT, where)
    if dropped:
        more = f" and {len(dropped) - 1} more" if dropped[1:] else ""
        _log.warning("%s%s; the rest of it is enforced", dropped[0].removesuffix("; leave it out"), more)
    return grammar


def text_grammar(syntax: Syntax, definition: str, tokenizer: Tokenizer, where: str) -> Grammar:
    """Return the texts that a Lark grammar or a regular expression describes, in llguidance's dialects.

    Raises InvalidRequest for one that is broken, too large or too complex.
    """
    if len(definition) > MAX_DEFINITION:
        raise InvalidRequest(
            f"{where} has {len(definition)} characters, more than {MAX_DEFINITION}; give a smaller grammar"
        )
    return _text_grammar(tokenizer, syntax, definition, where)


@cached(CACHED_BYTES, _size)
def _text_grammar(tokenizer: Tokenizer, syntax: Syntax, definition: str, where: str) -> Grammar:
    from llguidance import LLMatcher

    of = LLMatcher.grammar_from_lark if syntax == "lark" else LLMatcher.grammar_from_regex
    return Grammar(
        _initial_matcher(tokenizer, of(definition), where, MAX_TEXT_ITEMS), vocabulary(tokenizer), json=False
    )


@cached(CACHED_BYTES, _size)
def _json_grammar(tokenizer: Tokenizer, schema: str, where: str) -> Grammar:
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    except ValueError as error:
        raise InvalidRequest(f"{where} cannot be enforced: {error}") from error
    return Grammar(_initial_matcher(tokenizer, grammar, where, MAX_PARSER_ITEMS), vocabulary(tokenizer), json=True)


def _initial_matcher(tokenizer: Tokenizer, grammar: str, where: str, max_items: int) -> LLMatcher:
    """Return a matcher at the start of a text. Raises InvalidRequest for a grammar that cannot be enforced."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, max_items_in_row=max_items, verbose_errors=False)
    matcher = LLMatcher(_llguidance_tokenizer(tokenizer), grammar, log_level=0, limits=limits)
    if matcher.is_error() or not any(matcher.compute_bitmask()) or matcher.is_error() or matcher.is_stopped():
        raise InvalidRequest(f"{where} cannot be enforced: {_error(matcher)}")
    return matcher


class Matcher:
    """The state of one text under a grammar: which tokens may come next, updated token by token."""

    def __init__(self, matcher: LLMatcher, internal_end: int, end: int, limits: JsonLimits | None) -> None:
        """internal_end: the end token that `matcher` was compiled with. end: the one that replaces it in masks."""
        self._matcher = matcher
        self._internal_end = internal_end
        self._end = end
        self._limits = limits

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
        return bytes(bits if self._limits is None else self._limits.narrow(bits))

    def accept(self, token: int) -> None:
        """Append a token to the text. Raises GptOssError for one that the mask does not allow."""
        if not self._matcher.consume_token(token):
            raise GptOssError(f"token {token} is not allowed by the schema ({_error(self._matcher)})")
        if self._limits is not None:
            self._limits.accept(token)


def warm_up(tokenizer: Tokenizer) -> None:
    """Load the vocabulary into llguidance, so that the first request with a schema does not have to.

    llguidance holds the interpreter's lock meanwhile, half a second for the published vocabulary, and every other
    stream would wait.
    """
    _llguidance_tokenizer(tokenizer)


@cached(1)
def _llguidance_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapped = TokenizerWrapper(vocabulary(tokenizer))
    return LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size, slices=LLTokenizer.json_slices())


def _error(matcher: LLMatcher) -> str:
    """Return llguidance's error message on one line, at most 300 characters."""
    return " ".join((matcher.get_error() or "no text is valid").replace("<non-verbose/>", "").split())[:300]
