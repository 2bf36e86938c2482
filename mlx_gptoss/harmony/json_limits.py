"""Limits on JSON that its grammar leaves open, and that a model may get stuck in."""

from __future__ import annotations

from collections.abc import Sequence

MAX_DIGITS = 40  # of a number, with its sign, point and exponent; a float64 has 24 at most
MAX_DEPTH = 64  # of arrays and objects within each other

_QUOTE, _BACKSLASH = b'"\\'
_OPENING, _CLOSING, _OF_NUMBERS = b"[{", b"]}", b"0123456789+-.eE"


def begins_with_digit(token: bytes) -> bool:
    """Whether a number goes on with the token."""
    return token[:1].isdigit()


def opens(token: bytes) -> bool:
    """Whether an array or object begins in the token, outside of strings."""
    return any(byte in _OPENING for byte in token)


class JsonLimits:
    """Ends what a model may get stuck in: the digits of a number, and arrays and objects within each other.

    It reads the text along, and past a limit removes the tokens that would go on. Grammars do not bound these two;
    they bound white space. Strings, arrays and objects end where the model ends them.
    """

    def __init__(self, tokens: Sequence[bytes], digit_mask: bytes, opening_mask: bytes) -> None:
        """tokens: the bytes of each. The masks (backends.base.Row) are those of the two functions above."""
        self._tokens = tokens
        self._digit_mask, self._opening_mask = digit_mask, opening_mask
        self._in_string = self._escaped = False
        self._digits = 0  # of the number that the text ends in, and its sign, point and exponent
        self._depth = 0

    def accept(self, token: int) -> None:
        """Append a token to the text."""
        for byte in self._tokens[token]:
            if self._in_string:
                self._in_string = self._escaped or byte != _QUOTE
                self._escaped = byte == _BACKSLASH and not self._escaped
                continue
            self._in_string = byte == _QUOTE
            self._digits = self._digits + 1 if byte in _OF_NUMBERS else 0
            self._depth += (byte in _OPENING) - (byte in _CLOSING)

    def narrow(self, bits: bytearray) -> bytearray:
        """Return the mask without the tokens that a limit forbids, unless no token would be left."""
        if self._in_string or (self._digits < MAX_DIGITS and self._depth < MAX_DEPTH):
            return bits
        drop = self._digit_mask if self._digits >= MAX_DIGITS else self._opening_mask
        kept = int.from_bytes(bits, "little") & ~int.from_bytes(drop, "little")
        return bytearray(kept.to_bytes(len(bits), "little")) if kept else bits
