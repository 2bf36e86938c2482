"""compressed-tensors checkpoints that cannot be read are refused with the tensor's name and the reason."""

from __future__ import annotations

import re

import pytest
import torch

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint

Q = "model.layers.0.self_attn.q_proj"
GATE = "model.layers.0.mlp.experts.{}.gate_proj"


def remove(name):
    return lambda tensors: tensors.pop(name)


def replace(name, change):
    """change: returns the new tensor; its argument is the stored one, or None."""
    return lambda tensors: tensors.update({name: change(tensors.get(name))})


def as_integers(tensors):
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name.removesuffix("_scale")] = tensors[name.removesuffix("_scale")].view(torch.int8)


def as_packed_integers(tensors):
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        weight = tensors.pop(name.removesuffix("_scale"))
        rows, width = weight.shape
        tensors[name.replace("weight_scale", "weight_packed")] = torch.zeros(rows, width // 8, dtype=torch.int32)
        tensors[name.replace("weight_scale", "weight_shape")] = torch.tensor([rows, width])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove(f"{Q}.weight_scale"), f"missing: {Q}.weight_scale"),
        (remove(GATE.format(4) + ".weight"), f"missing: {GATE.format(4)}.weight"),
        (remove(GATE.format(5) + ".bias"), f"missing: {GATE.format(5)}.bias"),
        (replace(f"{Q}.weight_scale", lambda scale: scale[:, 0]), "wrong shape: .*q_proj.weight_scale"),
        (replace(f"{Q}.weight_scale", lambda scale: torch.ones(3, 3)), "of a wrong shape"),
        (replace(f"{Q}.weight_zero_point", lambda none: torch.zeros(256, 1)), "unknown: .*weight_zero_point"),
        (replace(GATE.format(6) + ".bias", lambda none: torch.zeros(64)), "unknown: .*experts.6.gate_proj.bias"),
        (replace(GATE.format(2) + ".weight", lambda weight: weight.float()), "wrong dtype: .*2.gate_proj.weight F32"),
        (replace(GATE.format(3) + ".weight_scale", lambda scale: scale.float()), "wrong dtype: .*weight_scale F32"),
        (as_integers, "holds integers, but"),
        (as_packed_integers, "holds integers, but"),
    ],
)
def test_other_layouts_are_refused_with_the_reason(change, message, edited):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(edited("fp8-dynamic", change))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(value, edited):
    def break_one(tensors):
        tensors[GATE.format(3) + ".weight_scale"][5] = value

    opened = checkpoint.open(edited("fp8-dynamic", break_one))
    with pytest.raises(CheckpointError, match=re.escape("layers.0.experts.gate.weight")):
        opened.read("layers.0.experts.gate.weight")


def test_more_experts_than_tensors_is_one_error(edited):
    folder = edited("fp8-dynamic", config=lambda settings: settings.update(num_local_experts=16_000_000))
    with pytest.raises(CheckpointError, match="16000000 experts"):
        checkpoint.open(folder)
