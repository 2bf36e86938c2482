"""Loops over vectors as LLVM's intermediate representation: what the kernels are written with. It needs llvmlite.

Addresses are 64-bit integers and strides are bytes, except where a name says elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import llvmlite
import numpy as np
from llvmlite import binding, ir

I8, I16, I32, I64, F16, F32 = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.HalfType(), ir.FloatType())
FAST = ("contract", "reassoc", "nsz")  # multiply-adds in one rounding, sums in any order
NAME = "kernel"  # of the function of a module that Python calls
Value = Any  # of llvmlite


@dataclass(frozen=True)
class Target:
    """What vectors the processor has. lanes: float32 in a vector. rows, tokens: of the tile of sums that its registers
    hold (kernels.py). tables: what it looks up in registers: "16" or "8" float32, "bytes" of 32, or "" nothing.
    halves: whether it converts float16."""

    lanes: int
    rows: int
    tokens: int
    tables: Literal["16", "8", "bytes", ""]
    halves: bool
    cpu: str
    features: str

    @staticmethod
    def of(cpu: str, features: dict[str, bool]) -> Target:
        """Of a processor by LLVM's name and features. With AVX-512, LLVM compiles for half of a register on Intel's
        processors unless told otherwise. That suits the first ones, whose clock the whole register slows down."""
        flat = ",".join(f"{'+' if on else '-'}{name}" for name, on in features.items())
        halves = bool(features.get("f16c") or features.get("neon"))
        if features.get("avx512vl") and features.get("avx512vbmi"):
            return Target(16, 4, 6, "16", halves, cpu, f"{flat},-prefer-256-bit")
        if features.get("avx512vl"):
            return Target(8, 4, 6, "8", halves, cpu, flat)
        if features.get("avx2") and features.get("fma"):
            return Target(8, 2, 5, "8", halves, cpu, flat)
        if features.get("neon"):
            return Target(4, 4, 6, "bytes", halves, cpu, flat)
        return Target(4, 2, 5, "", halves, cpu, flat)

    @staticmethod
    def here() -> Target:
        return Target.of(binding.get_host_cpu_name(), dict(binding.get_host_cpu_features()))


class Function:
    """A function in the making. Arguments are I64; it returns nothing."""

    def __init__(self, module: Any, name: str, arguments: Sequence[str], target: Target) -> None:
        self.module, self.target, self.lanes = module, target, target.lanes
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * len(arguments)), name)
        self.made: Any = function
        self._entry = function.append_basic_block()
        self._first = function.append_basic_block()
        self.b: Any = ir.IRBuilder(self._first)
        self.arguments: dict[str, Value] = dict(zip(arguments, function.args, strict=True))

    def finish(self) -> Any:
        self.b.ret_void()
        ir.IRBuilder(self._entry).branch(self._first)
        return self.made

    def variable(self, value: Value) -> Value:
        """A variable with this value, for load and store of the builder; LLVM keeps it in a register."""
        with self.b.goto_block(self._entry):
            place = self.b.alloca(value.type)
        self.b.store(value, place)
        return place

    def zeros(self) -> Value:
        """A variable, lanes float32 of 0."""
        return self.variable(self.constant(F32, 0.0))

    def constant(self, kind: Any, value: float, lanes: int | None = None) -> Value:
        count = self.lanes if lanes is None else lanes
        return ir.Constant(ir.VectorType(kind, count), [value] * count)

    def integer(self, value: Value | int) -> Value:
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def sum(self, *values: Value | int) -> Value:
        total = self.integer(values[0])
        for value in values[1:]:
            total = self.b.add(total, self.integer(value))
        return total

    def times(self, a: Value, b: Value | int) -> Value:
        return self.b.mul(a, self.integer(b))

    def over(self, a: Value, b: Value | int) -> Value:
        """Of integers that are not negative."""
        return self.b.udiv(a, self.integer(b))

    def smaller(self, a: Value, b: Value | int) -> Value:
        return self.b.select(self.b.icmp_signed("<", a, self.integer(b)), a, self.integer(b))

    @contextmanager
    def vectors(self, lanes: int) -> Iterator[None]:
        """Vectors of fewer lanes than the processor's, for the inputs that are left over."""
        before, self.lanes = self.lanes, lanes
        yield
        self.lanes = before

    @contextmanager
    def loop(self, first: Value | int, end: Value | int, step: Value | int = 1) -> Iterator[Value]:
        """for i in range(first, end, step)"""
        b, place = self.b, self.variable(self.integer(first))
        head, body, done = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        i = b.load(place)
        b.cbranch(b.icmp_signed("<", i, self.integer(end)), body, done)
        b.position_at_end(body)
        yield i
        b.store(self.sum(i, step), place)
        b.branch(head)
        b.position_at_end(done)

    @contextmanager
    def pieces(self, counter: Value, count: Value) -> Iterator[Value]:
        """The numbers below `count` that no other thread has taken: each takes the next by adding to a counter."""
        b = self.b
        head, body, done = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        piece = b.atomic_rmw("add", b.inttoptr(counter, I64.as_pointer()), self.integer(1), "monotonic")
        b.cbranch(b.icmp_signed("<", piece, count), body, done)
        b.position_at_end(body)
        yield piece
        b.branch(head)
        b.position_at_end(done)

    def fields(self, address: Value, names: Sequence[str]) -> dict[str, Value]:
        """int64 of a table by their names."""
        return {name: self.load(self.sum(address, 8 * i), I64) for i, name in enumerate(names)}

    def load(self, address: Value, kind: Any, lanes: int = 1, *, vector: bool = False) -> Value:
        """vector: also if it has one lane."""
        kind = kind if lanes == 1 and not vector else ir.VectorType(kind, lanes)
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=1)

    def prefetch(self, address: Value) -> None:
        """Fetch a line of the cache for reading; no address is a fault."""
        kind = I8.as_pointer()
        arguments = [self.b.inttoptr(address, kind), *(ir.Constant(I32, value) for value in (0, 2, 1))]
        self.intrinsic("llvm.prefetch.p0", ir.VoidType(), *arguments)

    def floats(self, address: Value) -> Value:
        """Lanes float32."""
        return self.load(address, F32, self.lanes)

    def from_half(self, value: Value) -> Value:
        """float32 of finite float16, a scalar or a vector."""
        b, count = self.b, value.type.count if isinstance(value.type, ir.VectorType) else None
        floats, integers = (F32, I32) if count is None else (ir.VectorType(F32, count), ir.VectorType(I32, count))
        if self.target.halves:
            return b.fpext(value, floats)

        def same(kind: Any, number: float) -> Value:
            return ir.Constant(kind, number) if count is None else self.constant(kind, number, count)

        half = I16 if count is None else ir.VectorType(I16, count)
        bits = b.zext(b.bitcast(value, half), integers)
        sign = b.shl(b.and_(bits, same(I32, 0x8000)), same(I32, 16))
        size = b.bitcast(b.shl(b.and_(bits, same(I32, 0x7FFF)), same(I32, 13)), floats)  # but for the exponent's bias
        return b.bitcast(b.or_(b.bitcast(self.multiply(size, same(F32, 2.0**112)), integers), sign), floats)

    def store(self, value: Value, address: Value) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=1)

    def pick(self, a: Value, indices: Sequence[int], b: Value | None = None) -> Value:
        """The lanes of a, and of b after them, by constant indices."""
        b = ir.Constant(a.type, ir.Undefined) if b is None else b
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(indices)), list(indices)))

    def parts(self, vector: Value) -> list[Value]:
        """A vector cut into vectors of `lanes`."""
        count = vector.type.count
        return [self.pick(vector, range(i, i + self.lanes)) for i in range(0, count, self.lanes)]

    def everywhere(self, scalar: Value) -> Value:
        """A vector of one value."""
        vector = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        return self.pick(self.b.insert_element(vector, scalar, ir.Constant(I32, 0)), [0] * self.lanes)

    def narrowed(self, vector: Value) -> Value:
        """A vector of `lanes` with the same sum."""
        while (count := vector.type.count) > self.lanes:
            halves = (self.pick(vector, range(i, i + count // 2)) for i in (0, count // 2))
            vector = self.add(*halves)
        return vector

    def multiply(self, a: Value, b: Value) -> Value:
        return self.b.fmul(a, b, flags=FAST)

    def add(self, a: Value, b: Value) -> Value:
        return self.b.fadd(a, b, flags=FAST)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        return self.add(self.multiply(a, b), c)

    def accumulate(self, a: Value, b: Value, place: Value) -> None:
        """place += a * b"""
        self.b.store(self.multiply_add(a, b, self.b.load(place)), place)

    def tree(self, values: Sequence[Value]) -> Value:
        """The sum of vectors."""
        middle = len(values) // 2
        return values[0] if not middle else self.add(self.tree(values[:middle]), self.tree(values[middle:]))

    def exponential(self, x: Value) -> Value:
        """e to the power of a vector of float32 up to 88, to 2 units in the last place; 0 below -87, where it is no
        normal number. x is n ln 2 + r; the polynomial of e to the power of r is that of Cephes' expf."""
        b, count, exact = self.b, x.type.count, ("contract",)

        def same(value: float) -> Value:
            return self.constant(F32, value, count)

        def fused(p: Value, q: Value, r: Value) -> Value:
            return b.fadd(b.fmul(p, q, flags=exact), r, flags=exact)

        shifted = b.fadd(b.fmul(x, same(1.44269504)), same(1.5 * 2**23))  # n in the low bits
        n = b.fsub(shifted, same(1.5 * 2**23))
        r = fused(n, same(2.12194440e-4), fused(n, same(-0.693359375), x))
        p = same(1.9875691500e-4)
        for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = fused(p, r, same(term))
        p = fused(b.fmul(r, r), p, b.fadd(r, same(1.0)))
        integers = ir.VectorType(I32, count)
        power = b.shl(b.bitcast(shifted, integers), self.constant(I32, 23, count))
        found = b.bitcast(b.add(b.bitcast(p, integers), power), x.type)
        return b.select(b.fcmp_ordered("<", x, same(-87.0)), same(0.0), found)

    def intrinsic(self, name: str, kind: Any, *values: Value) -> Value:
        found = self.module.globals.get(name)
        if found is None:
            found = ir.Function(self.module, ir.FunctionType(kind, [value.type for value in values]), name)
        return self.b.call(found, values)

    def look_up(self, table: Sequence[float], index: Value) -> Value:
        """float32 of a table of 16 by the low 4 bits of int32 lanes; the second half of the table is the negated first,
        or the whole is index + a constant, as it is for integers."""
        b = self.b
        half = ir.Constant(ir.VectorType(F32, 8), list(table[:8]))
        if self.target.tables == "16" and self.lanes == 16:
            whole = ir.Constant(ir.VectorType(F32, 16), list(table))
            return self.intrinsic("llvm.x86.avx512.permvar.sf.512", whole.type, whole, index)
        if table[9] - table[8] == 1:
            low = b.sitofp(b.and_(index, self.constant(I32, 15)), self.constant(F32, 0).type)
            return self.add(low, self.constant(F32, table[0]))
        if self.target.tables == "bytes":
            return self._upper_halves(table, b.and_(index, self.constant(I32, 15)))
        if self.target.tables:
            wide = self.pick(index, [*range(self.lanes)] * (8 // self.lanes))
            value = self.pick(self.intrinsic("llvm.x86.avx2.permps", half.type, half, wide), range(self.lanes))
        else:
            value = self._e2m1(b.and_(index, self.constant(I32, 7)))
        sign = b.shl(b.and_(index, self.constant(I32, 8)), self.constant(I32, 28))
        return b.bitcast(b.or_(b.bitcast(value, sign.type), sign), value.type)

    def _upper_halves(self, table: Sequence[float], code: Value) -> Value:
        """float32 of a table of 16, of which the lower 16 bits are 0, by int32 of 0 to 15: NEON looks up each byte in
        32, the highest ones and those below them, and finds 0 beyond."""
        bits = np.asarray(table, np.float32).view(np.uint32)
        byte = ir.VectorType(I8, 16)
        highest, second = (ir.Constant(byte, [int(each >> shift) & 255 for each in bits]) for shift in (24, 16))
        places = self.b.add(self.b.mul(code, self.constant(I32, 0x01010000)), self.constant(I32, 0x0010FFFF))
        found = self.intrinsic("llvm.aarch64.neon.tbl2.v16i8", byte, highest, second, self.b.bitcast(places, byte))
        return self.b.bitcast(found, ir.VectorType(F32, 4))

    def _e2m1(self, code: Value) -> Value:
        """0, 0.5, 1, 1.5, 2, 3, 4, 6 by int32 of 0 to 7: twice these are code, code beyond 4, and twice that beyond 6,
        added up."""
        b = self.b

        def beyond(limit: int) -> Value:
            more = b.sub(code, self.constant(I32, limit))
            return b.select(b.icmp_signed(">", more, self.constant(I32, 0)), more, self.constant(I32, 0))

        last = beyond(6)
        twice = b.add(b.add(code, beyond(4)), b.add(last, last))
        return self.multiply(b.sitofp(twice, self.constant(F32, 0).type), self.constant(F32, 0.5))

    def total(self, vector: Value) -> Value:
        """The sum of the lanes."""
        return self.b.extract_element(self.totals([vector]), ir.Constant(I32, 0))

    def totals(self, vectors: list[Value]) -> Value:
        """The sum of each of several vectors, in the lanes of one. Their number: a power of 2, at most `lanes`."""
        count = len(vectors)
        while len(vectors) > 1:
            vectors = [self._halved(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        found = vectors[0]
        while found.type.count > count:
            found = self._halved(found, None)
        return found

    def _halved(self, a: Value, b: Value | None) -> Value:
        """The sums of neighbours, those of a and then those of b."""
        count = a.type.count * (1 if b is None else 2)
        return self.add(self.pick(a, range(0, count, 2), b), self.pick(a, range(1, count, 2), b))


def compiler() -> str:
    """The versions of what compiles."""
    return f"llvmlite {llvmlite.__version__}, LLVM {binding.llvm_version_info}"


def compiled(module: Any, target: Target) -> bytes:
    """The module's machine code, an object file. Loops stay as they are written."""
    machine = _machine(target)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    code: bytes = machine.emit_object(parsed)
    return code


def linked(code: bytes, target: Target) -> Any:
    """An object file as part of this process: `get_function_address` of the result gives its functions' addresses."""
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine(target))
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def _machine(target: Target) -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    native = binding.Target.from_default_triple()
    return native.create_target_machine(cpu=target.cpu, features=target.features, opt=3, jit=True)
