"""The memory plan: what a model needs at a given context against what the device has, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..backends.base import working_space
from ..config import ModelConfig
from ..errors import DoesNotFit
from ..machine import mac_memory

PREFERRED_CONTEXT = 8192  # tokens that are worth leaving the embeddings in the file
MIN_CONTEXT = 2048  # a default context is not cut below this; with less room the model is refused
DEFAULT_CHUNK_CONTEXT = 32768  # tokens of default context that are worth more than a larger prefill chunk
MIN_CHUNK = 256  # tokens of one prefill step below which it would be slow for little memory
PREFIX_BYTES = 2 << 30  # of the prefix cache: of 20b in bfloat16, conversations of 55,000 tokens together
SYSTEM_BYTES = 3 << 30  # what macOS is left with when a GPU's limit is raised
RUNTIME_BYTES = 300 << 20  # interpreter, libraries, tokenizer and allocator slack (measured: 210 MB with MLX on a CPU)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a loaded model takes.

    kv_bytes_per_token: of one slot, in the full layers. ring_bytes: of one slot's sliding layers together.
    layer_bytes_per_token: of one slot, in one full layer, as it is computed: what a copy takes while a layer grows, or
        is decoded from 8 bits.
    chunk: tokens of one prefill step, as many as there is room for.
    step_bytes: activations of one prefill chunk, logits, and the runtime itself.
    mapped_bytes: of the weights, what stays in the mapped file because memory is short (Limits.resident_vocab); 0 where
        it is not.
    upcast_bytes: what dense matrices take more in the activations' dtype than as stored (Limits.upcast); 0 where they
        are kept as stored.
    prefix_bytes: what the prefix cache may hold.
    available_bytes: what the device has to give: Metal's recommended working set, or the free memory elsewhere.
    """

    context: int
    slots: int
    chunk: int
    weights_bytes: int
    kv_bytes_per_token: int
    layer_bytes_per_token: int
    ring_bytes: int
    step_bytes: int
    available_bytes: int
    mapped_bytes: int = 0
    upcast_bytes: int = 0
    prefix_bytes: int = 0

    @property
    def working_bytes(self) -> int:
        """What is not weights as stored and cache."""
        return (
            self.prefix_bytes
            + self.upcast_bytes
            + self.step_bytes
            + self.slots * self.context * self.layer_bytes_per_token
        )

    @property
    def needed_bytes(self) -> int:
        cache = self.slots * (self.context * self.kv_bytes_per_token + self.ring_bytes)
        return self.weights_bytes - self.mapped_bytes + cache + self.working_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.available_bytes

    @property
    def largest_context(self) -> int:
        """The longest context that fits, in whole 256 tokens; 0 when none does."""
        resident = self.weights_bytes - self.mapped_bytes + self.upcast_bytes + self.prefix_bytes
        room = self.available_bytes - resident - self.step_bytes - self.slots * self.ring_bytes
        each = self.slots * (self.kv_bytes_per_token + self.layer_bytes_per_token)
        return max(0, room // max(each, 1) // 256 * 256)


def plan_memory(
    config: ModelConfig,
    weights_bytes: int,
    available_bytes: int,
    *,
    activation_bytes: int,
    context: int | None = None,
    slots: int = 1,
    chunk: int = 2048,
    kv_bits: int | None = None,
    mappable_bytes: int = 0,
    upcastable_bytes: int = 0,
    prefix_bytes: int | None = 0,
) -> MemoryPlan:
    """The plan for `context` tokens a slot; None takes the model's longest, or what fits of it
    (but no less than MIN_CONTEXT, at which a model that is too big is refused).

    activation_bytes: 2 or 4, the size of an activation and of a K/V entry. chunk: most tokens of one prefill step;
    it is halved, down to MIN_CHUNK, until the context fits, or DEFAULT_CHUNK_CONTEXT of a default one.
    kv_bits: 8 where the full layers' keys and values are kept in 8 bits, with two float32 to 64 of them.
    mappable_bytes: of the weights, what may stay in the file; it does if a PREFERRED_CONTEXT does not fit otherwise.
    upcastable_bytes: what dense matrices would take more if they were upcast; they are if the plan fits all the same.
    prefix_bytes: for the prefix cache; None gives it half of what is left, PREFIX_BYTES at most.
    """
    entry = 2 * config.kv_size * activation_bytes  # one key and one value, all heads
    kept = entry if kv_bits is None else 2 * config.kv_size * (64 + 8) // 64
    wanted = context or config.max_position_embeddings
    plan = MemoryPlan(
        context=wanted if context else min(wanted, DEFAULT_CHUNK_CONTEXT),
        slots=slots,
        chunk=chunk,
        weights_bytes=weights_bytes,
        kv_bytes_per_token=kept * config.full_layers,
        layer_bytes_per_token=entry if config.full_layers else 0,
        ring_bytes=entry * config.sliding_layers * config.sliding_window,
        step_bytes=RUNTIME_BYTES + working_space(config, chunk, slots, activation_bytes),
        available_bytes=available_bytes,
        prefix_bytes=prefix_bytes or 0,
    )
    steps = [RUNTIME_BYTES + working_space(config, size, slots, activation_bytes) for size in _chunks(chunk)]
    choices = [replace(plan, chunk=size, step_bytes=step) for size, step in zip(_chunks(chunk), steps, strict=True)]
    whole = _first_that_fits(choices, wanted, context is not None)
    if not mappable_bytes or (whole.fits and whole.context >= min(wanted, PREFERRED_CONTEXT)):
        wide = replace(whole, upcast_bytes=upcastable_bytes)
        return _with_prefix(wide if wide.fits else whole, prefix_bytes)
    lean = _first_that_fits(
        [replace(choice, mapped_bytes=mappable_bytes) for choice in choices], wanted, context is not None
    )
    return _with_prefix(lean if lean.fits else whole, prefix_bytes)


def _with_prefix(plan: MemoryPlan, prefix_bytes: int | None) -> MemoryPlan:
    spare = max(0, plan.available_bytes - plan.needed_bytes)
    return plan if prefix_bytes is not None else replace(plan, prefix_bytes=min(spare // 2, PREFIX_BYTES))


def _chunks(most: int) -> list[int]:
    """Sizes of a prefill step to try, halving."""
    return [most, *(_chunks(most // 2) if most > MIN_CHUNK else [])]


def _first_that_fits(choices: Sequence[MemoryPlan], wanted: int, asked: bool) -> MemoryPlan:
    """The first of the plans that fits, or the last, with the wanted context or, if it was not asked for, what fits."""
    plan = replace(next((choice for choice in choices if choice.fits), choices[-1]), context=wanted)
    if asked or plan.fits:
        return plan
    return replace(plan, context=min(wanted, max(plan.largest_context, MIN_CONTEXT)))


def require_fit(plan: MemoryPlan, name: str, smaller_formats: dict[str, int]) -> None:
    """Raise DoesNotFit with the numbers and with what would fit. smaller_formats: name -> weight bytes."""
    if plan.fits:
        return
    advice = (
        [f"raise the GPU's limit until the next restart ({line})"] if (line := wired_limit(plan, mac_memory())) else []
    )
    if plan.largest_context >= MIN_CONTEXT:
        advice.append(f"use --max-context {plan.largest_context}")
    spare = plan.available_bytes - (plan.needed_bytes - plan.weights_bytes)
    fitting = {fmt: size for fmt, size in smaller_formats.items() if size <= spare}
    if fitting:
        best = max(fitting, key=fitting.__getitem__)
        advice.append(f"convert it with --to {best} ({gigabytes(fitting[best])} of weights)")
    if not advice:
        smallest = min([plan.weights_bytes, *smaller_formats.values()])
        advice.append(f"close other programs, or use a machine with more memory (at least {gigabytes(smallest)} free)")
    raise DoesNotFit(
        f"{name} needs {gigabytes(plan.needed_bytes)} (weights {gigabytes(plan.weights_bytes)}, "
        f"KV cache {gigabytes(plan.slots * plan.context * plan.kv_bytes_per_token)} for {plan.context} tokens"
        f"{f' in each of {plan.slots} slots' if plan.slots > 1 else ''}, "
        f"working space {gigabytes(plan.working_bytes + plan.slots * plan.ring_bytes)}) "
        f"and {gigabytes(plan.available_bytes)} are available: {', or '.join(advice)}"
    )


def wired_limit(plan: MemoryPlan, memory: int) -> str | None:
    """The command that makes room for the plan on a Mac of `memory` bytes, or None if it would not help: macOS keeps
    SYSTEM_BYTES, and a CPU has no such limit. It rounds up to whole 256 MB."""
    megabytes = -(-plan.needed_bytes // (256 << 20)) * 256
    if plan.fits or plan.available_bytes >= memory * 7 // 8 or megabytes << 20 > memory - SYSTEM_BYTES:
        return None
    return f"sudo sysctl iogpu.wired_limit_mb={megabytes}"


def gigabytes(size: int) -> str:
    """In decimal units, as model sizes are quoted: 13.8 GB, 850 MB, 3.1 MB."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if size >= u), (1e3, "kB"))
    value = size / unit
    return f"{value:.1f} {name}" if value < 100 else f"{value:.0f} {name}"
