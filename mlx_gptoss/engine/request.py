"""The engine's input and output types: Request in; Token, Finished and Status out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..errors import InvalidRequest
from ..options.check import integer
from ..sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled"]


class Guide(Protocol):
    """Constrains the tokens of one sequence, for example to a JSON schema.

    A guide has state, so every request needs its own. Its methods run on the engine thread and delay every stream
    while they run. Raising GptOssError fails that request alone.
    """

    def mask(self) -> bytes | None:
        """Bit mask of the tokens allowed next, in the format of backends.base.Row.mask; None allows all.

        While it is None, a request costs what it costs without a guide: drafts and sampling ahead go on.
        """
        ...

    def accept(self, token: int) -> None:
        """Advance by one generated token, which the mask allows. Not called for the last token of the sequence."""
        ...

    def ends_with(self, token: int) -> bool | None:
        """Whether the sequence ends with `token`, which the mask allows; None leaves it to Request.stop_ids."""
        ...


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter of the runner. index: as in backends.base.Row. digest: of what its numbers depend on; prompts with
    different ones share no prefix."""

    index: int
    digest: str


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    prompt: token ids, at least one.
    max_tokens: maximum number of tokens to generate, at least 1. The engine lowers it to what the context can hold.
    sampling: how tokens are drawn.
    stop_ids: generation ends at the first of these ids; that token is reported like any other.
    guide: constrains the generated tokens; None allows all tokens.
    adapter: which adapter computes it; None is the model as it is.
    message_ends: ids that end a message in the prompt. The prefix cache prefers to split prompts there (prefix.py).
    Raises InvalidRequest for an empty prompt or max_tokens that is not an integer of at least 1.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    guide: Guide | None = None
    message_ends: frozenset[int] = frozenset()
    adapter: LoadedAdapter | None = None

    @property
    def adapter_index(self) -> int | None:
        """As in backends.base.Row."""
        return None if self.adapter is None else self.adapter.index

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequest("the prompt is empty; give at least one token")
        integer("max_tokens", self.max_tokens, 1)


@dataclass(frozen=True)
class Token:
    """One generated token.

    logprob: natural logarithm of its probability under the raw logits.
    top: (id, logprob) of the likeliest tokens, likeliest first; Sampling.logprobs of them.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Status:
    """Load of an engine.

    slots: sequences that can run at once. running: sequences that have a slot. waiting: sequences queued for one.
    prefix_bytes: device memory held by the prefix cache. prompt_tokens: of the requests that have no token yet;
    prefilled_tokens: how many of these are computed, or came from the prefix cache. completion_tokens: generated so far
    by the requests that have not ended.
    """

    slots: int
    running: int
    waiting: int
    prefix_bytes: int
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Finished:
    """Why a stream ended, its token counts and its timings.

    reason: "stop": the last token is a stop id. "length": max_tokens or the context is used up. "cancelled".
    cached_tokens: how many of the prompt_tokens came from the prefix cache.
    drafted, accepted: draft tokens proposed, and how many of them were accepted.
    queue_s: seconds from submit to the first prefill step. prefill_s: from there to the first token.
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
        """Time to first token: seconds from submit to the first token."""
        return self.queue_s + self.prefill_s
