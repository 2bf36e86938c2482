"""Decodes the rows of a matrix in vectors, in any storage: the part of the kernels that knows the formats. It needs
llvmlite.

Legend: K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llvmlite import ir

from ....weights.codecs import E2M1
from .emit import F16, F32, I8, I16, I32, I64, Function, Value
from .storages import SIZES, UNIT, Storage


@dataclass(frozen=True)
class Row:
    """Addresses of one row of a matrix, and of the codes of a later row."""

    codes: Value
    scales: Value
    biases: Value
    ahead: Value


class Reader:
    """Emits what decodes a row of a matrix in one storage."""

    def __init__(self, function: Function, storage: Storage) -> None:
        self.f, self.storage = function, storage
        self.biased = storage.element == "uint"

    @property
    def unit(self) -> int:
        """Inputs that are decoded in one turn."""
        return 8 * self.f.lanes if self.storage.by_words else self.storage.group or UNIT

    def spans(self, first: Value, end: Value) -> Iterator[tuple[Value, Value]]:
        """First and end of spans of whole units. If codes are read by words, the function has fewer lanes in the last
        ones."""
        f = self.f
        widths = [lanes for lanes in (16, 8, 4) if lanes <= f.lanes] if self.storage.by_words else [f.lanes]
        for lanes in widths:
            with f.vectors(lanes):
                whole = f.times(f.over(f.b.sub(end, first), self.unit), self.unit)
                stop = f.sum(first, whole)
                yield first, stop
                first = stop

    def values(self, row: Row, k: Value) -> Iterator[Value]:
        """The weights of a unit from input k on, in the order of the inputs, unscaled. Integers are centered, so that
        little of a sum of products cancels against the bias."""
        f, s = self.f, self.storage
        lanes, b = f.lanes, f.b
        at = f.sum(row.codes, f.over(f.times(k, s.bits), 8))
        if s.by_words:
            table = E2M1.tolist() if s.element == "e2m1" else [float(code - 8) for code in range(16)]
            words = f.load(at, I32, lanes)
            for i in range(8):
                yield f.look_up(table, b.lshr(words, f.constant(I32, 4 * i)))
            return
        whole_bytes = s.bits % 8 == 0
        for i in range(0, self.unit, lanes if whole_bytes else max(8, lanes)):
            part = f.sum(at, i * s.bits // 8)
            if s.element == "float":
                yield self._floats(part, lanes)
            elif s.element == "e4m3":
                yield self._e4m3(f.load(part, I8, lanes))
            elif whole_bytes:
                yield self._signed(b.xor(f.load(part, I8, lanes), f.constant(I8, -128)))
            else:
                eights = [self._eight(f.sum(part, j * s.bits)) for j in range(max(1, lanes // 8))]
                yield from f.parts(f.pick(eights[0], range(16), eights[1]) if lanes == 16 else eights[0])

    def prefetch(self, row: Row, k: Value, count: int) -> None:
        """Fetch the same inputs of a later row: processors follow one stream of memory by themselves, not several."""
        f, bits = self.f, self.storage.bits
        at = f.sum(row.ahead, f.over(f.times(k, bits), 8))
        for line in range(0, max(1, count * bits // 8), 64):
            f.prefetch(f.sum(at, line))

    def scaled(self, row: Row, k: Value) -> list[Value]:
        """As values, with scale and bias."""
        self.prefetch(row, k, self.unit)
        f, values = self.f, [*self.values(row, k)]
        if not self.storage.group:
            return values
        scale = self.scale(row, k)
        if not self.biased:
            return [f.multiply(value, scale) for value in values]
        bias = self.bias(row, k)
        return [f.multiply_add(value, scale, bias) for value in values]

    def scale(self, row: Row, k: Value) -> Value:
        """Of the unit from input k on, float32 in the lanes of its inputs."""
        f = self.f
        at = f.sum(row.scales, f.times(f.over(k, self.storage.group), SIZES[self.storage.scale]))
        if self._groups > 1 or self.storage.scale != "bfloat16":
            return self._spread(self._floats(at, self._groups))
        twice = f.pick(f.everywhere(f.load(at, I16)), [0] * 2 * f.lanes)  # one operation with the load
        wide = f.b.bitcast(twice, ir.VectorType(I32, f.lanes))
        return f.b.bitcast(f.b.shl(wide, f.constant(I32, 16)), ir.VectorType(F32, f.lanes))

    def bias(self, row: Row, k: Value) -> Value:
        """As scale, for centered integers."""
        return self._spread(self.biases(row, self.f.over(k, self.storage.group), self._groups))

    def biases(self, row: Row, group: Value, count: int) -> Value:
        """Of some groups, for centered integers."""
        f = self.f
        at = f.times(group, SIZES[self.storage.scale])
        scales, biases = (self._floats(f.sum(base, at), count) for base in (row.scales, row.biases))
        middle = float(1 << self.storage.bits - 1)
        return f.multiply_add(scales, ir.Constant(scales.type, middle if count == 1 else [middle] * count), biases)

    @property
    def _groups(self) -> int:
        """Of a unit."""
        return max(1, self.unit // self.storage.group)

    def _spread(self, values: Value) -> Value:
        """The values of a unit's groups, in the lanes of their inputs."""
        f, groups = self.f, self._groups
        if groups == 1:
            return f.everywhere(values)
        return f.pick(values, [lane * groups // f.lanes for lane in range(f.lanes)])

    def _floats(self, at: Value, count: int) -> Value:
        """Scales, biases or dense weights as float32; a scalar for one."""
        f, kind, b = self.f, self.storage.scale, self.f.b
        if kind == "float32":
            return f.load(at, F32, count)
        if kind == "float16":
            return f.from_half(f.load(at, F16, count))
        if kind == "e4m3":
            return self._e4m3(f.load(at, I8, count))
        narrow, integers, floats = (i if count == 1 else ir.VectorType(i, count) for i in (I8, I32, F32))

        def same(number: int) -> Value:
            return ir.Constant(integers, number if count == 1 else [number] * count)

        if kind == "bfloat16":
            return b.bitcast(b.shl(b.zext(f.load(at, I16, count), integers), same(16)), floats)
        codes = f.load(at, I8, count)
        shifted = b.shl(b.zext(codes, integers), same(23))
        least = same(0x400000)  # 2^-127, which is subnormal
        bits = b.select(b.icmp_unsigned(">", shifted, least), shifted, least)
        last = ir.Constant(narrow, -1 if count == 1 else [-1] * count)
        return b.bitcast(b.select(b.icmp_unsigned("==", codes, last), same(0x7FC00000), bits), floats)

    def _e4m3(self, codes: Value) -> Value:
        """FP8 as float32: three bits of its mantissa and four of its exponent are those of a float16 of 2^-8 its size.
        Codes of which all seven bits are set are no numbers."""
        f, b, count = self.f, self.f.b, codes.type.count
        wide = b.shl(b.sext(codes, ir.VectorType(I16, count)), f.constant(I16, 7, count))
        half = b.and_(wide, f.constant(I16, ~0x4000, count))  # where the sign was extended to
        last = f.constant(I16, 0x3F80, count)
        value = f.multiply(f.from_half(b.bitcast(half, ir.VectorType(F16, count))), f.constant(F32, 256.0, count))
        return b.select(b.icmp_signed("==", b.and_(half, last), last), f.constant(F32, float("nan"), count), value)

    def _signed(self, codes: Value) -> Value:
        b, count = self.f.b, codes.type.count
        return b.sitofp(b.sext(codes, ir.VectorType(I32, count)), ir.VectorType(F32, count))

    def _eight(self, at: Value) -> Value:
        """Eight codes that begin at a byte, centered, as float32."""
        f, b, bits = self.f, self.f.b, self.storage.bits
        word = b.zext(f.load(at, ir.IntType(8 * bits)), I64)
        wide = ir.VectorType(I64, 8)
        words = f.pick(b.insert_element(ir.Constant(wide, ir.Undefined), word, ir.Constant(I32, 0)), [0] * 8)
        shifted = b.lshr(words, ir.Constant(wide, [bits * i for i in range(8)]))
        codes = b.trunc(b.and_(shifted, f.constant(I64, (1 << bits) - 1, 8)), ir.VectorType(I32, 8))
        return b.sitofp(b.sub(codes, f.constant(I32, 1 << bits - 1, 8)), ir.VectorType(F32, 8))
