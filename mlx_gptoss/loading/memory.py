"""The memory plan: the bytes that a model needs at a given context, compared with the device's, before loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..backends.base import snapshot_space, working_space
from ..config import ModelConfig
from ..errors import DoesNotFit
from ..machine import mac_memory

PREFERRED_CONTEXT = 8192  # tokens; if fewer would fit, the embeddings stay in the mapped file
MIN_CONTEXT = 2048  # tokens; a default context is not reduced below this, the model is refused instead
DEFAULT_CHUNK_CONTEXT = 32768  # tokens; if fewer would fit by default, the prefill chunk is reduced
MIN_CHUNK = 256  # tokens of one prefill step; a smaller one would be slow and save little memory
PREFIX_BYTES = 2 << 30  # maximum default size of the prefix cache: 55,000 tokens of 20b in bfloat16
SYSTEM_BYTES = 3 << 30  # memory left to macOS when the GPU's limit is raised
RUNTIME_BYTES = 300 << 20  # interpreter, libraries, tokenizer and allocator slack (measured: 210 MB with MLX on a CPU)


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a loaded model needs, in bytes.

    kv_bytes_per_token: of one slot, in all full-attention layers.
    layer_bytes_per_token: of one slot, in one full-attention layer, in the activations' dtype: the temporary copy while
        a layer's cache grows or is decoded from 8 bits.
    ring_bytes: of one slot, in all sliding-window layers.
    chunk: tokens of one prefill step, the largest size that fits.
    step_bytes: activations of one prefill chunk, what the prefix cache's snapshots inside of it need, logits, and the
        runtime itself.
    mapped_bytes: weights that stay in the mapped file because memory is short (Limits.resident_vocab), else 0.
    upcast_bytes: additional bytes of dense matrices upcast to the activations' dtype (Limits.upcast), else 0.
    prefix_bytes: maximum size of the prefix cache.
    adapter_bytes: factors of the LoRA adapters.
    available_bytes: Metal's recommended working set, or the free memory on other devices.
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
    adapter_bytes: int = 0

    @property
    def working_bytes(self) -> int:
        """Everything except the weights as stored and the slots' caches."""
        return (
            self.prefix_bytes
            + self.adapter_bytes
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
        """The longest context that fits, a multiple of 256 tokens; 0 if none fits."""
        resident = self.weights_bytes - self.mapped_bytes + self.upcast_bytes + self.prefix_bytes + self.adapter_bytes
        spare = self.available_bytes - resident - self.step_bytes - self.slots * self.ring_bytes
        bytes_per_token = self.slots * (self.kv_bytes_per_token + self.layer_bytes_per_token)
        return max(0, spare // max(bytes_per_token, 1) // 256 * 256)


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
    drafts: int = 0,
    mappable_bytes: int = 0,
    upcastable_bytes: int = 0,
    prefix_bytes: int | None = 0,
    adapter_bytes: int = 0,
) -> MemoryPlan:
    """The memory plan for `context` tokens per slot.

    context: None is the model's maximum, reduced until it fits, but not below MIN_CONTEXT.
    activation_bytes: 2 or 4, the size of an activation and of a K/V entry.
    chunk: maximum tokens of one prefill step. It is halved, down to MIN_CHUNK, until `context` fits; for a default
        context, until DEFAULT_CHUNK_CONTEXT fits.
    kv_bits: 8 stores keys and values of the full-attention layers in 8 bits, with two float32 per 64 values.
    drafts: maximum per row of a step, which has logits for each, and as many positions more in each ring.
    mappable_bytes: weights that may stay in the mapped file. They do if PREFERRED_CONTEXT does not fit otherwise.
    upcastable_bytes: additional bytes if dense matrices are upcast. They are if the plan still fits.
    adapter_bytes: size of the LoRA adapters' factors.
    prefix_bytes: size of the prefix cache; None gives it half of the spare memory, PREFIX_BYTES at most.
    """
    entry = 2 * config.kv_size * activation_bytes  # one key and one value, all heads
    stored = entry if kv_bits is None else 2 * config.kv_size * (64 + 8) // 64
    wanted = context or config.max_position_embeddings
    steps = [
        RUNTIME_BYTES
        + working_space(config, size, slots * (1 + drafts), activation_bytes)
        + (snapshot_space(config, size, slots, activation_bytes) if prefix_bytes else 0)
        for size in _chunks(chunk)
    ]
    plan = MemoryPlan(
        context=wanted if context else min(wanted, DEFAULT_CHUNK_CONTEXT),
        slots=slots,
        chunk=chunk,
        weights_bytes=weights_bytes,
        kv_bytes_per_token=stored * config.full_layers,
        layer_bytes_per_token=entry if config.full_layers else 0,
        ring_bytes=entry * sum(window + drafts for window in config.windows if window is not None),
        step_bytes=steps[0],
        available_bytes=available_bytes,
        prefix_bytes=prefix_bytes or 0,
        adapter_bytes=adapter_bytes,
    )
    choices = [replace(plan, chunk=size, step_bytes=step) for size, step in zip(_chunks(chunk), steps, strict=True)]
    resident = _first_that_fits(choices, wanted, context is not None)
    if not mappable_bytes or (resident.fits and resident.context >= min(wanted, PREFERRED_CONTEXT)):
        upcast = replace(resident, upcast_bytes=upcastable_bytes)
        chosen = upcast if upcast.fits else resident
    else:
        mapped = _first_that_fits(
            [replace(choice, mapped_bytes=mappable_bytes) for choice in choices], wanted, context is not None
        )
        chosen = mapped if mapped.fits else resident
    if prefix_bytes is not None:
        return chosen
    return _with_prefix(chosen, snapshot_space(config, chosen.chunk, slots, activation_bytes))


def weights_that_fit(config: ModelConfig, available_bytes: int, context: int) -> int:
    """The most bytes of weights with which one sequence of `context` tokens fits on a GPU, in bfloat16 and with full
    prefill steps, and none of them in the mapped file. Negative if the rest alone does not fit."""
    return available_bytes - plan_memory(config, 0, available_bytes, activation_bytes=2, context=context).needed_bytes


def _with_prefix(plan: MemoryPlan, snapshot_bytes: int) -> MemoryPlan:
    """The plan with half of the spare memory as the prefix cache, PREFIX_BYTES at most. snapshot_bytes: what a chunk
    then needs in addition; without room for it there is no prefix cache."""
    spare = plan.available_bytes - plan.needed_bytes - snapshot_bytes
    if spare < 2:
        return plan
    return replace(plan, prefix_bytes=min(spare // 2, PREFIX_BYTES), step_bytes=plan.step_bytes + snapshot_bytes)


def _chunks(largest: int) -> list[int]:
    """The sizes of a prefill step to try: `largest`, then half of the one before, down to MIN_CHUNK."""
    return [largest, *(_chunks(largest // 2) if largest > MIN_CHUNK else [])]


def _first_that_fits(choices: Sequence[MemoryPlan], wanted: int, explicit: bool) -> MemoryPlan:
    """The first plan that fits, or else the last, with `wanted` tokens of context. If the user did not give the context
    explicitly, it is reduced until it fits."""
    plan = replace(next((choice for choice in choices if choice.fits), choices[-1]), context=wanted)
    if explicit or plan.fits:
        return plan
    return replace(plan, context=min(wanted, max(plan.largest_context, MIN_CONTEXT)))


def require_fit(plan: MemoryPlan, name: str, smaller_formats: dict[str, int]) -> None:
    """Raise DoesNotFit, with the numbers and what would fit, unless the plan fits. smaller_formats: name -> bytes of
    weights."""
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
    """The command that raises the GPU's memory limit so that the plan fits on a Mac with `memory` bytes, rounded up to
    256 MB. None if it would not help, because macOS needs SYSTEM_BYTES, or because a CPU has no such limit."""
    megabytes = -(-plan.needed_bytes // (256 << 20)) * 256
    if plan.fits or plan.available_bytes >= memory * 7 // 8 or megabytes << 20 > memory - SYSTEM_BYTES:
        return None
    return f"sudo sysctl iogpu.wired_limit_mb={megabytes}"


def gigabytes(size: int) -> str:
    """In decimal units, as model sizes are quoted: 13.8 GB, 850 MB, 3.1 MB."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if size >= u), (1e3, "kB"))
    value = size / unit
    return f"{value:.1f} {name}" if value < 100 else f"{value:.0f} {name}"
