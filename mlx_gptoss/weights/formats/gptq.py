"""`gptq` and `awq`: the integer packings of GPTQModel, AutoGPTQ, AutoAWQ and AutoRound. Read only; autoround.py writes.

Each linear layer is its own module, INPUT-major. GPTQ: `.qweight` I32 [K * bits / 32, N], codes along K, lowest bits
first; `.scales` [groups, N]; `.qzeros` I32 [groups, N * bits / 32], zero points along N. GPTQ's version 1 (`gptq`,
`auto_gptq`) stores the zero point minus 1, version 2 (`gptq_v2`, `gptqmodel`) as it is. `.g_idx` I32 [K] has the group
of each column: k // group, or any with `desc_act` (act-order). AWQ: `.qweight` I32 [K, N / 8] and `.qzeros` I32
[groups, N / 8], eight 4-bit numbers along N in the order of _AWQ_ORDER, zero points as they are.

GPTQModel names experts `mlp.experts.7.gate_proj` since March 2026 and splits the interleaved rows of gate and up in
halves: its `gate_proj` is the first half of the rows, not the gate (Defuser's moe_experts_interface.py; 7.7.0 still
does). Before, it named them `mlp.experts.gate_up.7` and `mlp.experts.down.7`. AutoRound's `gate_proj` is the gate.

Sources: GPTQModel 7.7.0 (nn_modules/qlinear, utils/model.py), AutoRound 0.16.1 (auto_round_extension/torch,
export_to_awq/utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...errors import CheckpointError
from .. import codecs
from ..params import Param
from ..tensor import Array
from .base import CheckpointHeaders, Format, GetTensor, Recipe, Source, Unit
from .hf_layout import experts_prefix, fused_rows
from .integers import (
    Layout,
    Rows,
    Scheme,
    check_order,
    column_groups,
    find_layout,
    integer_entry,
    integer_source,
)
from .per_expert import (
    Modules,
    dense_experts_source,
    half_split_modules,
    is_per_expert,
    modules_of,
    quantization_config,
    same_float_dtype,
)

FAMILY = "gptq"
METHODS = ("gptq", "awq")  # quant_method in config.json; also the names of the families
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds each of eight numbers
_VERSION_1 = ("auto_round:auto_gptq", "auto_gptq", "gptq")
_VERSION_2 = ("auto_round:gptqmodel", "auto_round", "gptq_v2", "gptq_p")
_AWQ = ("auto_round:auto_awq", "auto_awq", "awq", "gemm")
_REFUSED = ("gemv", "gemv_fast", "llm-awq", "marlin", "bitblas")
_OLD_NAMES = ("gate_up_projs", "down_projs")
_GPTQMODEL = re.compile(r"gptqmodel:(\d{1,4})\.")
_HALF_SPLIT_UNTIL = 7  # GPTQModel's last major version that is known to split the rows in halves
_ADVICE = "use a checkpoint in the format gptq_v2, or the original one"

Packing = Literal["version 1", "version 2", "awq", "unknown"]


class Gptq(Format):
    family = FAMILY
    writes = False
    recipes: Mapping[str, Recipe] = {}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        method = quantization_config(headers).get("quant_method")
        if method not in METHODS:
            return None
        source = find_packed(param, headers, lambda layout: str(method))
        modules = _modules(param, headers) if source is None and param.role == "experts" else None
        return (
            dense_experts_source(modules, "weight" if param.is_matrix else "bias", param, headers)
            if modules
            else source
        )

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        raise CheckpointError("gptq and awq are read but not written; convert to int4-autoround, or to another format")

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        raise CheckpointError("gptq and awq are read but not written; convert to int4-autoround, or to another format")


def find_packed(param: Param, headers: CheckpointHeaders, family: Callable[[Layout], str]) -> Source | None:
    """The Source of a parameter in modules with `.qweight`, or of the biases beside; None if it is elsewhere.

    family: the name of the family of matrices with a layout.
    """
    modules = _modules(param, headers)
    if modules is None or not headers.has(f"{modules.first}.qweight"):
        return None
    if param.is_matrix:
        return _packed_source(modules, param, headers, family)
    return dense_experts_source(modules, "bias", param, headers) if param.role == "experts" else None


def _modules(param: Param, headers: CheckpointHeaders) -> Modules | None:
    """The modules that hold a parameter's rows; None if experts are fused."""
    if param.role != "experts":
        return modules_of(param)
    _refuse_old_names(param, headers)
    prefix, part = experts_prefix(param), param.kind.split(".")[1]
    if headers.has(*(f"{prefix}gate_up.0.{suffix}" for suffix in ("qweight", "weight", "bias"))):
        name = "down" if part == "down" else "gate_up"
        count = min(param.shape[0], len(headers.tensors) + 1)  # config.json's number of experts is not trusted
        return Modules(tuple((f"{prefix}{name}.{expert}",) for expert in range(count)), fused_rows(part))
    if not is_per_expert(param, headers):
        return None
    return half_split_modules(param) if part != "down" and _is_half_split(headers) else modules_of(param)


