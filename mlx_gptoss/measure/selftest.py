"""Whether this machine computes correctly: every kernel against float32 on the CPU (selftest_kernels.py), whole steps
of a model (selftest_model.py), and a few speeds. facts.py says what the machine is and what to change about it.

A check yields an outcome for each of its cases. Here they are run, timed and judged.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends import find_backend
from ..backends.base import Backend
from ..config import GPT_OSS_20B, ModelConfig
from ..errors import GptOssError, InvalidRequest
from ..loading.step_reads import resident_bytes, step_reads
from ..sampling import Sampling
from ..weights.synthetic import Synthetic
from ..weights.tensor import Spec, Weight

Floats = NDArray[np.float32]
# The largest error relative to the RMS of the exact result. Narrow types: 16 roundings, 2^-8 and 2^-11 each, since
# kernels round a few times, and the largest of many values is four to five times their RMS. float32: sums of 2880 terms
# in another order differ by about 1e-6; a reduced precision such as TF32 (1e-3) fails.
LIMITS = {"float32": 1e-4, "bfloat16": 16 * 2.0**-8, "float16": 16 * 2.0**-11}
REPORT = "report it with the output of `mlx-gptoss selftest --json`"


class Kernels(Protocol):
    """A backend's kernels on one device (backends/*/selftest.py), with numpy arrays in and out."""

    config: ModelConfig
    dtype: str
    on_gpu: bool
    specs: tuple[Spec | None, ...]
    ways: dict[str, int | None]
    masks: tuple[str, ...]
    counts_memory: bool
    has_custom_kernels: bool

    def facts(self) -> dict[str, Any]: ...
    def linear(self, weight: Weight) -> Callable[[Floats], Floats]: ...
    def experts(
        self, gate: Weight, up: Weight, down: Weight, bias: Floats
    ) -> Callable[[Floats, Floats, str], Floats]: ...
    def rows(self, weight: Weight, ids: Sequence[int]) -> Floats: ...
    def norm(self, x: Floats, weight: Floats) -> Floats: ...
    def rotate(self, x: Floats, start: int) -> Floats: ...
    def attention(
        self,
        starts: Sequence[int],
        past_keys: Floats,
        past_values: Floats,
        qkv: Floats,
        sinks: Floats,
        window: int | None,
        kv_bits: int | None,
    ) -> Floats: ...
    def fused_attention(
        self, q: Floats, keys: Floats, values: Floats, sinks: Floats, scale: float, mask: str
    ) -> Floats: ...
    def layers_in_flight(self) -> int: ...
    def sample(
        self,
        logits: Floats,
        samplings: Sequence[Sampling],
        prompts: Sequence[Sequence[int]],
        positions: Sequence[int],
        masks: Sequence[bytes | None] = (),
    ) -> tuple[list[int], list[float]]: ...
    def custom_kernels(self) -> Iterator[tuple[str, float, float]]: ...
    def launch_seconds(self, count: int) -> float: ...
    def reset_peak_memory(self) -> int: ...
    def peak_memory(self) -> int: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Compared:
    """A case that passes if error <= limit."""

    case: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # false for NaN


@dataclass(frozen=True)
class Measured:
    """A figure without a judgement."""

    what: str
    value: float
    unit: str


@dataclass(frozen=True)
class Skipped:
    """A case that cannot run here, or not in reasonable time."""

    case: str
    reason: str


Outcome = Compared | Measured | Skipped


@dataclass(frozen=True)
class Check:
    """name: unique. advice: what to do if it fails."""

    name: str
    run: Callable[[], Iterator[Outcome]]
    advice: str = REPORT


