"""Stop strings in streamed text, found wherever the token boundaries fall."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..errors import InvalidRequest


class StopStrings:
    """Ends streamed text before the first stop string.

    An Aho-Corasick automaton (Aho and Corasick 1975) over characters. Time is linear in the text. Exactly the longest
    suffix of the text that is a prefix of a stop string is held back. The first stop string to be complete wins; of
    those complete at the same character, the longest. So the result does not depend on how the text is split into
    pieces.

    stops: the stop strings. Raises InvalidRequest if one is empty.
    matched: the stop string that was found, or None.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]  # state -> character -> state; 0 is the root
        self._depth = [0]  # state -> characters read since the root
        self._fail = [0]  # state -> the state of its longest proper suffix (suffix link)
        self._found: list[str | None] = [None]  # state -> the longest stop string that ends here
        for stop in stops:
            self._insert(stop)
        self._link()
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Append text. Returns the text that can be shown now, and whether a stop string was found; ("", True) on
        every call after that."""
        if self.matched is not None:
            return "", True
        if len(self._next) == 1:
            return text, False
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            self._state = self._step(self._state, char)
            found = self._found[self._state]
            if found is not None:
                self.matched, self._held = found, ""
                return pending[: end - len(found)], True
        cut = len(pending) - self._depth[self._state]
        self._held = pending[cut:]
        return pending[:cut], False

    def flush(self) -> str:
        """End the text and return what was held back. The next push starts a new text."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def _insert(self, stop: str) -> None:
        if not stop:
            raise InvalidRequest("a stop string must not be empty")
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._fail.append(0)
                self._found.append(None)
            state = self._next[state][char]
        self._found[state] = stop

    def _link(self) -> None:
        """Set the suffix links, breadth first, so that the link of a state's suffix is set before its own."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                self._fail[child] = self._step(self._fail[state], char)
                self._found[child] = self._found[child] or self._found[self._fail[child]]
                queue.append(child)
