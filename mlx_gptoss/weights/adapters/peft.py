"""PEFT's adapters: adapter_model.safetensors. Source: peft/tuners/lora/layer.py, Linear and ParamWrapper.

A linear layer has lora_A [R, K] and lora_B [N, R]. Experts come in three forms:
- parameters (target_parameters), whose factors of all experts are stacked: lora_A [E * R, in], expert by expert, and
  lora_B [out, E * R] with the expert's index fastest. Two targets of one module nest: one of them is the other's
  `base_layer`. Which one is gate_up is told by the shapes, not by the order.
- a linear layer per expert, gate_up_projs.E and down_projs.E (Unsloth with bitsandbytes).
- a linear layer per expert and projection, E.gate_proj, E.up_proj and E.down_proj (unfused).

gpt-oss has its expert parameters as [E, in, out]. PEFT takes them so where transformers says is_transposed ("plain"),
and as [E, out, in] where it does not ("swapped"): `in` and `out` of the factors are then exchanged. gate_up's rows are
interleaved: gate, up, gate, up.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np

from ...errors import CheckpointError
from ..tensor import Array
from .factors import Entry
from .files import AdapterFiles, checked_rank
from .peft_config import Scales

NAME = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?layers\.(?P<layer>\d{1,4})\.(?P<module>[\w.]{1,80})"
    r"\.lora_(?P<half>[AB])(?:\.default)?\.weight",
    re.ASCII,
)
LINEAR = {
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "mlp.router": "router",
}
PARAMETERS = re.compile(r"mlp\.experts((?:\.base_layer){0,3})", re.ASCII)
FUSED_EXPERT = re.compile(r"mlp\.experts\.(gate_up|down)_projs\.(\d{1,4})", re.ASCII)
UNFUSED_EXPERT = re.compile(r"mlp\.experts\.(\d{1,4})\.(gate|up|down)_proj", re.ASCII)
PLAIN, SWAPPED = "plain", "swapped"

Pair = tuple[str, str]  # the names of A and B


def entries_of(files: AdapterFiles) -> dict[str, Entry]:
    """The entries by parameter. Raises CheckpointError."""
    scales = Scales(files.config, files.folder)
    entries: dict[str, Entry] = {}
    parameters: dict[int, list[Pair]] = defaultdict(list)
    per_expert: dict[str, dict[int, tuple[Pair, str]]] = defaultdict(dict)
    for (layer, module), pair in _pairs(files).items():
        prefix, full = f"layers.{layer}", f"model.layers.{layer}.{module}"
        if kind := LINEAR.get(module):
            shape = files.shape(pair[0])
            scale = scales.of(f"{full}.weight" if kind == "router" else full, shape[0] if shape else 0, pair[0])
            entries[f"{prefix}.{kind}"] = files.linear(f"{prefix}.{kind}", pair, scale)
        elif PARAMETERS.fullmatch(module):
            parameters[layer].append(pair)
        elif match := FUSED_EXPERT.fullmatch(module):
            per_expert[f"{prefix}.experts.{match[1]}"][int(match[2])] = (pair, full)
        elif match := UNFUSED_EXPERT.fullmatch(module):
            per_expert[f"{prefix}.experts.{match[2]}"][int(match[1])] = (pair, full)
        else:
            raise CheckpointError(
                f"{files.folder} trains {module!r:.100}, which is neither attention, router nor experts; train without"
            )
    for name, banks in per_expert.items():
        entries.update(_bank(files, name, banks, scales))
    entries.update(_all_parameters(files, parameters, scales))
    return entries


def _pairs(files: AdapterFiles) -> dict[tuple[int, str], Pair]:
    """The names of A and B by layer and module. Raises CheckpointError for other tensors, and for half a pair."""
    halves: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    for tensor in files.file.header.tensors:
        match = NAME.fullmatch(tensor)
        if match is None:
            raise CheckpointError(
                f"{files.folder} has {tensor!r:.200}, which is no LoRA of a layer of gpt-oss; train only attention, "
                "router and experts"
            )
        found = halves[int(match["layer"]), match["module"]]
        if match["half"] in found:
            raise CheckpointError(f"{files.folder} has {tensor!r:.200} twice, by two names; save the adapter again")
        found[match["half"]] = tensor
    for tensors in halves.values():
        if set(tensors) != {"A", "B"}:
            raise CheckpointError(f"{files.folder} has only one half of {next(iter(tensors.values()))!r:.200}")
    return {key: (tensors["A"], tensors["B"]) for key, tensors in halves.items()}


# Experts as parameters.


def _all_parameters(files: AdapterFiles, found: Mapping[int, list[Pair]], scales: Scales) -> dict[str, Entry]:
    fitting = {pair: _readings(files, layer, pair) for layer, pairs in found.items() for pair in pairs}
    layouts = {layout for readings in fitting.values() if len({r[1] for r in readings}) == 1 for _, layout in readings}
    given = files.config.get("expert_layout")
    if given not in (None, PLAIN, SWAPPED):
        raise CheckpointError(f"{files.folder}: expert_layout must be {PLAIN!r} or {SWAPPED!r}, not {given!r:.60}")
    if len(layouts) > 1 or (given and layouts and given not in layouts):
        raise CheckpointError(f"{files.folder} has experts in both layouts of PEFT; save the adapter again")
    layout = given or next(iter(layouts), None)
    entries: dict[str, Entry] = {}
    for layer, pairs in found.items():
        for pair in pairs:
            kinds = {kind for kind, each in fitting[pair] if each == layout}
            if layout is None or len(kinds) != 1:
                raise CheckpointError(
                    f'{files.folder}: the shapes of {pair[0]!r:.200} fit both of PEFT\'s layouts; add "expert_layout": '
                    f'"{PLAIN}" (trained with transformers 5) or "{SWAPPED}" to adapter_config.json'
                )
            made = _parameter(files, layer, kinds.pop(), layout, pair, scales)
            if twice := set(made) & set(entries):
                raise CheckpointError(f"{files.folder} has factors for {min(twice)} twice; save the adapter again")
            entries.update(made)
    return entries


def _readings(files: AdapterFiles, layer: int, pair: Pair) -> list[tuple[str, str]]:
    """The parameters, gate_up and down, and the layouts that the shapes of a pair allow. At least one."""
    a, b = (files.shape(tensor) for tensor in pair)
    down = files.param(f"layers.{layer}.experts.down", pair[0])
    experts, hidden, inner = down.shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % experts or not a[0]:
        raise files.misfit(pair[0], a, down)
    checked_rank(a[0] // experts, pair[0])
    sizes = {("gate_up", PLAIN): (hidden, 2 * inner), ("down", PLAIN): (inner, hidden)}
    sizes |= {(kind, SWAPPED): size[::-1] for (kind, _), size in list(sizes.items())}
    fitting = [reading for reading, size in sizes.items() if size == (a[1], b[0])]
    if not fitting:
        raise files.misfit(pair[0], a, down)
    return fitting


def _parameter(files: AdapterFiles, layer: int, kind: str, layout: str, pair: Pair, scales: Scales) -> dict[str, Entry]:
    down = files.param(f"layers.{layer}.experts.down", pair[0])
    experts, hidden, inner = down.shape
    rank = files.shape(pair[0])[0] // experts
    scale = scales.of(f"model.layers.{layer}.mlp.experts.{kind}_proj", rank, pair[0])

    def expert_major() -> Array:  # A as [E, R, in]
        values = files.get(pair[0])
        return values.reshape(experts, rank, values.shape[1])

    def expert_fastest() -> Array:  # B as [E, out, R]
        values = files.get(pair[1])
        major: Array = values.reshape(values.shape[0], rank, experts).transpose(2, 0, 1)
        return major

    read_a: Callable[[], Array] = expert_major
    read_b: Callable[[], Array] = expert_fastest
    if layout == SWAPPED:
        read_a = lambda: expert_fastest().swapaxes(1, 2)  # noqa: E731
        read_b = lambda: expert_major().swapaxes(1, 2)  # noqa: E731
    prefix = f"layers.{layer}.experts"
    if kind == "down":
        return {f"{prefix}.down": Entry(pair[0], rank, inner, hidden, experts, scale, read_a, read_b)}
    return _interleaved(prefix, Entry(pair[0], rank, hidden, 2 * inner, experts, scale, read_a, read_b))


def _interleaved(prefix: str, gate_up: Entry) -> dict[str, Entry]:
    """The entries of gate and up, whose rows of b alternate. They have a in common."""

    def half(first: int) -> Entry:
        return Entry(
            gate_up.source,
            gate_up.rank,
            gate_up.inputs,
            gate_up.outputs // 2,
            gate_up.experts,
            gate_up.scale,
            gate_up.read_a,
            lambda: gate_up.read_b()[:, first::2],
            gate_up.scales,
        )

    return {f"{prefix}.gate": half(0), f"{prefix}.up": half(1)}


# Experts as linear layers.


def _bank(files: AdapterFiles, name: str, banks: Mapping[int, tuple[Pair, str]], scales: Scales) -> dict[str, Entry]:
    """The entry of all experts from those of each; an expert without one gets zeros. Scales may differ between
    experts, so they are in b."""
    prefix, _, kind = name.rpartition(".")
    some = next(iter(banks.values()))[0]
    param = files.param(f"{prefix}.{'down' if kind == 'down' else 'gate'}", some[0])
    (experts, outputs, inputs), fused = param.shape, kind == "gate_up"
    outputs *= 1 + fused
    scale_of: dict[int, float] = {}
    rank = 1
    for expert, (pair, module) in banks.items():
        a, b = (files.shape(tensor) for tensor in pair)
        if expert >= experts or len(a) != 2 or a[1] != inputs:
            raise files.misfit(pair[0], a, param)
        if b != (outputs, checked_rank(a[0], pair[0])):
            raise files.misfit(pair[1], b, param)
        scale_of[expert] = scales.of(module, a[0], pair[0])
        rank = max(rank, a[0])

    def read_a() -> Array:
        values = np.zeros((experts, rank, inputs), np.float32)
        for expert, ((tensor, _), _) in banks.items():
            one = files.get(tensor)
            values[expert, : len(one)] = one
        return values

    def read_b() -> Array:
        values = np.zeros((experts, outputs, rank), np.float32)
        for expert, ((_, tensor), _) in banks.items():
            one = files.get(tensor).astype(np.float32)
            values[expert, :, : one.shape[1]] = one * np.float32(scale_of[expert])
        return values

    scales_found = tuple(sorted(set(scale_of.values())))
    entry = Entry(some[0], rank, inputs, outputs, experts, 1.0, read_a, read_b, scales_found)
    return _interleaved(prefix, entry) if fused else {f"{prefix}.{kind}": entry}
