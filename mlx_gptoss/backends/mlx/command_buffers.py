"""How MLX cuts a step into Metal command buffers, and the limits that this process gives it.

MLX commits a command buffer once it has more than MLX_MAX_OPS_PER_BUFFER launches, or once the arrays that they read
and write, each counted once and by its elements, exceed MLX_MAX_MB_PER_BUFFER times 2^20 (mlx/backend/metal/device.cpp,
CommandEncoder::needs_commit; data_size() is a number of elements). A boundary costs about 20 microseconds on an M3
Ultra (ml-explore/mlx#4521). gpt-oss-20b takes some 50 a token by MLX's own limits, because every expert counts.

Larger buffers have two prices, and both bound the limits here:

- The host runs ahead by up to MAX_ACTIVE_TASKS committed buffers (mlx/transforms.cpp). A layer's keys and values are
  written in place only if no buffer that reads them is still running, else the whole cache is copied. With
  MIN_BUFFERS a token, the last token's reader has ended before the next token's write is encoded.
- Temporary arrays live until their buffer has run, so up to IN_FLIGHT buffers of them are in memory at once
  (vllm-project/vllm-metal#585: 36 GB more in a prefill of 8192 tokens with 2000 MB).

MLX reads both variables once, when it first uses the device. So prepare() has to come first, and the first model of a
process decides for all of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ...machine import chip, mac_memory
from ...weights.tensor import Spec
from ..base import Read
from .model import GptOss

OPS, MB = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
MAX_ACTIVE_TASKS = 10  # committed buffers that MLX lets run before the host waits for one
# The buffer that ends a step is not counted as a task, and the borders of two steps differ by up to one buffer.
MIN_BUFFERS = MAX_ACTIVE_TASKS + 3
IN_FLIGHT = MAX_ACTIVE_TASKS + 1
ACTIVATION_BYTES = 2  # on a GPU, by default
WORKING_SET = 2 / 3  # of a Mac's memory, the smallest share that Metal recommends by default
MIN_LAUNCHES_PER_LAYER = 8  # of a decode step; a test counts that there are more
UNMEASURED = 5  # generation of the chips from which larger buffers gained nothing or lost (mlx#4521, mlxcel#358)


@dataclass(frozen=True)
class BufferLimits:
    """ops: launches. mb: 2^20 elements of the distinct arrays that they read and write."""

    ops: int
    mb: int


# By the last letter of Metal's architecture: a phone, a base or Pro chip, a Max, an Ultra.
MLX_LIMITS = {
    "p": BufferLimits(20, 40),
    "g": BufferLimits(40, 40),
    "s": BufferLimits(50, 50),
    "d": BufferLimits(50, 50),
}
OTHER_LIMITS = BufferLimits(40, 40)
LARGER = (BufferLimits(1000, 800), BufferLimits(200, 250), BufferLimits(200, 125))  # the first one that fits is taken


@dataclass(frozen=True)
class Setting:
    """limits: that this process has set; None leaves MLX's own, or the user's. why: one line. elements: that a step of
    the model reads for which it was decided, as count_buffers takes them."""

    limits: BufferLimits | None
    why: str
    elements: tuple[int, ...] = ()


_setting: Setting | None = None  # what the first model decided, since MLX reads the variables once


def prepare(reads: Sequence[Read], resident_bytes: int) -> Setting:
    """Set the limits for a model on this Mac's GPU, before anything asks the device. Later calls change nothing.

    reads: of one decode step, in order, each that of one launch. resident_bytes: of the whole model with its keys and
    values. The variables are back as they were when this returns, so that other programs that this one starts have
    MLX's limits."""
    global _setting
    if _setting is None:
        chosen = choose(chip(), mac_memory(), reads, resident_bytes, os.environ)
        _setting = replace(chosen, elements=tuple(stored_elements(*read) for read in reads))
        if _setting.limits is not None:
            apply(_setting.limits, os.environ, lambda: mx.device_info(mx.Device(mx.gpu)))
    return _setting


def current_setting() -> Setting:
    """What prepare() decided; before it, that nothing is set."""
    return _setting or Setting(None, "no model has been planned yet")


def apply(limits: BufferLimits, environ: MutableMapping[str, str], use_device: Callable[[], object]) -> None:
    """Use the device for the first time with the variables set, and restore them."""
    kept = {name: environ.get(name) for name in (OPS, MB)}
    environ[OPS], environ[MB] = str(limits.ops), str(limits.mb)
    try:
        use_device()
    finally:
        for name, value in kept.items():
            if value is None:
                del environ[name]
            else:
                environ[name] = value


def choose(
    chip_name: str, memory: int, reads: Sequence[Read], resident_bytes: int, environ: Mapping[str, str]
) -> Setting:
    """The largest limits that leave MIN_BUFFERS a token and enough memory for the model and their temporary arrays.

    chip_name: as machine.chip() has it. memory: bytes of the Mac. reads, resident_bytes: as of prepare(). environ: the
    process's variables."""
    if given := [f"{name}={environ[name]}" for name in (OPS, MB) if name in environ]:
        return Setting(None, f"{' and '.join(given)} in the environment")
    generation = chip_generation(chip_name)
    if generation is None:
        return Setting(None, "MLX's own: this is no Apple chip of a known generation")
    if generation >= UNMEASURED:
        return Setting(None, f"MLX's own: larger ones are not measured to be faster on an M{generation}")
    elements = [stored_elements(*read) for read in reads]
    own = count_buffers(elements, 0, MLX_LIMITS["d"])
    counts = [(count_buffers(elements, 0, limits), limits) for limits in LARGER]
    useful = [limits for count, limits in counts if MIN_BUFFERS <= count < own]
    if not useful:
        return Setting(None, f"MLX's own: larger ones would leave fewer than {MIN_BUFFERS} buffers a token, or as many")
    spare = int(memory * WORKING_SET) - resident_bytes
    fitting = [limits for limits in useful if in_flight_bytes(limits) <= spare]
    if not fitting:
        more = f"{in_flight_bytes(useful[-1]) / 1e9:.1f} GB more"
        return Setting(None, f"MLX's own: with larger ones, a prompt could need {more} for temporary arrays")
    count = count_buffers(elements, 0, fitting[0])
    return Setting(fitting[0], f"for an M{generation}: at least {count} buffers a token, by MLX's own {own}")


