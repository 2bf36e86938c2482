"""Regular expressions of JSON schemas (ECMA-262's) as llguidance reads them (Rust's), where both mean the same.

What one of them lacks, or reads otherwise, is refused. Two things are rewritten, both to allow a little less: `.` is no
carriage return either, and no negated class holds U+0001. For to llguidance 1.9, which quotes strings itself, a class
with every control character but the line feed is any character at all, whatever else it excludes: `[^"]` let `\\"` in.
"""

from __future__ import annotations

import re

_ESCAPE = r"\\(?:[dDwWsSnrtfv_]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[pP]\{[\w=]+\}|[^\w\s<>])"
_GROUP = r"\((?:\?:|\?<[A-Za-z_]\w*>|(?!\?))"
_OUTSIDE_CLASS = re.compile(rf"{_ESCAPE}|{_GROUP}|\[(?!\^?\])\^?|[^\\(\[]", re.DOTALL)
_INSIDE_CLASS = re.compile(
    rf"{_ESCAPE}|(?!&&|--|~~)[^\\\[]", re.DOTALL
)  # of a class; in Rust's, classes nest and subtract
_LOWEST_CONTROLS = re.compile(r"\\x0[01]|\\u000[01]|[\x00\x01]")


def translate_pattern(pattern: str) -> str | None:
    """The pattern for llguidance; None for one that cannot be relied on to mean the same there."""
    pieces, position, class_start = [], 0, ""  # class_start: how the class began that is being read
    while position < len(pattern):
        token = (_INSIDE_CLASS if class_start else _OUTSIDE_CLASS).match(pattern, position)
        if token is None or (class_start != "[^" and _LOWEST_CONTROLS.fullmatch(token[0])):
            return None
        text, position = token[0], token.end()
        if class_start:
            class_start = "" if text == "]" else class_start
        elif text in ("[", "[^"):
            class_start = text
            text += r"\x01" if text == "[^" else ""
        elif text == ".":
            text = r"[^\n\r]"
        pieces.append(text)
    return None if class_start else "".join(pieces)
