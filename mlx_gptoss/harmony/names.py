"""Function names: any name of a client, spelled so that Harmony's headers can hold it, and back.

A recipient such as "functions.get_weather" ends at white space, so a name with a space, or a very long one, does not
fit into a header. Such a name is spelled differently for the model. The spelling depends only on the names that a
conversation declares, so the conversation is rendered the same on every turn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

NAMESPACE = "functions."  # precedes the name of a function in a recipient
MAX_NAME_CHARACTERS = 128
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_UNSAFE_CHARACTERS = re.compile(r"[^A-Za-z0-9_.-]+")


class ToolNames:
    """The spellings of one conversation's functions. `names`: the client's names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._spelling: dict[str, str] = {}  # the client's name -> the model's
        self._original: dict[str, str] = {}  # and back
        for name in sorted(
            dict.fromkeys(names), key=lambda name: not _is_safe(name)
        ):  # safe names first: they stay as they are
            spelling = _spell(name)
            while spelling in self._original:
                spelling += "_"
            self._spelling[name], self._original[spelling] = spelling, name

    def spelling(self, name: str) -> str:
        """The name that the model sees. A name that is not declared, of an old call, is spelled by the same rule."""
        bare = name.removeprefix(NAMESPACE)
        return self._spelling.get(name) or self._spelling.get(bare) or _spell(bare)

    def recipient(self, name: str) -> str:
        """The recipient of a call of this function: "functions." and its spelling."""
        return NAMESPACE + self.spelling(name)

    def original(self, spelling: str) -> str:
        """The client's name of the function that the model called."""
        return self._original.get(spelling, spelling)


def _is_safe(name: str) -> bool:
    return len(name) <= MAX_NAME_CHARACTERS and _SAFE_NAME.fullmatch(name) is not None


def _spell(name: str) -> str:
    """The name with "_" for every run of other characters. A long one keeps its beginning and gets a hash."""
    if _is_safe(name):
        return name
    spelling = _UNSAFE_CHARACTERS.sub("_", name)
    if len(spelling) > MAX_NAME_CHARACTERS or not spelling.strip("_"):
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
        spelling = f"{spelling[: MAX_NAME_CHARACTERS - 13].strip('_') or 'function'}_{digest}"
    return spelling
