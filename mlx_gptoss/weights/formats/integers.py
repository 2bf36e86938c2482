"""Integers with zero points, w = (code - zero) * scale, as the affine weights that backends run.

w = code * scale + bias with bias = -zero * scale. A zero point in the middle of the codes makes the bias a power of two
times the scale, which keeps the scale's dtype. Any other bias needs more digits than float16 or bfloat16 has: scales
and biases are then float32, and every value is exact, as 8 bits times the 11 of a float16 scale fit. (Stored float32
scales round: by less than 2^-22 of the group's largest value.)

A stored group may be a whole row, or not divide a row: 23 groups of 128 in a row of 2880, the last of them shorter.
Scales are then repeated for the largest groups of 128, 64 or 32 that divide both. What no such groups divide, and
columns that are assigned to groups one by one (act-order), are decoded to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...errors import CheckpointError
from .. import codecs, quantization
from ..params import Param
from ..tensor import AFFINE, AFFINE_BITS, Array, Dense, Quantized, Spec, Weight
from .base import CheckpointHeaders, ExpectedTensor, GetTensor, Source
from .per_expert import Modules, modules_source

ROW = -1  # as a group size: the whole row, in the tools' configs
_MEMORY_GROUPS = (128, 64, 32)
_USUAL_GROUPS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Scheme:
    """What config.json says about some modules; None where it does not say.

    bits: per code. group: columns that share a scale, or ROW. symmetric: the zero point is 2^(bits - 1) throughout.
    """

    bits: int | None = None
    group: int | None = None
    symmetric: bool | None = None


@dataclass(frozen=True)
class Layout:
    """How the rows of one matrix are stored.

    bits: per code. width: columns. group: columns per stored scale, of which the last group may have fewer.
    symmetric: the zero point is 2^(bits - 1), so that none needs to be kept.
    any_order: each column says which group it belongs to (act-order).
    """

    bits: int
    width: int
    group: int
    symmetric: bool
    any_order: bool = False

    @property
    def groups(self) -> int:
        """Stored scales per row."""
        return -(-self.width // self.group)

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    @property
    def spec(self) -> Spec | None:
        """The affine storage in memory; None if the values are decoded to float32."""
        if self.any_order:
            return None
        divided = (self.width,) if self.groups == 1 else (self.width, self.group)
        size = next((size for size in _MEMORY_GROUPS if not any(each % size for each in divided)), None)
        return None if size is None else AFFINE[self.bits, size]

    @property
    def name(self) -> str:
        """The storage in the file, such as int4-g128 or int8-row."""
        name = f"int{self.bits}-" + (
            "row" if self.group == self.width and self.group not in _USUAL_GROUPS else f"g{self.group}"
        )
        return f"{name}-act-order" if self.any_order else name

    @property
    def note(self) -> str:
        """What `show` says about values that are decoded; "" if they are not."""
        if self.spec is not None:
            return ""
        why = "reordered groups (act-order)" if self.any_order else f"groups of {self.group}"
        return f"{self.bits}-bit integers in {why} are decoded to float32 when loaded"

    def default_order(self) -> Array:
        """The group of each column, [K], where columns are in order."""
        return np.arange(self.width) // self.group


def find_layout(
    module: str,
    bits: int | None,
    groups: int,
    width: int,
    schemes: Sequence[Scheme],
    *,
    asymmetric: bool,
    any_order: bool = False,
) -> Layout:
    """The layout of a module by its shapes and what config.json says.

    bits: by the shapes; None if a byte holds each code, whatever its number of bits. groups: scales per row.
    schemes: those that may be the module's; one must fit, unless there is none. asymmetric: zero points are stored.
    Raises CheckpointError if the shapes are no layout, config.json disagrees, or nothing tells the size of the groups.
    """
    if bits is not None and bits not in AFFINE_BITS:
        raise CheckpointError(f"{module} has {bits} bits per weight; {_listed(AFFINE_BITS)} are supported")
    if not 0 < groups <= width:
        raise CheckpointError(f"{module} has {groups} scales for each row of {width} values; download it again")
    fitting = [scheme for scheme in schemes if _fits(scheme, bits, groups, width)]
    if schemes and not fitting:
        stored = "" if bits is None else f"{bits} bits and "
        raise CheckpointError(
            f"{module} has {stored}{groups} scales for each row of {width} values, but config.json's "
            f"quantization_config says {' or '.join(sorted({_described(scheme) for scheme in schemes})[:4])}: one of "
            "the two belongs to another checkpoint"
        )
    sizes = {width if each.group == ROW else min(each.group, width) for each in fitting if each.group is not None}
    if not sizes:
        exact = {width // groups} if width % groups == 0 else set()
        sizes = exact | {min(size, width) for size in _USUAL_GROUPS if -(-width // size) == groups}
    if len(sizes) != 1:
        raise CheckpointError(
            f"{module} has {groups} scales for each row of {width} values, which "
            + (f"may be groups of {_listed(sorted(sizes))}" if sizes else "are no groups")
            + "; config.json's quantization_config must say which group_size"
        )
    symmetric = not asymmetric or (bool(fitting) and all(scheme.symmetric is True for scheme in fitting))
    return Layout(bits or 8, width, sizes.pop(), symmetric, any_order)


def _fits(scheme: Scheme, bits: int | None, groups: int, width: int) -> bool:
    if None not in (bits, scheme.bits) and bits != scheme.bits:
        return False
    if scheme.group is None:
        return True
    return groups == (1 if scheme.group == ROW else -(-width // scheme.group) if scheme.group > 0 else 0)


def _described(scheme: Scheme) -> str:
    bits = "" if scheme.bits is None else f"{scheme.bits} bits"
    group = {None: "", ROW: "a scale per row"}.get(scheme.group, f"groups of {scheme.group}")
    return " in ".join(filter(None, (bits, group))) or "nothing"


def _listed(numbers: Iterable[int]) -> str:
    words = [str(number) for number in numbers]
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]


def integer_entry(block: Mapping[str, object], *keys: str) -> int | None:
    """The first of these entries of a JSON object that is there; None without any, or where it is null.

    Raises CheckpointError if it is not a small integer.
    """
    for key in keys:
        value = block.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > 1 << 30:
            raise CheckpointError(
                f"config.json's quantization_config has {key} {str(value)[:40]!r}, which is no size; take config.json "
                "from the checkpoint's source"
            )
        return value
    return None


@dataclass(frozen=True)
class Rows:
    """The readers of one module's arrays, by the module's name.

    codes: uint8 [N, K * bits / 8], lowest bits first. scale: a float dtype, [N, groups].
    zeros: uint8 or int16 [N, groups]; None for symmetric codes. It raises CheckpointError for what is not allowed.
    order: the group of each column, [K], checked to be in range; None where columns are in order.
    """

    codes: Callable[[str], Array]
    scale: Callable[[str], Array]
    zeros: Callable[[str], Array] | None = None
    order: Callable[[str], Array] | None = None


def integer_source(
    modules: Modules,
    param: Param,
    family: str,
    layout: Layout,
    expected: Sequence[ExpectedTensor],
    scales: str,
    headers: CheckpointHeaders,
    rows: Callable[[GetTensor], Rows],
    note: str = "",
) -> Source:
    """The Source of a matrix of integers.

    scales: the name of the first scale tensor. rows: makes the readers of modules. note: what else `show` should say.
    """
    spec = layout.spec

    def load(get: GetTensor, modules: Modules) -> Weight:
        readers = rows(get)
        if spec is None:
            return Dense(modules.gather(lambda name: _decode(layout, readers, name)))
        codes, scale = modules.gather(readers.codes), modules.gather(readers.scale)
        zeros = None if readers.zeros is None else modules.gather(readers.zeros)
        return _affine(layout, spec, codes, scale, zeros)

    dtype = headers.dtype(scales) if layout.symmetric else "F32"
    stored = sum(headers.tensors[each.name].nbytes for each in expected if each.name in headers.tensors)
    values = len(modules.names) * len(modules.names[0]) * modules.stored_rows(param) * layout.width
    wide = 4 if dtype == "F32" else 2
    return replace(
        modules_source(modules, family, spec, expected, load, dtype if spec else None),
        note="; ".join(filter(None, (layout.note, note))),
        memory_bits=32 if spec is None else spec.bits + 2 * 8 * wide / spec.group,
        stored_bits=8 * stored / values,
        stored_name="" if spec is not None and spec.group == layout.group else layout.name,
    )


def _affine(layout: Layout, spec: Spec, codes: Array, scale: Array, zeros: Array | None) -> Quantized:
    """codes [..., N, K * bits / 8]; scale and zeros [..., N, groups]"""
    if zeros is None:
        bias = quantization.symmetric_bias(scale, layout.middle)
    else:
        scale = scale.astype(np.float32)
        bias = np.negative(zeros, dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # Checkpoint.read refuses what is not finite
            bias *= scale
    if spec.group != layout.group:
        part = layout.default_order()[:: spec.group]
        scale, bias = scale[..., part], bias[..., part]
    return Quantized(spec, codes, scale, bias)


def _decode(layout: Layout, rows: Rows, module: str) -> Array:
    """float32 [N, K] of one module."""
    order = layout.default_order() if rows.order is None else rows.order(module)
    codes, scale = rows.codes(module), rows.scale(module).astype(np.float32)
    if not np.isfinite(scale).all():
        raise CheckpointError(
            f"{module} has a scale that is not a number; the checkpoint is damaged, download it again"
        )
    zeros = None if rows.zeros is None else rows.zeros(module).astype(np.float32)
    values = np.empty((len(codes), layout.width), np.float32)
    step = max(1, codecs.BLOCK_VALUES // layout.width)
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        out = values[part]
        out[...] = codecs.unpack(codes[part], layout.bits)
        out -= layout.middle if zeros is None else zeros[part][:, order]
        with np.errstate(over="ignore"):
            out *= scale[part][:, order]
        if not np.isfinite(out).all():
            raise CheckpointError(
                f"{module} has scales that no weights have; the checkpoint is damaged, download it again"
            )
    return values


def column_groups(stored: Array, layout: Layout, name: str) -> Array:
    """`g_idx`, [K], as indices. Raises CheckpointError if one is out of range."""
    if stored.size and not 0 <= int(stored.min()) <= int(stored.max()) < layout.groups:
        raise CheckpointError(
            f"{name} names groups from {int(stored.min())} to {int(stored.max())}, but there are {layout.groups}; the "
            "checkpoint is damaged, download it again"
        )
    return stored.astype(np.intp)


def check_order(stored: Array, layout: Layout, name: str) -> None:
    """Raise CheckpointError unless `g_idx` [K] has the columns in order."""
    if not np.array_equal(stored, layout.default_order()):
        raise CheckpointError(
            f"{name} reorders groups (act-order), but config.json's desc_act is not true: take config.json from the "
            "checkpoint's source"
        )
