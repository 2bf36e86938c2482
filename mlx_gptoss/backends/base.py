"""The seam between the engine and a device: ints and dataclasses go in, ints and floats come out.

A runner is one loaded model on one device, owned by one thread. It keeps the KV cache in numbered slots, one
sequence each, and what sampling needs to remember of each slot. Arrays never cross this seam, apart from
`logits()`, which hands numpy to evaluation code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..config import ModelConfig
from ..sampling import Sampling

if TYPE_CHECKING:
    from ..weights.split import RankShard
    from ..weights.tensor import Weights


@dataclass(frozen=True)
class Row:
    """What one slot does in one step.

    slot: 0 <= slot < Limits.slots. A slot stands once in a step.
    start: position of the first token, which must be the slot's length so far; 0 begins a new sequence.
    tokens: the ids to feed; None feeds back what this slot sampled in the step before, still on the device.
    sampling: how to choose the next token after the last one; None chooses none (a prefill chunk but the last).
    prompt: on a request's first sampled row, its whole prompt: penalties start from it and the random stream is
        reseeded. None afterwards.
    drafts: guesses of what follows `tokens`, at most Limits.drafts, for a row of one given token that samples. They are
        fed, too, and the row samples a token after each that was guessed right, and one more. The slot's length is then
        that of the tokens fed before the last one sampled. What comes next hangs on the result, so such a row is not
        followed by another before it was read.
    mask: which tokens may come next, for a row that samples and has no drafts: token i if bit i % 8 of byte i // 8 is
        set, and none beyond its end. None allows all, and costs nothing. At least one token must be allowed.
    """

    slot: int
    start: int
    tokens: tuple[int, ...] | None
    sampling: Sampling | None = None
    prompt: tuple[int, ...] | None = None
    drafts: tuple[int, ...] = ()
    mask: bytes | None = None


def allowed_tokens(masks: Sequence[bytes | None], vocabulary: int) -> NDArray[np.bool_]:
    """Rows' masks, one bool a token: [B, V]."""
    allowed = np.ones((len(masks), vocabulary), dtype=np.bool_)
    for row, mask in zip(allowed, masks, strict=True):
        if mask is not None:
            row[:] = np.unpackbits(np.frombuffer(mask, np.uint8), count=vocabulary, bitorder="little")
    return allowed


@dataclass(frozen=True)
class Sampled:
    """One chosen token. `logprob` and `top` are natural logarithms under the raw logits (temperature 1, no
    penalties); `top` lists (id, logprob), likeliest first, Sampling.logprobs of them. `accepted`: the tokens after it,
    one for each draft of the row that was guessed right."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    accepted: tuple[Sampled, ...] = ()


@dataclass(frozen=True)
class Limits:
    """slots: sequences at once. max_context: tokens in one slot. chunk: most tokens of one row in one step.

    The mlx backend alone knows the others. drafts: most that a row may have. kv_bits: 8 keeps the full layers' keys and
    values in 8 bits; None as they are computed. resident_vocab: None has all weights on the device. A number, where
    memory is short, leaves the embeddings in the mapped file, to be looked up there, and of lm_head all rows but so
    many first ones, those of ids that the tokenizer has: the others are never sampled, and only logits() computes them.
    upcast: hold the dense matrices that every token reads in the activations' dtype, where a CPU has the memory for it.
    """

    slots: int
    max_context: int
    chunk: int
    drafts: int = 0
    kv_bits: int | None = None
    resident_vocab: int | None = None
    upcast: bool = False


class Snapshot(Protocol):
    """A sequence's cache as of `end`: the full layers' keys and values of positions start to end, and the sliding
    layers' rings as they were at the end, for a ring cannot be rewound. Of 20b in bfloat16, 24.6 kB a token and 3.1 MB.

    It lies on the device and never changes.
    """

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Pending(Protocol):
    """A step under way on the device."""

    def wait(self) -> list[Sampled | None]:
        """Block until the step is done; one entry a row, None where the row sampled nothing."""
        ...


class Runner(Protocol):
    """One loaded model on one device. All calls come from the thread that made it.

    The rows of one step may run in any order; `release` is called when no step under way touches the slot.
    """

    config: ModelConfig
    limits: Limits

    def submit(self, rows: Sequence[Row]) -> Pending:
        """Start one step and return at once. Steps run in the order they were submitted."""
        ...

    def release(self, slot: int) -> None:
        """Forget the slot's sequence. Its memory may be reused by the next one."""
        ...

    def save(self, slot: int, start: int, end: int) -> Snapshot:
        """What the slot's sequence holds from `start` to `end`, its length after all steps submitted so far."""
        ...

    def restore(self, slot: int, chain: Sequence[Snapshot]) -> None:
        """Begin the slot's sequence with snapshots that follow each other from 0; its length is then the last one's
        end. The numbers are those that were saved, bit for bit."""
        ...

    def pack(self, snapshot: Snapshot) -> bytes:
        """For a file. The bytes mean something to a runner of the same model, dtype and limits alone."""
        ...

    def unpack(self, start: int, end: int, data: bytes) -> Snapshot:
        """The snapshot again. Raises ValueError if the bytes are not those of one."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits [T, V] of one sequence; no slot is touched."""
        ...

    def peak_memory(self) -> int:
        """Most bytes the device held at once since loading."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """What the module of a backend offers. `device` and `dtype` None are the backend's best and its own default."""

    def load(
        self,
        checkpoint: Weights,
        *,
        device: str | None,
        dtype: str | None,
        limits: Limits,
        shard: RankShard | None = None,
    ) -> Runner:
        """The whole model on the device; or a rank's share of it, where `checkpoint` is that part (weights/split.py)
        and the other ranks load theirs at the same time. Those then have to be called alike, in the same order."""
        ...

    def dtype_name(self, device: str | None, dtype: str | None) -> str:
        """The name of the activations' dtype. Raises InvalidRequest for one that there is not."""
        ...

    def prefill_chunk(self, device: str | None) -> int:
        """Most tokens that one prefill step should have; the memory plan may take fewer."""
        ...

    def available_memory(self, device: str | None) -> int:
        """Bytes that a model may take there."""
        ...

    def device_name(self, device: str | None) -> str:
        """What a GPU calls itself, or "cpu" for all of those."""
        ...

    def copy_bandwidth(self, device: str | None) -> float:
        """Bytes a second that a copy in the device's memory reaches, read and written counted: the ceiling of decoding.
        Measured now, in well under a second, before a model is loaded; its buffers are given back."""
        ...


def working_space(config: ModelConfig, chunk: int, slots: int, activation_bytes: int) -> int:
    """The largest set of arrays alive at once in a forward pass: one layer's MoE, or its attention, or the logits."""
    active = config.num_experts_per_tok
    experts = chunk * active * (2 * config.hidden_size + 4 * config.intermediate_size)
    attention = chunk * 3 * (config.q_size + 2 * config.kv_size)
    stream = 3 * chunk * config.hidden_size
    logits = 4 * slots * config.vocab_size * 4
    return (stream + max(experts, attention)) * activation_bytes + logits
