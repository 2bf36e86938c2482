"""What goes into the engine and what comes out: a request, its tokens one by one, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..errors import InvalidRequest
from ..sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled"]


class Guide(Protocol):
    """What one sequence may say. Not shared between requests: it follows the tokens. Runs on the engine thread, where
    it holds up every stream, and fails its own request by raising GptOssError."""

    def mask(self) -> bytes | None:
        """The tokens that may come next, as backends.base.Row.mask; None for all."""
        ...

    def accept(self, token: int) -> None:
        """`token` came next. Not called for the last one."""
        ...


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    prompt: token ids, at least one.
    max_tokens: most tokens to generate, at least 1. The engine lowers it to what the context has room for.
    stop_ids: generation ends with the first of these; that token is reported like any other.
    guide: what may come next at each token; None allows all.
    message_ends: the ids that end a message of the prompt: good places to take it up again (prefix.py).
    Raises InvalidRequest for an empty prompt or a max_tokens below 1.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    guide: Guide | None = None
    message_ends: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequest("the prompt is empty; give at least one token")
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, not {self.max_tokens}")


@dataclass(frozen=True)
class Token:
    """One generated token. `logprob` and `top` as in backends.base.Sampled: natural logarithms under the raw logits."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Status:
    """What an engine is at. running: sequences that have a slot; waiting: those that wait for one. prefix_bytes: that
    the prefix cache holds in memory."""

    slots: int
    running: int
    waiting: int
    prefix_bytes: int


@dataclass(frozen=True)
class Finished:
    """How a stream ended, what it used, and how long it took.

    reason: "stop": the last token is a stop id. "length": max_tokens or the context is used up. "cancelled".
    cached_tokens: prompt tokens that did not have to be computed, out of prompt_tokens.
    drafted, accepted: tokens that were guessed ahead, and those of them that were right.
    queue_s: seconds from submit to the first prefill step; prefill_s: from there to the first token;
        decode_s: from the first token to the last.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        """Seconds from submit to the first token."""
        return self.queue_s + self.prefill_s
