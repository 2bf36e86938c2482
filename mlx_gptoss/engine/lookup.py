"""Drafts without a draft model: what followed the last tokens when they stood in the text before.

Prompt lookup (Saxena 2023): answers quote their prompt and themselves, names, code and tables above all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MATCH_LENGTHS = (3, 2)  # tokens that must match, tried in this order


class PromptLookup:
    """One sequence's tokens, indexed by what stands before each. A token costs two dictionary entries."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._next_position: dict[
            int, int
        ] = {}  # the last tokens, packed -> the position of the one that came next, latest wins
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        position = len(self._tokens)
        for length in MATCH_LENGTHS:
            if position >= length:
                self._next_position[_pack(self._tokens[-length:])] = position
        self._tokens.append(token)

    def propose(self, max_drafts: int) -> tuple[int, ...]:
        """Up to `max_drafts` tokens that may come next; none if the last ones are new. A repetition is taken to go on."""
        size = len(self._tokens)
        positions = (
            self._next_position.get(_pack(self._tokens[-length:])) for length in MATCH_LENGTHS if size >= length
        )
        start = next((position for position in positions if position is not None), None)
        drafts: list[int] = []
        while start is not None and len(drafts) < max_drafts:
            position = start + len(drafts)
            drafts.append(self._tokens[position] if position < size else drafts[position - size])
        return tuple(drafts)


def _pack(tokens: Sequence[int]) -> int:
    """One number for a few tokens; their count is part of it."""
    number = 1
    for token in tokens:
        number = number << 24 | token
    return number
