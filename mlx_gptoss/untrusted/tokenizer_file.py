"""What a tokenizer.json may contain. The file may come from anywhere, and the tokenizers library trusts it.

The library compiles and runs any regular expression, so a pattern that backtracks can make one prompt take hours. It
parses nested parts by trying every type at every level. Paddings and templates multiply what they are given. So, before
the library sees a file, everything but the vocabulary has to be what gpt-oss's files contain, and numbers and sizes are
bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .json_file import parse_json

MAX_BYTES = 64 * 2**20  # the published vocabulary with one merge for each token takes 15.5 MB, and its file lists more
MAX_ITEMS = 4_000_000  # in the sense of parse_json; the same vocabulary takes 0.8 million
MAX_ID = 2**20  # the published vocabulary has 201,088 ids
MAX_CHARACTERS = 1024  # of a token; the longest published one has 128
MAX_ADDED = 2**18  # characters of all added tokens
MAX_PATTERN = 4096  # characters of a pattern that is not a known one

SPLIT_PATTERNS = (  # how o200k, the published vocabulary, splits text before merging
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
_KNOWN = "|".join(map(re.escape, SPLIT_PATTERNS))
_KNOWN_PATTERN = re.compile(rf"(?:{_KNOWN})(?:\|(?:{_KNOWN}))*")
# Characters, escapes, classes and alternatives, but no repetition: the time at one position is bounded by the length.
_FLAT = r"(?:\\[AzsSdDnrt]|\\\W|\[[^\[\]&]*\]|[^\\\[\](){}*+?])*"
_FLAT_PATTERN = re.compile(rf"{_FLAT}(?:\(\?:{_FLAT}\){_FLAT})?(?:\(\?[=!]{_FLAT}\){_FLAT})?")


def check(data: bytes, name: str) -> int:
    """Return the size of the vocabulary, one more than its largest id, once the content of a tokenizer.json is checked.

    Raises CheckpointError for what is not a byte-level BPE like gpt-oss's, or is too large.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"cannot read the tokenizer {name}: it has {len(data)} bytes; {_REMEDY}")
    content = parse_json(data, f"cannot read the tokenizer {name}: it", MAX_ITEMS)
    try:
        _require(isinstance(content, dict), "is not an object")
        _require(content.get("normalizer") is None, "has a normalizer, which gpt-oss does not use")
        _check_parts(content.get("pre_tokenizer"), "pre_tokenizer", "pretokenizers", _check_pre_tokenizer)
        _check_parts(content.get("post_processor"), "post_processor", "processors", _check_post_processor)
        _check_byte_level(content.get("decoder"), "decoder")
        for part in ("truncation", "padding"):
            value = content.get(part)
            _require(
                value is None or (isinstance(value, dict) and len(json.dumps(value)) < 1000), f"has a large {part}"
            )
        return max(_check_model(content.get("model")), _check_added(content))
    except _Refused as refused:
        raise CheckpointError(f"cannot read the tokenizer {name}: it {refused}; {_REMEDY}") from None


_REMEDY = "download the model's original tokenizer.json"


class _Refused(Exception):
    """What is wrong with a file, after "it"."""


def _require(right: bool, otherwise: str) -> None:
    if not right:
        raise _Refused(otherwise)


def _check_parts(value: Any, where: str, key: str, check: Any) -> None:
    """Check nothing, one part, or a Sequence of at most four, which holds no further Sequence."""
    if value is None:
        return
    parts: Any = [value]
    if isinstance(value, dict) and value.get("type") == "Sequence":
        parts = value.get(key)
        _require(isinstance(parts, list) and len(parts) <= 4, f"has a {where} without a short list of parts")
    for part in parts:
        _require(isinstance(part, dict), f"has a {where} that is not an object")
        check(part, where)


