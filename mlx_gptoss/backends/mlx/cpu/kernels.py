"""Products with a matrix as it is stored, compiled for the processor at hand. It needs llvmlite.

A kernel computes pieces of rows until there are none left; all threads call it with the same table, and take pieces by
adding to one counter. One token is multiplied row by row in registers; for several, a block of a piece is decoded first
and multiplied by all of them. Values and sums are float32, as exact as a product with the decoded matrix.

Legend: N outputs, K inputs, M tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from llvmlite import ir

from ....weights.codecs import E2M1, E8M0
from .emit import F16, F32, I8, I16, I32, I64, Function, Target, Value

# The table of a call: int64 each, then the fields of each job. Jobs are products with matrices of one shape and format,
# such as those of several experts.
CALL = ("counter", "jobs", "blocks", "rows", "n", "k", "code_stride", "scale_stride", "x_stride", "y_stride")
JOB = ("codes", "scales", "biases", "x", "sums", "y", "tokens")
BLOCK = 768  # inputs that are decoded at once for several tokens: those of a tile stay in the first cache
SCRATCH_ROWS = 64  # maximum rows of a piece
MAX_DIRECT = 4  # tokens that are multiplied row by row; with more, decoding a block first is faster
ROWS_AHEAD = 2  # of the row that is decoded, to be fetched
UNIT = 32  # K is a multiple of it
ScaleType = Literal["e8m0", "bfloat16", "float16", "float32", "none"]
SIZES = {"e8m0": 1, "bfloat16": 2, "float16": 2, "float32": 4, "none": 0}
NAME = "product"  # of a kernel's function


@dataclass(frozen=True)
class Storage:
    """How a matrix is stored. element: "float" (dense: 16-bit bfloat16 and float16, or 32-bit float32), "e2m1" or
    "uint". group: weights that share a scale; 0 is dense. scale: its type, and a dense matrix's own type."""

    element: Literal["float", "e2m1", "uint"]
    bits: int
    group: int
    scale: ScaleType

    @property
    def paired(self) -> bool:
        """Whether inputs have to be in the order of `paired_order`."""
        return self.element != "float" and self.bits == 4


@dataclass(frozen=True)
class _Row:
    """Addresses of one row of a matrix, and of the codes of a later row."""

    codes: Value
    scales: Value
    biases: Value
    ahead: Value


