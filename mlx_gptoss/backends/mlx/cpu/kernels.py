"""Products with a matrix as it is stored, compiled for the processor at hand. It needs llvmlite.

A kernel computes pieces of rows until there are none left; all threads call it with the same table, and take pieces by
adding to one counter. A few tokens are multiplied row by row, as weights are decoded in registers; for many, a block of
a piece is decoded first and multiplied by all of them. Values and sums are float32, as exact as a product with the
decoded matrix.

Legend: N outputs, K inputs, M tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from .emit import F32, NAME, Function, Target, Value
from .reader import Reader, Row
from .storages import Storage

# The table of a call: int64 each, then the fields of each job. Jobs are products with matrices of one shape and format,
# such as those of several experts.
CALL = ("counter", "jobs", "blocks", "rows", "n", "k", "code_stride", "scale_stride", "x_stride", "y_stride")
JOB = ("codes", "scales", "biases", "x", "sums", "y", "tokens")
BLOCK = 768  # inputs that are decoded at once for several tokens: those of a tile stay in the first cache
SCRATCH_ROWS = 64  # maximum rows of a piece
ROWS_AHEAD = 2  # of the row that is decoded, to be fetched


@dataclass(frozen=True)
class Direct:
    """How a few tokens are multiplied row by row, as their weights are decoded in registers: `tokens` and `rows` at a
    time, for at most `most` tokens of a job. With more, decoding a block first is faster."""

    tokens: int
    rows: int
    most: int

    @staticmethod
    def of(storage: Storage, target: Target) -> Direct:
        """The fastest on one core of an AMD EPYC with AVX-512, and with less of it for 8 lanes. Three tokens of 2880
        inputs fit into the first cache next to the rows, four do not, which only 16 lanes are fast enough to notice.
        Codes that cross bytes take too long to decode again. 4 lanes were not measured."""
        if target.lanes < 8 or storage.bits % 4:
            return Direct(4, 2, 4)
        if storage.element == "e4m3":
            return Direct(4, 2, 8)
        if target.lanes < 16:
            return Direct(4, 2, 8 if storage.element == "e2m1" and target.rows < 4 else 16)
        return Direct(3, 4, 32) if storage.scale == "e8m0" else Direct(3, 2, 16)


def _dots(
    f: Function, reader: Reader, rows: Sequence[Row], inputs: Value, xs: Sequence[Value], sums: Sequence[Value]
) -> list[list[Value]]:
    """Each of a few rows times each of a few tokens, float32. sums: of each token's inputs by group."""
    pairs = [(r, t) for r in range(len(rows)) for t in range(len(xs))]
    group = reader.storage.group
    places = 1 if group or len(pairs) > 1 else reader.unit // f.lanes  # of a pair: no sum waits for another
    whole = {pair: f.constant(F32, 0.0) for pair in pairs}
    for first, end in reader.spans(f.integer(0), inputs):
        totals = {pair: [f.variable(f.narrowed(whole[pair])), *(f.zeros() for _ in range(1, places))] for pair in pairs}
        with f.loop(first, end, reader.unit) as k:
            parts: dict[tuple[int, int], Value] = {}
            for row in rows:
                reader.prefetch(row, k, reader.unit)
            for i, values in enumerate(zip(*(reader.values(row, k) for row in rows), strict=True)):
                tokens = [f.floats(f.sum(x, f.times(k, 4), 4 * f.lanes * i)) for x in xs]
                for r, t in pairs:
                    if not group:
                        f.accumulate(values[r], tokens[t], totals[r, t][i % places])
                    elif i:
                        parts[r, t] = f.multiply_add(values[r], tokens[t], parts[r, t])
                    else:
                        parts[r, t] = f.multiply(values[r], tokens[t])
            scales = [reader.scale(row, k) for row in rows] if group else []
            for (r, t), part in parts.items():
                f.accumulate(part, scales[r], totals[r, t][0])
        whole = {pair: _whole(f, totals[pair]) for pair in pairs}
    found = [[f.total(whole[r, t]) for t in range(len(xs))] for r in range(len(rows))]
    if reader.biased:
        for row, mine in zip(rows, found, strict=True):
            added = _biases(f, reader, row, f.over(inputs, group), sums)
            mine[:] = [f.add(*both) for both in zip(mine, added, strict=True)]
    return found


def _biases(f: Function, reader: Reader, row: Row, groups: Value, sums: Sequence[Value]) -> list[Value]:
    """What the biases of a row add to its product with each token: the sum over groups of bias times the sum of the
    inputs."""
    wide, rest = [f.zeros() for _ in sums], [f.variable(ir.Constant(F32, 0.0)) for _ in sums]
    even = f.times(f.over(groups, f.lanes), f.lanes)
    for first, end, count, places in ((f.integer(0), even, f.lanes, wide), (even, groups, 1, rest)):
        with f.loop(first, end, count) as g:
            biases = reader.biases(row, g, count)
            for at, place in zip(sums, places, strict=True):
                f.accumulate(biases, f.load(f.sum(at, f.times(g, 4)), F32, count), place)
    return [f.add(f.total(f.b.load(w)), f.b.load(r)) for w, r in zip(wide, rest, strict=True)]


