r"""Translation of regular expressions from JSON Schema's dialect (ECMA-262) to llguidance's (Rust's regex).

A pattern is translated only if it means the same in both dialects; otherwise it is refused. Two constructs are
rewritten, both so that they match slightly less:

- `.` does not match a carriage return either.
- A negated class does not match U+0001. llguidance 1.9 escapes strings itself, and takes a class that holds every
  control character except the line feed for "any character", whatever else the class excludes: `[^"]` would match `\"`.
"""

from __future__ import annotations

import re

_ESCAPE = r"\\(?:[dDwWsSnrtfv_]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[pP]\{[\w=]+\}|[^\w\s<>])"
_GROUP = r"\((?:\?:|\?<[A-Za-z_]\w*>|(?!\?))"
_OUTSIDE_CLASS = re.compile(rf"{_ESCAPE}|{_GROUP}|\[(?!\^?\])\^?|[^\\(\[]", re.DOTALL)
# Rust allows classes within classes, and operators (&&, --, ~~) on them.
_INSIDE_CLASS = re.compile(rf"{_ESCAPE}|(?!&&|--|~~)[^\\\[]", re.DOTALL)
_U0000_OR_U0001 = re.compile(r"\\x0[01]|\\u000[01]|[\x00\x01]")


def translate_pattern(pattern: str) -> str | None:
    """Return the pattern in llguidance's dialect, or None if it might not mean the same there."""
    pieces, position = [], 0
    class_start = ""  # "[" or "[^" within a class
    while position < len(pattern):
        token = (_INSIDE_CLASS if class_start else _OUTSIDE_CLASS).match(pattern, position)
        if token is None or (class_start != "[^" and _U0000_OR_U0001.fullmatch(token[0])):
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
