"""The seam between the engine and a device: ints and dataclasses go in, ints and floats come out.

A runner is one loaded model on one device, owned by one thread. It keeps the KV cache in numbered slots, one
sequence each, and what sampling needs to remember of each slot. Arrays never cross this seam, except in `logits()`,
which returns numpy for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..config import ModelConfig
from ..sampling import Sampling
from ..weights.tensor import AFFINE_BITS, Spec

if TYPE_CHECKING:
    from ..weights.adapters import Adapter
    from ..weights.split import RankShard
    from ..weights.tensor import Weights


MatMul = Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]  # float32 [M, K] @ [K, N], transposed or not
Read = tuple[int, Spec | None]  # values of an array that a decode step reads, and their storage; None is dense


@dataclass(frozen=True)
class Products:
    """What computes large products of numpy arrays (Backend.matmul).

    name: for the user. on_device: whether it copies the arrays to a device.
    """

    name: str
    matmul: MatMul
    on_device: bool


NUMPY_PRODUCTS = Products("numpy on the CPU", np.matmul, on_device=False)


@dataclass(frozen=True)
class Row:
    """What one slot does in one step.

    slot: 0 <= slot < Limits.slots; at most one row per slot and step.
    start: position of the first token, equal to the slot's length so far; 0 begins a new sequence. A row of one given
        token may step back by one position, to feed the slot's last token again: the token sampled after it is then
        sampled anew. After a row with drafts it may step back to any position that this row fed.
    tokens: the ids to feed; None feeds back the token that this slot sampled in the previous step, still on the device.
    sampling: how to sample the token after the last one; None samples nothing (every prefill chunk except the last).
    prompt: on a request's first sampled row, its whole prompt: penalties start from it and the random stream is
        reseeded. None afterwards.
    drafts: proposed continuations of `tokens`, at most Limits.drafts, for a row with one given token that samples.
        They are fed as well; the row samples one token after each correct draft, and one more. The slot's length then
        counts the tokens before the last one sampled. The next row depends on the result, so it must not be submitted
        before this one is read.
    mask: the tokens allowed next, for a row that samples and has no drafts: token i if bit i % 8 of byte i // 8 is set,
        and none beyond its end. None allows all tokens at no cost. At least one token must be allowed.
    stages: (first, end) of the stages (stage_count) that this row computes; None computes all. For a row of several
        tokens without drafts. The rows of one chunk have the same start and tokens, each begins at the stage where the
        one before it ended, and other slots may run in between. The last of them samples, and completes the chunk:
        until then it does not count towards the slot's length. The result is bit for bit that of one row.
    adapter: the index of the adapter that the row's products use, in Backend.load's order; None is the model as it is.
        All rows of a sequence have the same one. Rows without an adapter compute what they would without the others.
    save_at: positions after the first token, up to the one after the last, ascending, of which Runner.save may be
        called once the row has been submitted and before the next step is. For a row of given tokens without drafts;
        the same in all rows of one chunk.
    """

    slot: int
    start: int
    tokens: tuple[int, ...] | None
    sampling: Sampling | None = None
    prompt: tuple[int, ...] | None = None
    drafts: tuple[int, ...] = ()
    mask: bytes | None = None
    stages: tuple[int, int] | None = None
    adapter: int | None = None
    save_at: tuple[int, ...] = ()

    @property
    def saves_inside(self) -> bool:
        """Whether a snapshot may be saved of a position before the row's end, so that what the row overwrites of the
        rings has to be kept."""
        return bool(self.save_at) and self.save_at[0] < self.start + len(self.tokens or ())


def stage_count(config: ModelConfig) -> int:
    """Number of stages of a forward pass: every layer's attention, and after it the layer's experts."""
    return 2 * config.num_hidden_layers


def used_adapters(rows: Sequence[Row]) -> list[tuple[int, list[bool] | None]]:
    """The adapters that a group of rows uses, each with the rows that use it; None if all do."""
    found = sorted({row.adapter for row in rows if row.adapter is not None})
    uses = [(index, [row.adapter == index for row in rows]) for index in found]
    return [(index, None if all(mask) else mask) for index, mask in uses]


def allowed_tokens(masks: Sequence[bytes | None], vocabulary: int) -> NDArray[np.bool_]:
    """The masks of B rows as booleans, one per token: [B, V]."""
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


def verified(drafts: Sequence[int], sampled: Callable[[int], Sampled]) -> Sampled:
    """The token sampled for a row, with those after it in `accepted`: one more for each draft that was right.

    sampled: the token at the row's last token, for 0, and at its drafts, for 1 and so on.
    """
    tokens = []
    for index, draft in enumerate((*drafts, None)):
        tokens.append(sampled(index))
        if tokens[-1].token != draft:
            break
    return replace(tokens[0], accepted=tuple(tokens[1:]))


@dataclass(frozen=True)
class Limits:
    """What a runner has memory for.

    slots: sequences at once. max_context: tokens per slot. chunk: maximum tokens of one row in one step. kv_bits: 8
    keeps keys and values of the full-attention layers in 8 bits; None as they are computed. drafts: maximum per row.

    Only the mlx backend uses the others. resident_vocab: None puts all weights on the device. A number, for short
    memory, leaves the embeddings in the mapped file, and keeps only the first rows of lm_head on the device, those of
    ids that the tokenizer has: the others are never sampled, and only logits() computes them.
    upcast: hold the dense matrices that every token reads in the activations' dtype, on a CPU with enough memory.
    custom_kernels: use the custom Metal kernels that agree with MLX's own operations here.
    """

    slots: int
    max_context: int
    chunk: int
    drafts: int = 0
    kv_bits: int | None = None
    resident_vocab: int | None = None
    upcast: bool = False
    custom_kernels: bool = True


class Snapshot(Protocol):
    """A sequence's cache as of `end`: keys and values of positions start to end in the full-attention layers, and the
    sliding layers' rings at the end, because a ring cannot be rewound. 20b in bfloat16: 24.6 kB per token and 3.1 MB.

    It stays on the device and never changes.
    """

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Pending(Protocol):
    """A step in progress on the device."""

    def wait(self) -> list[Sampled | None]:
        """Block until the step is done. One entry per row, None for a row that sampled nothing."""
        ...


class Runner(Protocol):
    """One loaded model on one device. All calls come from the thread that made it.

    The rows of one step may run in any order. `release` is called when no step in flight uses the slot.
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
        """A snapshot of the slot's positions `start` to `end`. `end` is its length after all steps submitted so far, or
        a position in Row.save_at of the slot's row in the last one. The values are those that the row computed."""
        ...

    def restore(self, slot: int, chain: Sequence[Snapshot]) -> None:
        """Start the slot's sequence from consecutive snapshots that begin at 0; its length is then the last one's end.
        The values are restored bit for bit."""
        ...

    def pack(self, snapshot: Snapshot) -> bytes:
        """The bytes of a snapshot, for a file. Only a runner with the same model, dtype and limits can read them."""
        ...

    def unpack(self, start: int, end: int, data: bytes) -> Snapshot:
        """The snapshot from its bytes. Raises ValueError if they are not a snapshot of these positions."""
        ...

    def logits(self, ids: Sequence[int], adapter: int | None = None) -> NDArray[np.float32]:
        """Teacher-forced logits [T, V] of one sequence; no slot is touched. adapter: as in Row."""
        ...

    def peak_memory(self) -> int:
        """Peak bytes allocated on the device since loading."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """The functions of a backend's module. `device` None is the best device, `dtype` None the backend's default."""

    NAME: str  # as in BACKENDS

    def prepare(self, device: str | None, reads: Sequence[Read], resident_bytes: int) -> None:
        """Set what the process needs for a model, once it is known and before the other functions are called.

        reads: of one decode step, in order, each that of one launch. resident_bytes: of the whole model with its keys
        and values."""
        ...

    def load(
        self,
        checkpoint: Weights,
        *,
        device: str | None,
        dtype: str | None,
        limits: Limits,
        shard: RankShard | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> Runner:
        """The whole model on the device; or a rank's share of it, where `checkpoint` is that part (weights/split.py)
        and the other ranks load theirs at the same time. Those then have to be called alike, in the same order.

        adapters: those that rows may use, of a rank's part the parts."""
        ...

    def dtype_name(self, device: str | None, dtype: str | None) -> str:
        """The name of the activations' dtype. Raises InvalidRequest for an unknown one."""
        ...

    def prefill_chunk(self, device: str | None) -> int:
        """Maximum tokens of one prefill step; the memory plan may reduce it."""
        ...

    def available_memory(self, device: str | None) -> int:
        """Bytes that a model may use on the device."""
        ...

    def device_name(self, device: str | None) -> str:
        """The name of a GPU, or "cpu" for any CPU."""
        ...

    def custom_kernels(self, device: str | None) -> dict[str, str]:
        """What is known of custom kernels that load() uses only where they agree with the library's own operations: by
        check, "" if it passed on this device, or why it did not. Empty where there are none, or none was checked."""
        ...

    def cpu_products(self, device: str | None, dtype: str | None) -> str:
        """How matrices are multiplied on a CPU: "compiled" for it by llvmlite, by "numpy", or as the "reference" of a
        GPU's kernels, which is slow. "" where the backend's library does it."""
        ...

    def matmul(self, device: str | None) -> MatMul:
        """A function that multiplies numpy arrays on the device, in full float32. It may be called from any thread."""
        ...

    def copy_bandwidth(self, device: str | None) -> float:
        """Bytes per second of a copy in the device's memory, reads and writes counted: the bound of decoding.

        Measured by this call, in well under a second, before a model is loaded; its buffers are freed."""
        ...


