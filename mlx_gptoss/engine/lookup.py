"""Speculative drafts without a draft model, by prompt lookup.

If the last tokens occurred earlier in the sequence, what followed them then is proposed as the continuation. This
works because answers quote their prompt and themselves, especially names, code and tables (prompt lookup decoding,
Saxena 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MATCH_LENGTHS = (3, 2)  # numbers of last tokens to match, tried in this order


class PromptLookup:
    """The tokens of one sequence, indexed by the n-gram before each. Costs two dictionary entries per token."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._next_position: dict[int, int] = {}  # packed n-gram -> position after its latest occurrence
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Append the next token of the sequence."""
        position = len(self._tokens)
        for length in MATCH_LENGTHS:
            if position >= length:
                self._next_position[_pack(self._tokens[-length:])] = position
        self._tokens.append(token)

    def propose(self, max_drafts: int) -> tuple[int, ...]:
        """Up to `max_drafts` likely next tokens; empty if the last tokens have not occurred before.

        Where the earlier occurrence runs into the end of the sequence, its repetition is continued.
        """
        start = self._find_match()
        if start is None:
            return ()
        size, drafts = len(self._tokens), list[int]()
        for position in range(start, start + max_drafts):
            drafts.append(self._tokens[position] if position < size else drafts[position - size])
        return tuple(drafts)

    def _find_match(self) -> int | None:
        """Position after the latest earlier occurrence of the last tokens; the longest match first."""
        for length in MATCH_LENGTHS:
            if len(self._tokens) >= length:
                position = self._next_position.get(_pack(self._tokens[-length:]))
                if position is not None:
                    return position
        return None


def _pack(tokens: Sequence[int]) -> int:
    """A few token ids (below 2^24) as one int. The leading 1 makes sequences of different lengths differ."""
    number = 1
    for token in tokens:
        number = number << 24 | token
    return number