def describe(setting: Setting, in_force: BufferLimits) -> dict[str, Any]:
    """For selftest: the limits, who set them and why, and the least number of buffers a token of the model that was
    planned; enough: whether that is MIN_BUFFERS."""
    least = count_buffers(setting.elements, 0, in_force)
    who = "mlx-gptoss" if setting.limits else "mlx or the environment"
    found = {"ops": in_force.ops, "mb": in_force.mb, "set_by": who, "why": setting.why}
    return found | {"least_a_token": least, "enough": least >= MIN_BUFFERS}


def limits_in_force(architecture: str, environ: Mapping[str, str] | None = None) -> BufferLimits:
    """The limits that MLX has: the process's, the environment's, or its own for Metal's name of this architecture, such
    as "applegpu_g16s"."""
    if (ours := current_setting().limits) is not None:
        return ours
    own, environ = MLX_LIMITS.get(architecture[-1:], OTHER_LIMITS), os.environ if environ is None else environ
    return BufferLimits(_number(environ.get(OPS), own.ops), _number(environ.get(MB), own.mb))


def describe_limits(reads: Sequence[Read]) -> tuple[BufferLimits, BufferLimits | None]:
    """MLX's own limits, and those that this process has in their place, for a report: on a Mac's GPU as they are, and
    elsewhere of a Max with memory to spare. None where they are not others."""
    if mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu):
        architecture = str(mx.device_info(mx.Device(mx.gpu))["architecture"])
        own, other = MLX_LIMITS.get(architecture[-1:], OTHER_LIMITS), limits_in_force(architecture)
        return own, None if own == other else other
    return MLX_LIMITS["s"], choose("Apple M4 Max", 1 << 40, reads, 0, {}).limits


def count_buffers(elements: Sequence[int], launches: int, limits: BufferLimits) -> int:
    """Command buffers of one step. elements: of the arrays that it reads, each by a launch of its own, in order.
    launches: of the step; those that read none of these arrays are spread evenly among the others. With 0 of them, and
    without activations, it is the least number that a step with more launches can have."""
    others, total = max(0, launches - len(elements)), len(elements)
    buffers, ops, size = 1, 0, 0  # what remains at the end is a buffer, too
    for place, read in enumerate(elements):
        for counted in (read, *[0] * (others * (place + 1) // total - others * place // total)):
            ops, size = ops + 1, size + counted
            if ops > limits.ops or size >> 20 > limits.mb:
                buffers, ops, size = buffers + 1, 0, 0
    return buffers


def loaded_elements(model: GptOss) -> list[int]:
    """As count_buffers takes them, of a loaded model; without its keys and values, which grow."""
    layers = [
        layer
        for block in model.blocks
        for layer in (block.attention.qkv, block.attention.out, block.mlp.router, block.mlp.gate_up, block.mlp.down)
    ]
    matrices = [matrix for layer in (*layers, model.lm_head) for matrix in layer.matrices]
    return [sum(array.size for array in vars(m).values() if isinstance(array, mx.array)) for m in matrices]


def must_take_turns(elements: Sequence[int], limits: BufferLimits) -> bool:
    """Whether a step may only be submitted when the one before it has ended, or keys and values would be copied: these
    limits leave fewer than MIN_BUFFERS, and MLX's own would not. (A small model has few in any case, and a small
    cache.)"""
    least, own = (count_buffers(elements, 0, each) for each in (limits, MLX_LIMITS["d"]))
    return least < MIN_BUFFERS <= own


def layers_for(limits: BufferLimits, buffers: int = MIN_BUFFERS) -> int:
    """Layers of a model, however small, whose decode step has so many buffers by its launches alone."""
    return -(-buffers * (limits.ops + 1) // MIN_LAUNCHES_PER_LAYER)


def stored_elements(size: int, spec: Spec | None) -> int:
    """Elements of the MLX arrays of `size` values: codes in uint32, a scale for each group, and a bias where the scale
    is a float."""
    if spec is None:
        return size
    codes = size * spec.bits // 32
    if spec.scale == "none":  # a unit scale for each 32 values (load.py)
        return codes + size // 32
    return codes + (2 if spec.scale == "float" else 1) * (size // spec.group)


def in_flight_bytes(limits: BufferLimits) -> int:
    """An upper bound of the temporary arrays in memory at once: as if a buffer touched nothing else."""
    return IN_FLIGHT * (limits.mb << 20) * ACTIVATION_BYTES


def chip_generation(name: str) -> int | None:
    """4 for "Apple M4 Max", also for a virtual one; None for a name that is not known."""
    found = re.match(r"Apple M(\d+)\b", name)
    return int(found[1]) if found else None


def _number(text: str | None, otherwise: int) -> int:
    """As MLX's atoi: leading digits, else 0; `otherwise` where the variable is not set."""
    if text is None:
        return otherwise
    found = re.match(r"\s*([+-]?\d+)", text)
    return int(found[1]) if found else 0
