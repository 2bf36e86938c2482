"""Products with matrices in numpy arrays, as they are stored, on the threads of a pool.

With llvmlite, kernels.py multiplies by the codes. Without it, numpy multiplies by dense float32 matrices, and by others
once they are decoded.

Legend: E experts, N outputs, D inputs, P rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ....machine import cores
from ....weights import codecs
from ....weights.tensor import Array, Dense, Quantized, Weight
from .pool import Pool
from .storages import UNIT, Heads, Storage, by_words

if TYPE_CHECKING:
    from .compiled import Compiled

Floats = NDArray[np.float32]
Integers = NDArray[Any]
PIECE_ROWS, PIECE_ROWS_MANY = 64, 32  # rows of a piece, for one token and for several
MIN_WORK_TO_SHARE = 1 << 18  # multiply-adds from which waking another thread is worth it
COPY_BYTES = 1 << 20  # of a matrix that a thread copies at a time
HEADER, FIELDS = 10, 7  # int64 in a kernel's table: of a call, and of each of its jobs
MAX_DECODED = 1 << 20  # weights that numpy decodes at once, 4 MB
SCALES = {np.dtype(np.float32): "float32", np.dtype(np.float16): "float16", codecs.BFLOAT16: "bfloat16"}


def compiles() -> bool:
    """Whether kernels can be compiled here."""
    return find_spec("llvmlite") is not None


@dataclass
class Stored:
    """A matrix [N, D], or those of all experts, [E, N, D], with contiguous rows. What a product needs to know of it is
    computed once. kernel: what multiplies by it, once it is compiled."""

    weight: Weight
    kernel: Compiled | None = None
    tables: dict[tuple[int, int], _Table] = field(default_factory=dict)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @cached_property
    def storage(self) -> Storage | None:
        """As the kernels name it; None if they do not read it."""
        weight = self.weight
        if weight.shape[-1] % UNIT:
            return None
        if isinstance(weight, Dense):
            kind: Any = SCALES.get(weight.values.dtype)
            return None if kind is None else Storage("float", 8 * weight.values.itemsize, 0, kind)
        spec = weight.spec
        if spec.scale != "float":
            return Storage(spec.element, spec.bits, spec.group, spec.scale)
        if spec.element != "uint" or weight.scale is None or weight.bias is None:
            return None
        kind = SCALES.get(weight.scale.dtype)
        return None if kind is None else Storage(spec.element, spec.bits, spec.group, kind)

    @cached_property
    def codes(self) -> Integers:
        return self.weight.values if isinstance(self.weight, Dense) else self.weight.codes

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Address and bytes to the next expert, of codes, scales and biases; 0 for what there is not."""
        weight = self.weight
        arrays = [weight.values, None, None] if isinstance(weight, Dense) else [weight.codes, weight.scale, weight.bias]
        return [(0, 0) if a is None else (address(a), a.strides[0] if a.ndim == 3 else 0) for a in arrays]

    @cached_property
    def strides(self) -> tuple[int, int]:
        """Bytes from row to row, of codes and scales."""
        scale = None if isinstance(self.weight, Dense) else self.weight.scale
        return self.codes.strides[-2], 0 if scale is None else scale.strides[-2]

    @cached_property
    def factors(self) -> Floats | None:
        """`outer` of a quantized matrix, [N or 1], or of all experts, [E, N or 1]; None is 1."""
        if isinstance(self.weight, Dense) or self.weight.outer is None:
            return None
        outer = self.weight.outer.astype(np.float32)
        rows = outer.shape[-2] if outer.ndim > 1 else 1
        return np.broadcast_to(outer, (*self.shape[:-2], rows, 1))[..., 0]

    def finish(self, y: Floats, experts: Integers | None) -> Floats:
        """y [P, N] times the factors, in place. experts [P]: of each row."""
        if self.factors is not None:
            y *= self.factors if experts is None else self.factors[experts]
        return y

    def expert(self, number: int) -> Weight:
        return self.weight[number]