def _whole(f: Function, places: Sequence[Value]) -> Value:
    """The sum of variables."""
    whole = f.b.load(places[0])
    for place in places[1:]:
        whole = f.add(whole, f.b.load(place))
    return whole


def _decode(f: Function, reader: Reader, row: Row, first: Value, end: Value, out: Value) -> None:
    """Inputs first to end of a row as float32 from the address `out` on."""
    for begin, stop in reader.spans(first, end):
        with f.loop(begin, stop, reader.unit) as k:
            at = f.sum(out, f.times(f.b.sub(k, first), 4))
            for i, value in enumerate(reader.scaled(row, k)):
                f.store(value, f.sum(at, 4 * f.lanes * i))


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
    """NAME(table, scratch): all pieces that are left. scratch: SCRATCH_ROWS * BLOCK float32 of this thread."""
    module = ir.Module()
    tiles = {(r, m): _tile(module, target, r, m) for r in (1, target.rows) for m in range(1, target.tokens + 1)}
    f = Function(module, NAME, ("table", "scratch"), target)
    b, reader = f.b, Reader(f, storage)
    table = f.arguments["table"]
    call = f.fields(table, CALL)
    with f.pieces(call["counter"], f.times(call["jobs"], call["blocks"])) as piece:
        job, block = f.over(piece, call["blocks"]), b.urem(piece, call["blocks"])
        mine = f.fields(f.sum(table, 8 * len(CALL), f.times(job, 8 * len(JOB))), JOB)
        first = f.times(block, call["rows"])
        end = f.smaller(f.sum(first, call["rows"]), call["n"])

        def row(r: Value) -> Row:
            scales, biases = (f.sum(mine[kind], f.times(r, call["scale_stride"])) for kind in ("scales", "biases"))
            codes = f.sum(mine["codes"], f.times(r, call["code_stride"]))
            return Row(codes, scales, biases, f.sum(codes, f.times(call["code_stride"], ROWS_AHEAD)))

        tokens, few = mine["tokens"], Direct.of(storage, target)
        directly = b.icmp_signed("<=", tokens, f.integer(few.most))
        strips = f.over(f.sum(tokens, few.tokens - 1), few.tokens)
        with b.if_then(directly), f.loop(0, strips) as strip:
            token, next_token = (f.over(f.times(tokens, f.sum(strip, i)), strips) for i in range(2))
            for count in range(1, few.tokens + 1):
                with b.if_then(b.icmp_signed("==", b.sub(next_token, token), f.integer(count))):
                    _multiply_few(f, reader, row, call, mine, first, end, token, count, few.rows)
        with b.if_then(b.not_(directly)), f.loop(0, call["k"], BLOCK) as start:
            stop = f.smaller(f.sum(start, BLOCK), call["k"])
            with f.loop(first, end) as r:
                out = f.sum(f.arguments["scratch"], f.times(b.sub(r, first), 4 * BLOCK))
                _decode(f, reader, row(r), start, stop, out)
            _multiply(f, tiles, call, mine, first, end, start, stop)
    f.finish()
    return module


def _multiply_few(
    f: Function,
    reader: Reader,
    row: Callable[[Value], Row],
    call: dict[str, Value],
    job: dict[str, Value],
    first: Value,
    end: Value,
    token: Value,
    count: int,
    together: int,
) -> None:
    """Rows first to end times `count` tokens from `token` on; several by `together` rows at a time, so that tokens are
    read less often."""
    tokens = [f.sum(token, i) for i in range(count)]
    xs = [f.sum(job["x"], f.times(call["x_stride"], t)) for t in tokens]
    sums_stride = f.over(call["x_stride"], reader.storage.group or 1)
    sums = [f.sum(job["sums"], f.times(sums_stride, t)) for t in tokens]
    even = f.sum(first, f.times(f.over(f.b.sub(end, first), together), together))
    for begin, limit, step in ((first, even, together), (even, end, 1)) if count > 1 else ((first, end, 1),):
        with f.loop(begin, limit, step) as r:
            rows = [row(f.sum(r, i)) for i in range(step)]
            for n, found in enumerate(_dots(f, reader, rows, call["k"], xs, sums)):
                for i, value in enumerate(found):
                    at = f.sum(job["y"], f.times(call["y_stride"], tokens[i]), f.times(f.sum(r, n), 4))
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