def _refuse_old_names(param: Param, headers: CheckpointHeaders) -> None:
    """Raise CheckpointError for expert names of older uploads, whose order of gate and up rows is not documented."""
    prefix = experts_prefix(param)
    if headers.has(*(f"{prefix}{old}.0.{part}" for old in _OLD_NAMES for part in ("qweight", "weight", "bias"))):
        names = [name for name in headers.tensors if any(f".{old}." in name for old in _OLD_NAMES)]
        raise CheckpointError(
            f"{len(names)} tensors have names like {', '.join(names[:4])}. How these order gate and up is unknown, so "
            "they are not supported; use a checkpoint with mlp.experts.0.gate_proj, or the original one"
        )


def _is_half_split(headers: CheckpointHeaders) -> bool:
    """Whether `gate_proj` and `up_proj` are the two halves of the interleaved rows, by the tool that wrote them."""
    block = quantization_config(headers)
    if block.get("quant_method") not in METHODS:
        return False
    if "autoround_version" in block or block.get("provider") == "auto-round":
        return False
    version = _GPTQMODEL.search(_quantizer(block))
    if version is None or int(version[1]) > _HALF_SPLIT_UNTIL:
        raise CheckpointError(
            f"config.json's quantization_config has the meta.quantizer {_quantizer(block)[:80]!r}. Only the tool and "
            "its version (GPTQModel to 7, or AutoRound) tell whether gate_proj is the gate or half of gate and up; "
            "take config.json from the checkpoint's source, or use the original checkpoint"
        )
    return True


def _quantizer(block: Mapping[str, object]) -> str:
    """GPTQModel's `meta.quantizer`, such as "gptqmodel:7.7.0"; "" without one."""
    meta = block.get("meta")
    found = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = found if isinstance(found, list) else [found]
    return ", ".join(name for name in names if isinstance(name, str))


