"""Stop strings in streamed text, found wherever the token boundaries fall."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from ..errors import InvalidRequest


class StopStrings:
    """Ends streamed text before the first stop string.

    Each stop string is searched for with its own failure table (Knuth, Morris and Pratt 1977), in two to four bytes per
    character. Time is linear in the text, per stop string. Exactly the longest suffix of the text that is a prefix of a
    stop string is held back. The first stop string to be complete wins; of those complete at the same character, the
    longest. So the result does not depend on how the text is split into pieces.

    stops: the stop strings. Raises InvalidRequest if one is empty.
    matched: the stop string that was found, or None.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._searches = [_Search(stop) for stop in dict.fromkeys(stops)]
        self._searches.sort(key=lambda search: len(search.stop), reverse=True)  # so that the longest is found first
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Append text. Returns the text that can be shown now, and whether a stop string was found; ("", True) on
        every call after that."""
        if self.matched is not None:
            return "", True
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            for search in self._searches:
                if (search.length or char == search.first) and search.step(char):
                    self.matched, self._held = search.stop, ""
                    return pending[: end - len(search.stop)], True
        cut = len(pending) - max((search.length for search in self._searches), default=0)
        self._held = pending[cut:]
        return pending[:cut], False

    def flush(self) -> str:
        """End the text and return what was held back. The next push starts a new text."""
        held, self._held = self._held, ""
        for search in self._searches:
            search.length = 0
        return held


class _Search:
    """The search for one stop string. length: of the longest suffix of the text that is a prefix of it, and not all."""

    def __init__(self, stop: str) -> None:
        if not stop:
            raise InvalidRequest("a stop string must not be empty")
        self.stop = stop
        self.first = stop[0]
        self.length = 0
        # For each prefix, the length of the longest shorter prefix that it ends with.
        self._shorter = array("H" if len(stop) < 1 << 16 else "I", [0])
        for char in stop[1:]:
            self.step(char)
            self._shorter.append(self.length)
        self.length = 0

    def step(self, char: str) -> bool:
        """Append a character to the text. Returns whether the stop string ends with it."""
        length, stop = self.length, self.stop
        while length and stop[length] != char:
            length = self._shorter[length - 1]
        if stop[length] == char:
            length += 1
        if length == len(stop):
            self.length = 0
            return True
        self.length = length
        return False
