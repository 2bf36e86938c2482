"""The dialects as soak.py uses them: a request to reverse a word, and what the model says to it.

The bundled model spells a word it is to reverse, `1p 2l 3a 4n 5e 6t; 6t 5e 4n 3a 2l 1p`, and then answers `tenalp`.
So every reply to a conversation about a word of its own, cut off anywhere, shows which conversation it belongs to.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from soak_client import Connection, lines


class StreamError(Exception):
    """A stream ended in an error event."""


@dataclass(frozen=True)
class Said:
    """What a model said: reasoning and answer, and whether it finished."""

    reasoning: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Dialect:
    """One endpoint that generates.

    body: the request to reverse a word, with so many tokens. whole: what the model says in a response. delta: what it
    says in one event of a stream.
    """

    path: str
    body: Callable[[str, int], dict[str, Any]]
    whole: Callable[[Any], Said]
    delta: Callable[[Any], Said]


def new_word(r: random.Random) -> str:
    """A random word of seven letters, no two of them equal: the model spells these nearly always right."""
    return "".join(r.sample(string.ascii_lowercase, 7))


def question(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Reverse the word {word}."}]


def spelled(word: str) -> Said:
    """What the model should say."""
    parts = [f"{number}{letter}" for number, letter in enumerate(word, 1)]
    return Said(f"{' '.join(parts)}; {' '.join(reversed(parts))}", word[::-1])


def is_beginning(said: Said, expected: Said) -> bool:
    """Whether a reply, which may be cut off, is the expected one."""
    if not said.answer:
        return expected.reasoning.startswith(said.reasoning.rstrip())
    return said.reasoning in ("", expected.reasoning) and expected.answer.startswith(said.answer)


def _text(value: Mapping[str, Any], reasoning: str, answer: str) -> Said:
    return Said(value.get(reasoning) or "", value.get(answer) or "")


def _parts(blocks: list[Any], kind: str, *path: str) -> str:
    found = [block for block in blocks if block["type"] == kind]
    if path[0] == "content":
        return "".join(part.get("text", "") for block in found for part in block["content"])
    return "".join(block[path[0]] for block in found)


def _chat_event(event: Any) -> Said:
    return _text(event["choices"][0]["delta"], "reasoning", "content") if event.get("choices") else Said()


def _responses_event(event: Any) -> Said:
    kind = event["type"]
    return Said(
        event["delta"] if kind == "response.reasoning_text.delta" else "",
        event["delta"] if kind == "response.output_text.delta" else "",
    )


def _messages_event(event: Any) -> Said:
    delta = event.get("delta", {}) if event["type"] == "content_block_delta" else {}
    return _text(delta, "thinking", "text")


CHAT = Dialect(
    "/v1/chat/completions",
    lambda word, tokens: {
        "messages": question(word),
        "max_completion_tokens": tokens,
        "temperature": 0,
        "reasoning_effort": "low",
    },
    lambda reply: _text(reply["choices"][0]["message"], "reasoning", "content"),
    _chat_event,
)
RESPONSES = Dialect(
    "/v1/responses",
    lambda word, tokens: {
        "input": question(word),
        "max_output_tokens": tokens,
        "temperature": 0,
        "reasoning": {"effort": "low"},
        "store": False,
    },
    lambda reply: Said(
        _parts(reply["output"], "reasoning", "content"),
        _parts(reply["output"], "message", "content"),
    ),
    _responses_event,
)
MESSAGES = Dialect(
    "/v1/messages",
    lambda word, tokens: {
        "messages": question(word),
        "max_tokens": tokens,
        "temperature": 0,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    },
    lambda reply: Said(
        _parts(reply["content"], "thinking", "thinking"),
        _parts(reply["content"], "text", "text"),
    ),
    _messages_event,
)
OLLAMA_CHAT = Dialect(
    "/api/chat",
    lambda word, tokens: {
        "messages": question(word),
        "think": "low",
        "options": {"temperature": 0, "num_predict": tokens},
    },
    lambda reply: _text(reply["message"], "thinking", "content"),
    lambda event: _text(event["message"], "thinking", "content"),
)
OLLAMA_GENERATE = Dialect(
    "/api/generate",
    lambda word, tokens: {
        "prompt": f"Reverse the word {word}.",
        "think": "low",
        "options": {"temperature": 0, "num_predict": tokens},
    },
    lambda reply: _text(reply, "thinking", "response"),
    lambda event: _text(event, "thinking", "response"),
)


def completions(template: str) -> Dialect:
    """Raw completions. template: the prompt for the word WORD. The prompt has the reasoning, so that the answer of a
    few tokens is all that the model adds."""

    def body(word: str, tokens: int) -> dict[str, Any]:
        thought = f"<|channel|>analysis<|message|>{spelled(word).reasoning}<|end|>"
        prompt = f"{template.replace('WORD', word)}{thought}<|start|>assistant<|channel|>final<|message|>"
        return {"prompt": prompt, "max_tokens": tokens, "temperature": 0}

    def said(reply: Any) -> Said:
        return Said("", reply["choices"][0]["text"]) if reply.get("choices") else Said()

    return Dialect("/v1/completions", body, said, said)


async def ask(connection: Connection, dialect: Dialect, body: dict[str, Any]) -> Said | None:
    """What the model says to a request, streamed or not; None if the status is not 200.

    Raises StreamError if the stream ends in an error, and ValueError for what is no reply of this dialect.
    """
    if not body["stream"]:
        content = await connection.request("POST", dialect.path, body)
        return dialect.whole(json.loads(content)) if connection.status == 200 else None
    await connection.start("POST", dialect.path, json.dumps(body).encode())
    if connection.status != 200:
        async for _ in connection.chunks():
            pass
        return None
    said = Said()
    async for line in lines(connection):
        event = read_event(line)
        if event is not None:
            more = dialect.delta(event)
            said = Said(said.reasoning + more.reasoning, said.answer + more.answer)
    return said


def read_event(line: bytes) -> Any:
    """The event of one line of a stream; None for a line that has none. Raises StreamError for an error event."""
    data = line.removeprefix(b"data: ") if line.startswith(b"data: ") else line
    if not data.startswith(b"{"):
        return None
    event = json.loads(data)
    if event.get("error") or event.get("type") in ("error", "response.failed"):
        raise StreamError(data.decode()[:300])
    return event