def _packed_source(
    modules: Modules, param: Param, headers: CheckpointHeaders, family: Callable[[Layout], str]
) -> Source:
    module, block = modules.first, quantization_config(headers)
    rows, width = modules.stored_rows(param), param.shape[-1]
    words = headers.shape(f"{module}.qweight")
    packing = _packing(module, words, rows, width, block)
    groups = headers.shape(f"{module}.scales")[:1]
    bits = 4 if packing == "awq" else _bits(module, words, rows, width, block)
    schemes = _schemes(module, block)
    may_be_asymmetric = packing == "awq" or any(scheme.symmetric is False for scheme in schemes)  # the tools' defaults
    reordered = packing != "awq" and block.get("desc_act") is True
    layout = find_layout(
        module, bits, groups[0] if groups else 0, width, _known(schemes),
        asymmetric=packing != "unknown" and may_be_asymmetric, any_order=reordered and headers.has(f"{module}.g_idx"),
    )  # fmt: skip
    if rows * bits % 32:
        raise CheckpointError(f"{module} has {rows} rows of {bits} bits, which do not fill whole words; {_ADVICE}")
    packed = (width, rows // 8) if packing == "awq" else (width * bits // 32, rows)
    scales = f"{module}.scales"
    expected = modules.expected("qweight", ("I32",), packed)
    expected += modules.expected("scales", same_float_dtype(headers, scales), (layout.groups, rows))
    expected += modules.expected("qzeros", ("I32",), (layout.groups, rows * bits // 32))
    has_order = packing != "awq" and headers.has(f"{module}.g_idx")
    if has_order or reordered:
        expected += modules.expected("g_idx", ("I32",), (width,))
    zeros = _Zeros(layout, packing, "gptqmodel:" in _quantizer(block))

    def readers(get: GetTensor) -> Rows:
        def codes(name: str) -> Array:
            stored = get(f"{name}.qweight")
            if has_order and not layout.any_order:
                check_order(get(f"{name}.g_idx"), layout, f"{name}.g_idx")
            if layout.symmetric:
                zeros.check(f"{name}.qzeros", get(f"{name}.qzeros"))
            if packing == "awq":
                return codecs.pack(codecs.contiguous_rows(_unpack_awq(stored).T), 4)
            return codecs.contiguous_rows(stored.T).view(np.uint8)

        def scale(name: str) -> Array:
            return codecs.contiguous_rows(get(f"{name}.scales").T)

        def zero_points(name: str) -> Array:
            points: Array = zeros.read(f"{name}.qzeros", get(f"{name}.qzeros")).T
            return points

        def order(name: str) -> Array:
            return column_groups(get(f"{name}.g_idx"), layout, f"{name}.g_idx")

        return Rows(codes, scale, None if layout.symmetric else zero_points, order if layout.any_order else None)

    return integer_source(modules, param, family(layout), layout, expected, scales, headers, readers)


def _packing(module: str, words: tuple[int, ...], rows: int, width: int, block: Mapping[str, object]) -> Packing:
    """The packing that config.json names, or "unknown". Raises CheckpointError for another, or if the shapes differ."""
    method = block.get("quant_method")
    keys = ("packing_format",) if method not in METHODS else ("packing_format", "checkpoint_format", "format")
    names = [str(block[key]) for key in (*keys, "version") if isinstance(block.get(key), str)]
    name = (names or [str(block.get("checkpoint_format") or method)])[0]
    by_shape = words == (width, rows // 8)
    if (refused := next((each for each in names if each in _REFUSED), None)) is not None:
        raise CheckpointError(f"{module} is in the packing {refused}, which is not supported: {_ADVICE}")
    for key in ("rotation", "rotation_config"):
        if block.get(key):
            raise CheckpointError(f"config.json's {key} rotates activations, which is not supported: {_ADVICE}")
    if (by_awq := name in _AWQ or method == "awq") != by_shape and (by_shape or len(words) == 2):
        said, found = ("AWQ", "another") if by_awq else (f"{name}", "AWQ")
        raise CheckpointError(
            f"{module}.qweight {list(words)} has {found} packing, but config.json's quantization_config says {said}: "
            "one of the two belongs to another checkpoint"
        )
    if by_awq:
        return "awq"
    return "version 1" if name in _VERSION_1 else "version 2" if name in _VERSION_2 else "unknown"


def _bits(module: str, words: tuple[int, ...], rows: int, width: int, block: Mapping[str, object]) -> int:
    """Bits per code by the shape of `.qweight`. Raises CheckpointError if it has none, or for a planar packing."""
    if len(words) != 2 or words[1] != rows or words[0] * 32 % width or not words[0]:
        raise CheckpointError(
            f"{module}.qweight is of a wrong shape: {list(words)} holds no [{width}, {rows}] codes of whole bits"
        )
    bits = words[0] * 32 // width
    formats = (block.get("checkpoint_format"), block.get("format"))
    if (bits in (5, 6, 7) and block.get("quant_method") == "gptq") or (bits not in (2, 4, 8) and "gptq_p" in formats):
        raise CheckpointError(f"{module} has {bits} bits in bit planes (gptq_p), which is not supported: {_ADVICE}")
    return bits


def _schemes(module: str, block: Mapping[str, object]) -> list[Scheme]:
    """What config.json may say about a module: its own entry, or the default and every entry whose name is a pattern.

    Patterns are regular expressions in a file that is not trusted, so they are not run: the shapes decide among them.
    """
    default, entries = _scheme(block, Scheme()), _entries(block)
    if module in entries:
        return [_scheme(entries[module], default)]
    patterns = [_scheme(entry, default) for name, entry in entries.items() if not re.fullmatch(r"[\w.]+", name)]
    return [default, *patterns]


def _entries(block: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    """The entries of modules whose scheme is not the default, by name or pattern: AutoRound's and GPTQModel's."""
    entries: dict[str, Mapping[str, object]] = {}
    for key in ("extra_config", "dynamic"):
        found = block.get(key)
        if isinstance(found, Mapping):
            entries |= {str(name): entry for name, entry in found.items() if isinstance(entry, Mapping)}
    return entries


def has_mixed_bits(block: Mapping[str, object]) -> bool:
    """Whether config.json quantizes some modules in a scheme of their own."""
    schemes = [_scheme(entry, Scheme()) for entry in _entries(block).values()]
    return any(scheme.bits is not None and scheme.bits <= 8 for scheme in schemes)


def _known(schemes: Sequence[Scheme]) -> list[Scheme]:
    """The schemes, once each; none if one of them says nothing, because then anything fits."""
    if any(scheme.bits is None and scheme.group is None for scheme in schemes):
        return []
    return list(dict.fromkeys(schemes))


def _scheme(entry: Mapping[str, object], default: Scheme) -> Scheme:
    bits, group, symmetric = (
        integer_entry(entry, "bits", "w_bit"), integer_entry(entry, "group_size", "q_group_size"), entry.get("sym")
    )  # fmt: skip
    return Scheme(
        default.bits if bits is None else bits,
        default.group if group is None else group,
        symmetric if isinstance(symmetric, bool) else default.symmetric,
    )


@dataclass(frozen=True)
class _Zeros:
    """The zero points of a layout, [groups, N] in words along N.

    by_gptqmodel: GPTQModel wrote them. Its version 1 subtracts 1 from each zero point of a word at once, with a borrow
        from the next where one is 0; adding it back to the word undoes that.
    """

    layout: Layout
    packing: Packing
    by_gptqmodel: bool

    def read(self, name: str, words: Array) -> Array:
        """uint8 [groups, N]. Raises CheckpointError for a stored zero point that tools read differently."""
        bits = self.layout.bits
        if self.packing == "awq":
            return _unpack_awq(words)
        stored = codecs.unpack(np.ascontiguousarray(words).view(np.uint8), bits)
        if self.packing == "version 2":
            return stored
        if not (stored == (1 << bits) - 1).any():
            points: Array = stored + np.uint8(1)
            return points
        if not self.by_gptqmodel or 32 % bits:
            raise CheckpointError(
                f"{name} stores a zero point as {(1 << bits) - 1}, which in version 1 of GPTQ some tools read as 0 and "
                f"others read as {1 << bits}; {_ADVICE}"
            )
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
        added: Array = codecs.unpack((np.ascontiguousarray(words).view(np.uint32) + ones).view(np.uint8), bits)
        return added

    def check(self, name: str, words: Array) -> None:
        """Raise CheckpointError unless every zero point is in the middle of the codes."""
        middle = self.layout.middle
        allowed = {"version 1": (middle - 1,), "unknown": (middle - 1, middle)}.get(self.packing, (middle,))
        stored = codecs.unpack(np.ascontiguousarray(words).view(np.uint8), self.layout.bits)
        if not any(bool((stored == zero).all()) for zero in allowed):
            raise CheckpointError(
                f"{name} is not {' or '.join(map(str, allowed))} throughout, so the zero point is not {middle}: the "
                "checkpoint is asymmetric and config.json's sym is not false, or config.json gives no or the wrong "
                f"packing_format; take config.json from the checkpoint's source, {_ADVICE}"
            )


def _unpack_awq(words: Array) -> Array:
    """uint8 [n, 8 * m] of I32 [n, m]."""
    nibbles = codecs.unpack(np.ascontiguousarray(words).view(np.uint8), 4)
    found: Array = nibbles.reshape(len(words), -1, 8)[..., _AWQ_ORDER].reshape(len(words), -1)
    return found


FORMAT = Gptq()