AFFINE_KERNELS = {"mlx": AFFINE_BITS, "cuda": (4, 8)}  # the bits per code that a backend's kernels read


def run_as(backend: str, spec: Spec) -> Spec:
    """The storage in which a backend computes with a weight: its own, or the next wider affine codes, which have the
    same values. The one table for `show`, the memory plan and loading."""
    if spec.element != "uint":
        return spec
    return replace(spec, bits=next(bits for bits in AFFINE_KERNELS[backend] if bits >= spec.bits))


def padded_groups(groups: int, itemsize: int) -> int:
    """How many scales a row of the cuda kernels' matrices has room for: as many as its groups, and then up to a whole
    multiple of 16 bytes. itemsize: bytes of a scale."""
    return -(-groups * itemsize // 16) * 16 // itemsize


def snapshot_space(config: ModelConfig, chunk: int, slots: int, activation_bytes: int) -> int:
    """Bytes that the sliding layers keep of prefill chunks until the snapshots inside of them are saved (Row.save_at):
    the keys and values of `chunk` tokens, and each slot's window before its chunk."""
    windows = [window for window in config.windows if window is not None]
    return 2 * config.kv_size * sum(chunk + slots * window for window in windows) * activation_bytes


def working_space(config: ModelConfig, chunk: int, slots: int, activation_bytes: int) -> int:
    """Bytes of the largest set of arrays alive at once in a pass: one layer's MoE or attention, and the logits."""
    active = config.num_experts_per_tok
    experts = chunk * active * (2 * config.hidden_size + 4 * config.intermediate_size)
    attention = chunk * 3 * (config.q_size + 2 * config.kv_size)
    stream = 3 * chunk * config.hidden_size
    logits = 4 * slots * config.vocab_size * 4
    return (stream + max(experts, attention)) * activation_bytes + logits
