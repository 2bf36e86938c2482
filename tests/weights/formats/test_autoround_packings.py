"""GPTQ packings of symmetric int4: equivalent ones read alike, and what config.json does not say is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint

SEVENS, EIGHTS = 0x77777777, -0x77777778  # eight nibbles of 7, and of 8, as a signed word
MODULE = "model.layers.0.mlp.experts.{}.gate_proj"
NAME = "layers.0.experts.gate.weight"


def unchanged(tensors_or_config):
    """No change to tensors or config.json."""


def with_g_idx(order=lambda width: torch.arange(width) // 64):
    def add(tensors):
        for name in [name for name in tensors if name.endswith("qweight")]:
            width = tensors[name].shape[0] * 8
            tensors[name.replace("qweight", "g_idx")] = order(width).int()

    return add


def with_zeros(word: int):
    def change(tensors):
        for name in [name for name in tensors if name.endswith("qzeros")]:
            tensors[name] = torch.full_like(tensors[name], word)

    return change


def both(*changes):
    return lambda tensors: [change(tensors) for change in changes]


def only(**entries):
    """A quantization_config with these entries alone."""
    return lambda settings: settings.update(quantization_config=entries)


def also(**entries):
    """AutoRound's quantization_config with these entries changed."""
    return lambda settings: settings["quantization_config"].update(entries)


def repacked(shape, **others):
    """One module with words of another shape, as for other bits, groups or packings."""

    def change(tensors):
        name = f"{MODULE.format(0)}.qweight"
        tensors[name] = torch.zeros(shape, dtype=torch.int32)
        for part, other in others.items():
            tensors[name.replace("qweight", part)] = torch.zeros(other, dtype=torch.float16)

    return change


def renamed(tensors):
    """The expert names of older uploads."""
    for name in [name for name in tensors if ".experts." in name]:
        old = re.sub(r"experts\.(\d)\.(gate|up|down)_proj", r"experts.\2_projs.\1", name)
        tensors[old.replace("gate_projs", "gate_up_projs")] = tensors.pop(name)


def without(part: str):
    return lambda tensors: tensors.pop(part)


def adding(part: str):
    return lambda tensors: tensors.update({part: torch.ones(1)})


def with_value(part: str, value: float):
    def change(tensors):
        tensors[f"{MODULE.format(3)}.{part}"][0, 1] = value

    return change


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (
            both(with_zeros(EIGHTS), with_g_idx()),
            only(quant_method="auto-round", packing_format="auto_round:gptqmodel"),
        ),
        (with_zeros(EIGHTS), only(quant_method="gptq", provider="auto-round", checkpoint_format="gptq_v2", sym=True)),
        (
            with_g_idx(),
            only(quant_method="gptq", provider="auto-round", bits=4, group_size=64, sym=True, desc_act=False),
        ),
        (with_g_idx(), only(quant_method="gptq", provider="auto-round", checkpoint_format="gptq", desc_act=True)),
        (with_zeros(EIGHTS), only()),
        (with_zeros(SEVENS), only()),
    ],
)
def test_equivalent_packings_read_alike(tensors, config, edited, decode, mini):
    got = decode(edited("int4-autoround", tensors, config), NAME)
    assert np.array_equal(got, decode(mini / "int4-autoround", NAME))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (unchanged, also(packing_format="auto_round:auto_awq"), "says AWQ"),
        (unchanged, only(quant_method="awq", provider="auto-round"), "says AWQ"),
        (repacked((192, 8)), unchanged, "has AWQ packing"),
        (repacked((48, 64)), unchanged, "has 8 bits and 3 scales .* says 4 bits in groups of 64"),
        (repacked((12, 64)), unchanged, "has 2 bits and 3 scales"),
        (repacked((18, 64)), unchanged, "has 3 bits and 3 scales"),
        (repacked((42, 64)), only(), "has 7 bits per weight"),
        (repacked((24, 64), scales=(6, 64)), unchanged, "6 scales for each row of 192"),
        (repacked((24, 64), scales=(1, 64)), unchanged, "1 scales for each row of 192"),
        (repacked((24, 64), scales=(2, 64)), unchanged, "2 scales for each row of 192"),
        (unchanged, only(quant_method="gptq"), "meta.quantizer"),
        (renamed, unchanged, r"names like .*_projs\.0"),
        (repacked((23, 64)), unchanged, "0.gate_proj.qweight is of a wrong shape"),
        (without(MODULE.format(2) + ".qzeros"), unchanged, "missing: .*2.gate_proj.qzeros"),
        (adding(MODULE.format(1) + ".extra"), unchanged, "unknown: .*gate_proj.extra"),
        (adding(MODULE.format(1) + ".g_idx"), unchanged, "unknown: .*gate_proj.g_idx"),
    ],
)
def test_other_layouts_are_refused_with_the_reason(tensors, config, message, edited):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(edited("int4-autoround", tensors, config))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (with_g_idx(lambda width: torch.arange(width).flip(0) // 64), unchanged, "act-order"),
        (with_zeros(EIGHTS), unchanged, "not 7 throughout"),
        (with_zeros(SEVENS), only(packing_format="auto_round:gptqmodel"), "not 8 throughout"),
        (with_zeros(0x66666666), only(), "asymmetric"),
        (with_value("qzeros", 0x77777787), unchanged, "asymmetric"),
        (with_value("scales", 60000.0), unchanged, "too large"),
        (with_value("scales", float("nan")), unchanged, "not a number"),
        (with_value("scales", float("-inf")), unchanged, "not a number"),
    ],
)
def test_unsupported_values_are_refused_with_the_reason(tensors, config, message, edited):
    opened = checkpoint.open(edited("int4-autoround", tensors, config))
    with pytest.raises(CheckpointError, match=message):
        opened.read(NAME)


def test_more_experts_than_tensors_is_one_error(edited):
    folder = edited("int4-autoround", config=lambda settings: settings.update(num_local_experts=16_000_000))
    with pytest.raises(CheckpointError, match="16000000 experts"):
        checkpoint.open(folder)
