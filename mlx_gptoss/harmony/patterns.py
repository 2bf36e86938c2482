"""Regular expressions of JSON schemas (ECMA-262's) as llguidance reads them (Rust's), where both mean the same.

What one of them lacks, or reads otherwise, is refused. Two things are rewritten, both to allow a little less: `.` is no
carriage return either, and no negated class holds U+0001. For to llguidance 1.9, which quotes strings itself, a class
with every control character but the line feed is any character at all, whatever else it excludes: `[^"]` let `\\"` in.
"""

from __future__ import annotations

import re

_ESCAPE = r"\\(?:[dDwWsSnrtfv_]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[pP]\{[\w=]+\}|[^\w\s<>])"
_GROUP = r"\((?:\?:|\?<[A-Za-z_]\w*>|(?!\?))"
_OUTSIDE = re.compile(rf"{_ESCAPE}|{_GROUP}|\[(?!\^?\])\^?|[^\\(\[]", re.DOTALL)
_INSIDE = re.compile(rf"{_ESCAPE}|(?!&&|--|~~)[^\\\[]", re.DOTALL)  # of a class; in Rust's, classes nest and subtract
_LOWEST = re.compile(r"\\x0[01]|\\u000[01]|[\x00\x01]")


def translated(pattern: str) -> str | None:
    """The pattern for llguidance; None for one that cannot be relied on to mean the same there."""
    pieces, place, within = [], 0, ""  # within: how the class began that is being read
    while place < len(pattern):
        token = (_INSIDE if within else _OUTSIDE).match(pattern, place)
        if token is None or (within != "[^" and _LOWEST.fullmatch(token[0])):
            return None
        text, place = token[0], token.end()
        if within:
            within = "" if text == "]" else within
        elif text in ("[", "[^"):
            within = text
            text += r"\x01" if text == "[^" else ""
        elif text == ".":
            text = r"[^\n\r]"
        pieces.append(text)
    return None if within else "".join(pieces)