@dataclass(frozen=True)
class Result:
    """What came of a check. problem: the error that ended it, or None."""

    name: str
    seconds: float
    compared: tuple[Compared, ...] = ()
    measured: tuple[Measured, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    problem: str | None = None
    advice: str = REPORT

    @property
    def ran(self) -> bool:
        """Whether anything was compared or measured, or failed."""
        return bool(self.compared or self.measured or self.problem)

    @property
    def ok(self) -> bool:
        return self.problem is None and all(case.ok for case in self.compared)

    @property
    def worst(self) -> Compared | None:
        """The case that is nearest to its limit, or furthest above it."""
        return max(self.compared, key=_severity, default=None)


def _severity(case: Compared) -> float:
    if case.ok:
        return case.error / case.limit if case.limit else 0.0
    return case.error / case.limit if case.limit and case.error == case.error else math.inf


@dataclass(frozen=True)
class Machine:
    """Where the checks run: a backend's module, its kernels, and the device and data type as the user gave them."""

    module: Backend
    backend: str
    kernels: Kernels
    device: str | None
    dtype: str | None


@dataclass(frozen=True)
class Plan:
    """The checks of one machine, in order. Close it."""

    machine: Machine
    checks: tuple[Check, ...] = field(default=())

    def run(self) -> Iterator[Result]:
        """Each check's result as soon as there is one."""
        for check in self.checks:
            yield run(check)

    def close(self) -> None:
        self.machine.kernels.close()


def plan(backend: str, device: str | None, dtype: str | None, only: Sequence[str] = ()) -> Plan:
    """The checks for a backend and a device, those whose names match one of the patterns `only`, or all.

    Raises BackendUnavailable and InvalidRequest as load() does, and InvalidRequest if no check matches.
    """
    from . import selftest_kernels, selftest_model

    module, name = find_backend(backend)
    _prepare(module, name, device, dtype)
    code = import_module(f".{name}.selftest", "mlx_gptoss.backends")
    kernels: Kernels = code.Kernels(GPT_OSS_20B, device, dtype)
    machine = Machine(module, name, kernels, device, dtype)
    checks = [*selftest_kernels.checks(machine), *selftest_model.checks(machine)]
    chosen = tuple(check for check in checks if not only or any(_matches(check.name, pattern) for pattern in only))
    if not chosen:
        kernels.close()
        raise InvalidRequest(f"no check is named like {' or '.join(only)}; --list shows their names")
    return Plan(machine, chosen)


def _prepare(module: Backend, backend: str, device: str | None, dtype: str | None) -> None:
    """What load() would set for gpt-oss-20b as published. And float32 is float32 on an M5, which MLX multiplies in TF32
    by default; it reads this variable at its first product."""
    if dtype == "float32":
        os.environ.setdefault("MLX_ENABLE_TF32", "0")
    published = Synthetic(GPT_OSS_20B, "mxfp4")
    module.prepare(device, step_reads(published, backend), resident_bytes(published, None, 1))


def _matches(name: str, pattern: str) -> bool:
    """Whether the pattern, with * and ?, matches the name or a part of it."""
    return fnmatchcase(name.lower(), f"*{pattern.lower()}*")


def run(check: Check) -> Result:
    """Run one check. Whatever it raises is a failure, since a device that computes wrongly may raise anything."""
    found: list[Outcome] = []
    problem = None
    started = time.perf_counter()
    try:
        found.extend(check.run())
    except GptOssError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".strip()
    seconds = time.perf_counter() - started
    gc.collect()  # a check's weights are gone before the next one's arrive
    return Result(
        check.name,
        seconds,
        tuple(outcome for outcome in found if isinstance(outcome, Compared)),
        tuple(outcome for outcome in found if isinstance(outcome, Measured)),
        tuple(outcome for outcome in found if isinstance(outcome, Skipped)),
        problem,
        check.advice,
    )


def relative_error(found: Floats, wanted: Floats, size: Floats | None = None) -> float:
    """The largest error, divided by the RMS of `size` (default: of `wanted`); infinite if any value is not a number.

    Raises ValueError for another shape."""
    if found.shape != wanted.shape:
        raise ValueError(f"the result has the shape {found.shape}, not {wanted.shape}")
    if not np.isfinite(found).all():
        return math.inf
    scale = np.sqrt(np.mean(np.square(wanted if size is None else size, dtype=np.float64)))
    return float(np.abs(found - wanted).max() / scale)


def rounded(values: NDArray[Any], dtype: str) -> Floats:
    """float32 values that `dtype` holds exactly, so that both sides compute with the same input."""
    import ml_dtypes

    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return np.asarray(values).astype(narrow).astype(np.float32)