class _Table:
    """What a kernel reads of `jobs` products of one token, each with an expert or with the one matrix: made once, as
    decoding a token is many short calls. x [rows, D]: one row for each job, or one for all; in the kernel's order.
    sums: of x by group."""

    def __init__(self, matrix: Stored, kernel: Compiled, jobs: int, rows: int) -> None:
        assert matrix.storage is not None
        N, D = matrix.shape[-2:]
        self._storage, self._kernel = matrix.storage, kernel
        self._x = np.empty((rows, D), np.float32)
        self._sums = np.zeros((rows, D // (matrix.storage.group or D)), np.float32)
        values = np.zeros(HEADER + jobs * FIELDS + 1, np.int64)
        self.counter = values[-1:]
        counter = address(self.counter)
        values[:HEADER] = (counter, jobs, -(-N // PIECE_ROWS), PIECE_ROWS, N, D, *matrix.strides, 4 * D, 4 * N)
        self._jobs = values[HEADER:-1].reshape(jobs, FIELDS)
        self._bases, self._steps = np.array(matrix.places, np.int64).T
        self._jobs[:, :3] = self._bases
        row = np.arange(jobs) if rows > 1 else np.zeros(jobs, np.int64)
        self._jobs[:, 3] = address(self._x) + row * self._x.strides[0]
        self._jobs[:, 4] = address(self._sums) + row * self._sums.strides[0]
        self._jobs[:, 6] = 1
        self._outputs = np.arange(jobs) * 4 * N
        self.address, self.multiply_adds = address(values), jobs * N * D

    def fill(self, x: Floats, y: Floats, experts: Integers | None) -> None:
        """x [rows, D], y [jobs, N], experts [jobs]"""
        _order(x, self._x, self._storage, self._kernel)
        if self._storage.element == "uint":
            np.add.reduce(x.reshape(*self._sums.shape, -1), axis=-1, out=self._sums)
        if experts is not None:
            places = self._jobs[:, :3]
            np.multiply(experts[:, None], self._steps, out=places)
            places += self._bases
        self._jobs[:, 5] = self._outputs
        self._jobs[:, 5] += address(y)
        self.counter[0] = 0


class Products:
    """Computes products on all cores. compiled: with kernels, which llvmlite compiles."""

    def __init__(self, *, compiled: bool | None = None) -> None:
        self.pool = Pool(cores())
        self.compiled = compiles() if compiled is None else compiled
        self.held_bytes = 0  # of the matrices that were copied
        self._counter = np.zeros(1, np.int64)
        self._counter_address = address(self._counter)
        if self.compiled:
            from .emit import Target
            from .kernels import BLOCK, SCRATCH_ROWS

            self._target = Target.here()
            self._compiler = ThreadPoolExecutor(1, "mlx-gptoss-compiler")
            self._kernels: dict[Storage | Heads, Future[Compiled]] = {}
            self._scratch = [np.empty(SCRATCH_ROWS * BLOCK, np.float32) for _ in range(self.pool.threads)]
            self._scratch_addresses = [address(array) for array in self._scratch]

    def close(self) -> None:
        self.pool.close()
        if self.compiled:
            self._compiler.shutdown()

    def prepare(self, matrix: Stored) -> None:
        """Compile what multiplies by the matrix, while other weights are read."""
        if self.reads(matrix):
            self._kernel(matrix.storage)

    def _kernel(self, kind: Storage | Heads | None) -> Future[Compiled]:
        from .compiled import kernel

        assert kind is not None
        if kind not in self._kernels:
            self._kernels[kind] = self._compiler.submit(kernel, kind, self._target)
        return self._kernels[kind]

    def prepare_attention(self, heads: Heads) -> bool:
        """As prepare, for `attend`. Whether there is a kernel for such heads."""
        found = self.compiled and heads.compiles(self._target.lanes)
        if found:
            self._kernel(heads)
        return found

    def attend(self, heads: Heads, table: list[int], multiply_adds: int) -> None:
        """Run attention_kernel.py. table: but for its first field, the counter."""
        self._counter[0], table[0] = 0, self._counter_address
        values = np.array(table, np.int64)
        self._share(self._kernel(heads).result(), address(values), multiply_adds)

    def copied(self, weights: Sequence[Weight], *, upcast: bool = False) -> Weight:
        """One weight with the rows of all, which are stored alike, in memory of its own, copied by all threads. upcast:
        a dense one becomes float32."""
        first = weights[0]
        if isinstance(first, Dense):
            dense = [weight.values for weight in weights if isinstance(weight, Dense)]
            return Dense(self._joined(dense, np.dtype(np.float32) if upcast else first.values.dtype))
        parts = [weight for weight in weights if isinstance(weight, Quantized)]
        codes = [part.codes for part in parts]
        outer = _factors(parts)
        scales = [part.scale for part in parts if part.scale is not None]
        biases = [part.bias for part in parts if part.bias is not None]
        all_, scale, bias = (self._joined(a, a[0].dtype) if a else None for a in (codes, scales, biases))
        assert all_ is not None
        return Quantized(first.spec, all_, scale, bias, outer)

    def _joined(self, arrays: Sequence[Array], dtype: np.dtype[Any]) -> Array:
        """Matrices [..., N, D], concatenated along N."""
        rows = [array.shape[-2] for array in arrays]
        out = np.empty((*arrays[0].shape[:-2], sum(rows), arrays[0].shape[-1]), dtype)
        self.held_bytes += out.nbytes
        pieces = []
        for array, end in zip(arrays, accumulate(rows), strict=True):
            target = out[..., end - array.shape[-2] : end, :]
            for lead in np.ndindex(array.shape[:-2]):
                step = max(1, COPY_BYTES // (array.shape[-1] * array.itemsize))
                for at in range(0, array.shape[-2], step):
                    pieces.append(partial(_copy, array[lead][at : at + step], target[lead][at : at + step]))
        self.pool.each(pieces)
        return out

    def reads(self, matrix: Stored) -> bool:
        """Whether a kernel multiplies by the matrix as it is."""
        return self.compiled and matrix.storage is not None

    def multiply(self, matrix: Stored, x: Floats) -> Floats:
        """x [P, D] times a matrix [N, D] -> [P, N]"""
        if self.reads(matrix):
            if len(x) == 1:
                return self._run_table(matrix, x, None)
            y = np.empty((len(x), matrix.shape[-2]), np.float32)
            self._run(matrix, x, y, [(0, 0, len(x))])
            return matrix.finish(y, None)
        return self._multiply_decoded([(matrix.weight, 0, len(x))], x, matrix.shape[-2])

    def gather(self, matrix: Stored, x: Floats, experts: Integers) -> Floats:
        """Each row of x [P, D] times the matrix of its expert, of [E, N, D] -> [P, N]. experts [P], ascending."""
        starts = [0, *(np.flatnonzero(experts[1:] != experts[:-1]) + 1).tolist()]
        jobs = list(zip(experts[starts].tolist(), starts, [*starts[1:], len(x)], strict=True))
        if self.reads(matrix):
            y = np.empty((len(x), matrix.shape[-2]), np.float32)
            self._run(matrix, x, y, jobs)
            return matrix.finish(y, experts)
        return self._multiply_decoded([(matrix.expert(e), i, j) for e, i, j in jobs], x, matrix.shape[-2])

    def gather_token(self, matrix: Stored, x: Floats, experts: Integers) -> Floats:
        """As gather, for the experts of one token in any order, each with its row of x [P, D], or all with one."""
        if self.reads(matrix):
            return self._run_table(matrix, x, experts)
        order = np.argsort(experts)
        y = np.empty((len(experts), matrix.shape[-2]), np.float32)
        y[order] = self.gather(matrix, np.broadcast_to(x, (len(experts), x.shape[-1]))[order], experts[order])
        return y

    def _run_table(self, matrix: Stored, x: Floats, experts: Integers | None) -> Floats:
        key = (1 if experts is None else len(experts), len(x))
        kernel = self._kernel_of(matrix)
        table = matrix.tables.get(key)
        if table is None:
            table = matrix.tables[key] = _Table(matrix, kernel, *key)
        y = np.empty((key[0], matrix.shape[-2]), np.float32)
        table.fill(x, y, experts)
        self._share(kernel, table.address, table.multiply_adds)
        return matrix.finish(y, experts)

    def _run(self, matrix: Stored, x: Floats, y: Floats, jobs: list[tuple[int, int, int]]) -> None:
        """jobs: expert, and the first and the end of its rows of x and y."""
        storage, kernel = matrix.storage, self._kernel_of(matrix)
        assert storage is not None
        N, D = matrix.shape[-2:]
        sums = x.reshape(len(x), -1, storage.group).sum(axis=-1) if storage.element == "uint" else None
        x = _ordered(x, storage, kernel)
        rows = PIECE_ROWS if len(x) == len(jobs) else PIECE_ROWS_MANY
        table = [self._counter_address, len(jobs), -(-N // rows), rows, N, D, *matrix.strides, 4 * D, 4 * N]
        x_at, y_at = address(x), address(y)
        sums_at, sums_row = (0, 0) if sums is None else (address(sums), sums.strides[0])
        for expert, first, end in jobs:
            for base, step in matrix.places:
                table.append(base + expert * step)
            table += (x_at + first * 4 * D, sums_at + first * sums_row, y_at + first * 4 * N, end - first)
        values = np.array(table, np.int64)
        self._counter[0] = 0
        self._share(kernel, address(values), len(x) * N * D)

    def _kernel_of(self, matrix: Stored) -> Compiled:
        if matrix.kernel is None:
            matrix.kernel = self._kernel(matrix.storage).result()
        return matrix.kernel

    def _share(self, kernel: Compiled, table: int, multiply_adds: int) -> None:
        """Run a kernel on all threads, or on one if there is little to do."""
        scratch, run = self._scratch_addresses, kernel.run
        if multiply_adds < MIN_WORK_TO_SHARE:
            run(table, scratch[0])
        else:
            self.pool.run(lambda thread: run(table, scratch[thread]))

    def _multiply_decoded(self, jobs: list[tuple[Weight, int, int]], x: Floats, outputs: int) -> Floats:
        """As gather, by numpy. jobs: each expert's matrix, and the first and the end of its rows of x."""
        y = np.empty((len(x), outputs), np.float32)
        step = max(1, min(MAX_DECODED // x.shape[-1], -(-outputs // (2 * self.pool.threads))))

        def piece(weight: Weight, at: int, first: int, end: int) -> Callable[[], None]:
            def compute() -> None:
                decoded = _decoded(weight.output_rows(at, at + step))
                np.matmul(x[first:end], decoded.T, out=y[first:end, at : at + len(decoded)])

            return compute

        self.pool.each([piece(w, at, i, j) for w, i, j in jobs for at in range(0, outputs, step)])
        return y


def address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]  # a third of the time of array.ctypes
    return address


def _copy(source: Array, target: Array) -> None:
    """source to target, float32 or of the same dtype."""
    if source.dtype == target.dtype:  # numpy copies bfloat16 value by value, integers in runs
        source, target = (array.view(f"u{array.itemsize}") for array in (source, target))
    np.copyto(target, source)


def _factors(parts: Sequence[Quantized]) -> Array | None:
    """`outer` of all rows of several matrices."""
    if all(part.outer is None for part in parts):
        return None
    factors = [np.float32(1) if part.outer is None else part.outer.astype(np.float32) for part in parts]
    if len(parts) == 1:
        return factors[0]
    return np.concatenate(
        [np.broadcast_to(f, (*part.shape[:-1], 1)) for f, part in zip(factors, parts, strict=True)], axis=-2
    )


def _decoded(weight: Weight) -> Floats:
    if isinstance(weight, Dense) and weight.values.dtype == np.float32:
        return weight.values
    return codecs.dequantize(weight)


def _ordered(x: Floats, storage: Storage, kernel: Compiled) -> Floats:
    """x [P, D], contiguous and in the order in which a kernel reads it."""
    if not storage.by_words:
        return np.ascontiguousarray(x)
    found = np.empty(x.shape, np.float32)
    _order(x, found, storage, kernel)
    return found


def _order(x: Floats, out: Floats, storage: Storage, kernel: Compiled) -> None:
    """Write x [P, D] to `out` in a kernel's order."""
    if storage.by_words:
        np.take(x, _by_words(x.shape[-1], kernel.lanes), axis=-1, out=out, mode="clip")
    else:
        np.copyto(out, x)


@lru_cache
def _by_words(inputs: int, lanes: int) -> Integers:
    return by_words(inputs, lanes)