def _check_pre_tokenizer(part: Mapping[str, Any], where: str) -> None:
    if part.get("type") != "Split":
        _check_byte_level(part, where)
        return
    pattern = part.get("pattern")
    found = list(pattern.items()) if isinstance(pattern, dict) else []
    is_text = len(found) == 1 and isinstance(found[0][1], str) and len(found[0][1]) <= MAX_PATTERN
    _require(is_text and found[0][0] in ("Regex", "String"), f"has a {where} without one short pattern")
    kind, text = found[0]
    if kind == "Regex":
        is_known = _KNOWN_PATTERN.fullmatch(text) or _FLAT_PATTERN.fullmatch(text)
        _require(bool(is_known), f"splits text by a pattern of its own, which might take unlimited time ({text!r:.80})")
    _require(set(part) <= {"type", "pattern", "behavior", "invert"}, f"has unknown fields in its {where}")


def _check_post_processor(part: Mapping[str, Any], where: str) -> None:
    """It is not used, because ids are taken without added ones. It need only be small."""
    if part.get("type") != "TemplateProcessing":
        _check_byte_level(part, where)
    _require(len(json.dumps(part)) <= MAX_PATTERN, f"has a large {where}")


def _check_byte_level(part: Any, where: str) -> None:
    flags = {"add_prefix_space", "trim_offsets", "use_regex"}
    is_right = (
        isinstance(part, dict)
        and part.get("type") == "ByteLevel"
        and all(key == "type" or (key in flags and isinstance(value, bool)) for key, value in part.items())
    )
    _require(is_right, f"is not byte-level BPE: its {where} is of another type than gpt-oss's")


def _check_model(model: Any) -> int:
    _require(isinstance(model, dict) and model.get("type") == "BPE", "is not byte-level BPE: it has another model")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _require(not model.get(field), f"sets {field}, which gpt-oss does not use")
    vocabulary, merges = model.get("vocab"), model.get("merges")
    _require(isinstance(vocabulary, dict) and len(vocabulary) > 0, "has no vocabulary")
    for token in vocabulary:
        _require(len(token) <= MAX_CHARACTERS, f"has a token of {len(token)} characters")
    ids = vocabulary.values()
    for id in ids:
        _require(_is_id(id), f"has the token id {id!r:.40}; ids go from 0 to {MAX_ID - 1}")
    _require(len(set(ids)) == len(ids), "has two tokens with one id")
    _require(isinstance(merges, list) and all(map(_is_merge, merges)), "has merges that are not pairs of tokens")
    return 1 + int(max(ids))


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_ID


def _is_merge(merge: Any) -> bool:
    """Whether it is a pair of tokens, in a list or with a space between them."""
    parts = [merge] if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != (1 if isinstance(merge, str) else 2):
        return False
    return all(isinstance(part, str) and len(part) <= 2 * MAX_CHARACTERS for part in parts)


def _check_added(content: Mapping[str, Any]) -> int:
    """Return one more than the largest id. Each id has one text, so that no text has the id of a special token."""
    added, vocabulary = content.get("added_tokens") or [], content["model"]["vocab"]
    _require(isinstance(added, list) and all(isinstance(token, dict) for token in added), "has malformed added_tokens")
    names = {id: token for token, id in vocabulary.items()}
    seen: set[str] = set()
    for token in added:
        id, text = token.get("id"), token.get("content")
        _require(_is_id(id), f"has the added token id {id!r:.40}; ids go from 0 to {MAX_ID - 1}")
        _require(
            isinstance(text, str) and 0 < len(text) <= MAX_CHARACTERS, "has an added token without a short content"
        )
        _require(names.setdefault(id, text) == text and text not in seen, f"has two tokens with the id {id}")
        _require(vocabulary.get(text, id) == id, f"has the added token {text!r:.40} under two ids")
        seen.add(text)
    _require(sum(map(len, seen)) <= MAX_ADDED, f"has added tokens of more than {MAX_ADDED} characters")
    return max((token["id"] + 1 for token in added), default=0)
