"""The text that a model is calibrated on, as windows of tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest
from ..harmony.openai import from_chat
from ..harmony.render import prompt_messages, render_messages
from ..tokenizer import ENDOFTEXT, RETURN, Tokenizer

DEFAULT_TEXT = Path(__file__).parent / "text.txt"  # written by examples/tools/calibration_text.py
WINDOW = 2048  # tokens that see each other
MAX_TOKENS = 65_536  # of a longer text, documents evenly spaced in it


@dataclass(frozen=True)
class CalibrationText:
    """windows: tokens that see each other. digest: SHA-256 of all of them."""

    windows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))

    @property
    def lengths(self) -> list[int]:
        """The tokens of each window."""
        return [len(window) for window in self.windows]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.windows).encode()).hexdigest()


def split_documents(text: str) -> list[str]:
    """The documents of a text: `<|endoftext|>`, with the line break after it, ends one."""
    return [part for part in re.split(re.escape(ENDOFTEXT) + r"\r?\n?", text) if part]


def read_text(
    path: Path | None, tokenizer: Tokenizer, *, max_tokens: int = MAX_TOKENS, window: int = WINDOW
) -> CalibrationText:
    """The text of a file, or the default one.

    path: UTF-8. In a .jsonl file each line is a document: {"text": ...}, or {"messages": [...]} as in a chat request,
        which is rendered as the model sees it. Any other file is text in which `<|endoftext|>` ends a document. Special
        tokens in a text are encoded as such.
    Raises InvalidRequest for a file that cannot be read so, and for a text of less than two tokens.
    """
    path = DEFAULT_TEXT if path is None else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read as the text to calibrate on ({error})") from error
    if path.suffix == ".jsonl":
        documents = list(_json_documents(text, path.name, tokenizer))
    else:
        documents = [tokenizer.encode_with_specials(part) for part in split_documents(text)]
    windows = [tuple(ids[start : start + window]) for ids in documents for start in range(0, len(ids), window)]
    chosen = _evenly(windows, max_tokens)
    if sum(map(len, chosen)) < 2:
        raise InvalidRequest(f"{path} has no text to calibrate on; it needs at least two tokens, better 50,000")
    return CalibrationText(tuple(chosen))


def _evenly(windows: list[tuple[int, ...]], max_tokens: int) -> list[tuple[int, ...]]:
    """Windows of at most `max_tokens` together, evenly spaced among all; the last may be cut."""
    total = sum(map(len, windows))
    if total <= max_tokens:
        return windows
    chosen: list[tuple[int, ...]] = []
    seen = taken = 0
    for window in windows:
        if taken <= seen * max_tokens / total and taken < max_tokens:  # what was taken so far has fallen behind
            chosen.append(window[: max_tokens - taken])
            taken += len(chosen[-1])
        seen += len(window)
    return chosen


def _json_documents(text: str, name: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield _document(json.loads(line), tokenizer)
        except (ValueError, TypeError, InvalidRequest) as error:
            raise InvalidRequest(
                f'line {number} of {name} is not a document, {{"text": "..."}} or {{"messages": [...]}}: {error}'
            ) from error


def _document(entry: Any, tokenizer: Tokenizer) -> list[int]:
    """The tokens of one line. Raises InvalidRequest."""
    if not isinstance(entry, dict) or not ("text" in entry) ^ ("messages" in entry):
        raise InvalidRequest("it is not an object with either of the two")
    if "messages" in entry:
        conversation = from_chat(entry["messages"], tools=entry.get("tools") or ())
        messages = prompt_messages(conversation)
        ids = render_messages(messages, tokenizer)
        if messages[-1].channel == "final":
            ids[-1] = tokenizer.special(RETURN)  # as the model ends its answer
        return ids
    if not isinstance(entry["text"], str):
        raise InvalidRequest("its text is not a string")
    return tokenizer.encode_with_specials(entry["text"])
