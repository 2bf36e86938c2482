"""Drafts without a draft model: what followed the last tokens when they stood in the text before.

Prompt lookup (Saxena 2023): answers quote their prompt and themselves, names, code and tables above all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LENGTHS = (3, 2)  # tokens that must match, tried in this order


class Lookup:
    """One sequence's tokens, indexed by what stands before each. A token costs two dictionary entries."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[int, int] = {}  # the last tokens, packed -> the place of the one that came next, latest wins
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        place = len(self._tokens)
        for length in LENGTHS:
            if place >= length:
                self._after[_packed(self._tokens[-length:])] = place
        self._tokens.append(token)

    def propose(self, most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may come next; none if the last ones are new. A repetition is taken to go on."""
        size = len(self._tokens)
        places = (self._after.get(_packed(self._tokens[-length:])) for length in LENGTHS if size >= length)
        start = next((place for place in places if place is not None), None)
        drafts: list[int] = []
        while start is not None and len(drafts) < most:
            place = start + len(drafts)
            drafts.append(self._tokens[place] if place < size else drafts[place - size])
        return tuple(drafts)


def _packed(tokens: Sequence[int]) -> int:
    """One number for a few tokens; their count is part of it."""
    number = 1
    for token in tokens:
        number = number << 24 | token
    return number