class _Reader:
    """Emits what decodes a row of a matrix in one storage."""

    def __init__(self, function: Function, storage: Storage) -> None:
        self.f, self.storage = function, storage
        self.biased = storage.element == "uint"

    def values(self, row: _Row, k: Value, count: int) -> list[Value]:
        """`count` weights from input k on, in the order of the inputs, unscaled. Integers are centered, so that little
        of a sum of products cancels against the bias."""
        f, s = self.f, self.storage
        lanes, b = f.lanes, f.b
        if s.element == "float":
            return [self._dense(f.sum(row.codes, f.times(f.sum(k, i), s.bits // 8))) for i in range(0, count, lanes)]
        if s.bits == 4:
            table = E2M1.tolist() if s.element == "e2m1" else [float(code - 8) for code in range(16)]
            found = []
            for i in range(0, count // 2, lanes):
                bytes_ = f.load(f.sum(row.codes, f.over(k, 2), i), I8, lanes)
                pairs = b.zext(bytes_, ir.VectorType(I32, lanes))
                found += [f.look_up(table, pairs), f.look_up(table, b.lshr(pairs, f.constant(I32, 4)))]
            return found
        if s.bits == 8:
            codes = [f.load(f.sum(row.codes, k, i), I8, lanes) for i in range(0, count, lanes)]
            return [self._signed(b.xor(code, f.constant(I8, -128))) for code in codes]
        words = [self._eight(f.sum(row.codes, f.times(f.over(f.sum(k, i), 8), s.bits))) for i in range(0, count, 8)]
        if lanes == 16:
            words = [f.pick(low, range(16), high) for low, high in zip(words[::2], words[1::2], strict=True)]
        return [part for word in words for part in f.parts(word)]

    def prefetch(self, row: _Row, k: Value, count: int) -> None:
        """Fetch the same inputs of a later row: processors follow one stream of memory by themselves, not several."""
        f, bits = self.f, self.storage.bits
        at = f.sum(row.ahead, f.over(f.times(k, bits), 8))
        for line in range(0, max(1, count * bits // 8), 64):
            f.prefetch(f.sum(at, line))

    def scaled(self, row: _Row, k: Value, count: int) -> list[Value]:
        """As values, with scale and bias. count: at most a group."""
        self.prefetch(row, k, count)
        f, values = self.f, self.values(row, k, count)
        if not self.storage.group:
            return values
        scale = self.scale(row, k)
        if not self.biased:
            return [f.multiply(value, scale) for value in values]
        bias = f.everywhere(self.bias(row, k))
        return [f.multiply_add(value, scale, bias) for value in values]

    def scale(self, row: _Row, k: Value) -> Value:
        """Of the group of input k, float32 in every lane."""
        f, kind = self.f, self.storage.scale
        at = f.sum(row.scales, f.times(f.over(k, self.storage.group), SIZES[kind]))
        if kind != "bfloat16":
            return f.everywhere(self._float(at))
        twice = f.pick(f.everywhere(f.load(at, I16)), [0] * 2 * f.lanes)  # one operation with the load
        wide = f.b.bitcast(twice, ir.VectorType(I32, f.lanes))
        return f.b.bitcast(f.b.shl(wide, f.constant(I32, 16)), ir.VectorType(F32, f.lanes))

    def bias(self, row: _Row, k: Value) -> Value:
        """Of the group of input k, for centered integers, float32."""
        f, kind = self.f, self.storage.scale
        at = f.times(f.over(k, self.storage.group), SIZES[kind])
        middle = ir.Constant(F32, float(1 << self.storage.bits - 1))
        return f.multiply_add(self._float(f.sum(row.scales, at)), middle, self._float(f.sum(row.biases, at)))

    def biases(self, row: _Row, group: Value) -> Value:
        """Of `lanes` groups, as bias."""
        f = self.f
        at = f.times(group, SIZES[self.storage.scale])
        middle = f.constant(F32, float(1 << self.storage.bits - 1))
        return f.multiply_add(self._dense(f.sum(row.scales, at)), middle, self._dense(f.sum(row.biases, at)))

    def _float(self, at: Value) -> Value:
        """A scale or a bias as float32."""
        f, kind, b = self.f, self.storage.scale, self.f.b
        if kind == "float32":
            return f.load(at, F32)
        if kind == "float16":
            return f.from_half(f.load(at, F16))
        if kind == "bfloat16":
            return b.bitcast(b.shl(b.zext(f.load(at, I16), I32), ir.Constant(I32, 16)), F32)
        return f.table_entry("e8m0", E8M0.tolist(), b.zext(f.load(at, I8), I64))

    def _dense(self, at: Value) -> Value:
        f, b = self.f, self.f.b
        if self.storage.scale == "float32":
            return f.floats(at)
        floats = ir.VectorType(F32, f.lanes)
        if self.storage.scale == "float16":
            return f.from_half(f.load(at, F16, f.lanes))
        wide = b.zext(f.load(at, I16, f.lanes), ir.VectorType(I32, f.lanes))
        return b.bitcast(b.shl(wide, f.constant(I32, 16)), floats)

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


def _dot(f: Function, reader: _Reader, row: _Row, inputs: Value, x: Value, sums: Value) -> Value:
    """One row times one token, float32. sums: of the token's inputs by group."""
    lanes, group = f.lanes, reader.storage.group
    unit = group or UNIT
    together = max(1, 64 // unit)  # units in one turn, each with its own sum, so that none waits for another
    totals = [f.zeros() for _ in range(together * (1 if group else unit // lanes))]

    def one(k: Value, n: int) -> None:
        at = f.sum(x, f.times(k, 4))
        pairs = [(value, f.floats(f.sum(at, 4 * lanes * i))) for i, value in enumerate(reader.values(row, k, unit))]
        if not group:
            for i, pair in enumerate(pairs):
                f.accumulate(*pair, totals[n * len(pairs) + i])
            return
        part = f.multiply(*pairs[0])
        for pair in pairs[1:]:
            part = f.multiply_add(*pair, part)
        f.accumulate(part, reader.scale(row, k), totals[n])

    even = f.times(f.over(inputs, unit * together), unit * together)
    with f.loop(0, even, unit * together) as k:
        if group:
            reader.prefetch(row, k, unit * together)
        for n in range(together):
            one(f.sum(k, n * unit), n)
    with f.loop(even, inputs, unit) as k:
        one(k, 0)
    total = f.total(_whole(f, totals))
    return f.add(total, _biases(f, reader, row, f.over(inputs, group), sums)) if reader.biased else total


def _biases(f: Function, reader: _Reader, row: _Row, groups: Value, sums: Value) -> Value:
    """What the biases of a row add to its product: the sum over groups of bias times the sum of the inputs."""
    wide, rest = f.zeros(), f.variable(ir.Constant(F32, 0.0))
    even = f.times(f.over(groups, f.lanes), f.lanes)
    with f.loop(0, even, f.lanes) as g:
        f.accumulate(reader.biases(row, g), f.floats(f.sum(sums, f.times(g, 4))), wide)
    with f.loop(even, groups) as g:
        at = f.sum(sums, f.times(g, 4))
        f.accumulate(reader.bias(row, f.times(g, reader.storage.group)), f.load(at, F32), rest)
    return f.add(f.total(f.b.load(wide)), f.b.load(rest))


def _dots(f: Function, reader: _Reader, rows: Sequence[_Row], inputs: Value, xs: Sequence[Value]) -> list[list[Value]]:
    """Each of a few rows times each of a few tokens, float32."""
    lanes, unit = f.lanes, reader.storage.group or UNIT
    totals = [[f.zeros() for _ in xs] for _ in rows]
    with f.loop(0, inputs, unit) as k:
        decoded = [reader.scaled(row, k, unit) for row in rows]
        for i in range(unit // lanes):
            tokens = [f.floats(f.sum(x, f.times(k, 4), 4 * lanes * i)) for x in xs]
            for values, mine in zip(decoded, totals, strict=True):
                for token, place in zip(tokens, mine, strict=True):
                    f.accumulate(values[i], token, place)
    return [[f.total(f.b.load(place)) for place in mine] for mine in totals]


def _whole(f: Function, places: Sequence[Value]) -> Value:
    """The sum of variables."""
    whole = f.b.load(places[0])
    for place in places[1:]:
        whole = f.add(whole, f.b.load(place))
    return whole


def _decode(f: Function, reader: _Reader, row: _Row, first: Value, end: Value, out: Value) -> None:
    """Inputs first to end of a row as float32 from the address `out` on."""
    unit, lanes = reader.storage.group or UNIT, f.lanes
    with f.loop(first, end, unit) as k:
        at = f.sum(out, f.times(f.b.sub(k, first), 4))
        for i, value in enumerate(reader.scaled(row, k, unit)):
            f.store(value, f.sum(at, 4 * lanes * i))


def _tile(module: ir.Module, target: Target, rows: int, tokens: int) -> ir.Function:
    """y [tokens, rows] = or, if `add`, += x [tokens, inputs] times w [rows, inputs], float32."""
    f = Function(
        module, f"tile_{rows}_{tokens}", ("w", "x", "y", "w_stride", "x_stride", "y_stride", "k", "add"), target
    )
    a, lanes = f.arguments, f.lanes
    sums = [[f.zeros() for _ in range(rows)] for _ in range(tokens)]
    ws = [f.sum(a["w"], f.times(a["w_stride"], i)) for i in range(rows)]
    xs = [f.sum(a["x"], f.times(a["x_stride"], i)) for i in range(tokens)]
    with f.loop(0, f.times(a["k"], 4), 4 * lanes) as at:
        values = [f.floats(f.sum(w, at)) for w in ws]
        for x, mine in zip(xs, sums, strict=True):
            token = f.floats(f.sum(x, at))
            for value, place in zip(values, mine, strict=True):
                f.accumulate(value, token, place)
    for i, mine in enumerate(sums):
        found = f.totals([f.b.load(place) for place in mine])
        at = f.sum(a["y"], f.times(a["y_stride"], i))
        old = f.load(at, F32, rows) if rows > 1 else f.everywhere(f.load(at, F32))
        old = old if rows > 1 else f.pick(old, [0])
        f.store(f.b.select(f.b.icmp_signed("!=", a["add"], f.integer(0)), f.add(found, old), found), at)
    made = f.finish()
    made.linkage = "internal"
    return made


def kernel_module(storage: Storage, target: Target) -> ir.Module:
    """product(table, scratch): all pieces that are left. scratch: SCRATCH_ROWS * BLOCK float32 of this thread."""
    module = ir.Module()
    tiles = {(r, m): _tile(module, target, r, m) for r in (1, target.rows) for m in range(1, target.tokens + 1)}
    f = Function(module, NAME, ("table", "scratch"), target)
    b, reader = f.b, _Reader(f, storage)
    call = {field: f.load(f.sum(f.arguments["table"], 8 * i), I64) for i, field in enumerate(CALL)}
    pieces = f.times(call["jobs"], call["blocks"])
    counter = b.inttoptr(call["counter"], I64.as_pointer())
    head, body, done = (b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    piece = b.atomic_rmw("add", counter, f.integer(1), "monotonic")
    b.cbranch(b.icmp_signed("<", piece, pieces), body, done)
    b.position_at_end(body)
    job, block = f.over(piece, call["blocks"]), b.urem(piece, call["blocks"])
    fields = f.sum(f.arguments["table"], 8 * len(CALL), f.times(job, 8 * len(JOB)))
    mine = {field: f.load(f.sum(fields, 8 * i), I64) for i, field in enumerate(JOB)}
    first = f.times(block, call["rows"])
    end = f.smaller(f.sum(first, call["rows"]), call["n"])

    def row(r: Value) -> _Row:
        scales, biases = (f.sum(mine[kind], f.times(r, call["scale_stride"])) for kind in ("scales", "biases"))
        codes = f.sum(mine["codes"], f.times(r, call["code_stride"]))
        return _Row(codes, scales, biases, f.sum(codes, f.times(call["code_stride"], ROWS_AHEAD)))

    with b.if_then(b.icmp_signed("==", mine["tokens"], f.integer(1))), f.loop(first, end) as r:
        f.store(_dot(f, reader, row(r), call["k"], mine["x"], mine["sums"]), f.sum(mine["y"], f.times(r, 4)))
    for count in range(2, MAX_DIRECT + 1):
        with b.if_then(b.icmp_signed("==", mine["tokens"], f.integer(count))):
            _multiply_few(f, reader, row, call, mine, first, end, count)
    many = b.icmp_signed(">", mine["tokens"], f.integer(MAX_DIRECT))
    with b.if_then(many), f.loop(0, call["k"], BLOCK) as start:
        stop = f.smaller(f.sum(start, BLOCK), call["k"])
        with f.loop(first, end) as r:
            out = f.sum(f.arguments["scratch"], f.times(b.sub(r, first), 4 * BLOCK))
            _decode(f, reader, row(r), start, stop, out)
        _multiply(f, tiles, call, mine, first, end, start, stop)
    b.branch(head)
    b.position_at_end(done)
    f.finish()
    return module


def _multiply_few(
    f: Function,
    reader: _Reader,
    row: Callable[[Value], _Row],
    call: dict[str, Value],
    job: dict[str, Value],
    first: Value,
    end: Value,
    count: int,
) -> None:
    """Rows first to end times `count` tokens, two rows at a time: the tokens are then read half as often."""
    xs = [f.sum(job["x"], f.times(call["x_stride"], i)) for i in range(count)]
    even = f.sum(first, f.times(f.over(f.b.sub(end, first), 2), 2))
    for begin, limit, step in ((first, even, 2), (even, end, 1)):
        with f.loop(begin, limit, step) as r:
            rows = [row(f.sum(r, i)) for i in range(step)]
            for n, found in enumerate(_dots(f, reader, rows, call["k"], xs)):
                for i, value in enumerate(found):
                    at = f.sum(job["y"], f.times(call["y_stride"], i), f.times(f.sum(r, n), 4))
                    f.store(value, at)


def _multiply(
    f: Function,
    tiles: dict[tuple[int, int], ir.Function],
    call: dict[str, Value],
    job: dict[str, Value],
    first: Value,
    end: Value,
    start: Value,
    stop: Value,
) -> None:
    """Rows first to end, decoded for inputs start to stop, times all tokens of the job."""
    b = f.b
    rows, most = max(r for r, _ in tiles), max(m for _, m in tiles)
    even = f.sum(first, f.times(f.over(b.sub(end, first), rows), rows))

    def strip(token: Value, count: int) -> None:
        x = f.sum(job["x"], f.times(call["x_stride"], token), f.times(start, 4))
        y = f.sum(job["y"], f.times(call["y_stride"], token))
        for begin, limit, step in ((first, even, rows), (even, end, 1)):
            with f.loop(begin, limit, step) as r:
                w = f.sum(f.arguments["scratch"], f.times(b.sub(r, first), 4 * BLOCK))
                strides = (f.integer(4 * BLOCK), call["x_stride"], call["y_stride"])
                b.call(tiles[step, count], (w, x, f.sum(y, f.times(r, 4)), *strides, b.sub(stop, start), start))

    whole = f.times(f.over(job["tokens"], most), most)
    with f.loop(0, whole, most) as token:
        strip(token, most)
    left = b.sub(job["tokens"], whole)
    for count in range(1, most):
        with b.if_then(b.icmp_signed("==", left, f.integer(count))):
            strip(whole, count)
