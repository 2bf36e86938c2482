"""ModelOpt's NVFP4 is read as an independent decoding reads it, and run as stored; anything else is refused by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.tensor import NVFP4, Dense, Quantized

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
ATTENTION = "model.layers.{}.self_attn.{}_proj"
EXPERTS = "model.layers.{}.mlp.experts.{}_proj"


def decoded(codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """[..., N, K / 2] and [..., N, K / 16] -> float32 [..., N, K]"""
    values = E2M1[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()]
    return values * (scale.float() * scale_2).repeat_interleave(16, dim=-1)


def decoded_layer(tensors: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """The quantized weights of a layer by canonical name, decoded without the code under test."""
    weights = {}
    for part in "qkvo":
        name = ATTENTION.format(layer, part)
        scales = tensors[f"{name}.weight_scale"], tensors[f"{name}.weight_scale_2"]
        weights[f"layers.{layer}.attention.{part}.weight"] = decoded(tensors[f"{name}.weight"], *scales)
    for part in ("gate_up", "down"):
        name = EXPERTS.format(layer, part)
        codes, scale = tensors[name].transpose(1, 2), tensors[f"{name}_weight_scale"].transpose(1, 2)
        weight = decoded(codes, scale, tensors[f"{name}_weight_scale_2"])
        parts = {"gate": weight[:, 0::2], "up": weight[:, 1::2]} if part == "gate_up" else {"down": weight}
        weights |= {f"layers.{layer}.experts.{name}.weight": rows for name, rows in parts.items()}
    return weights


def test_reads_what_the_bytes_say(mini):
    opened, tensors = checkpoint.open(mini / "nvfp4"), load_file(mini / "nvfp4" / "model.safetensors")
    assert opened.format == "nvfp4" and opened.summary().note == ""
    for layer in (0, 1):
        for name, expected in decoded_layer(tensors, layer).items():
            weight = opened.read(name)
            assert isinstance(weight, Quantized) and weight.spec == NVFP4 and weight.outer is not None, name
            # The one formula for all formats multiplies by the second scale last, which rounds float32 once more.
            np.testing.assert_allclose(codecs.dequantize(weight), expected.numpy(), rtol=2e-7, atol=0, err_msg=name)


def test_codes_are_read_without_copying(mini):
    weight = checkpoint.open(mini / "nvfp4").read("layers.0.experts.gate.weight")
    assert isinstance(weight, Quantized) and not weight.codes.flags.owndata and not weight.codes.flags.c_contiguous


@pytest.mark.parametrize("name, reference", [("nvfp4", "nvfp4.reference"), ("nvfp4-bf16", "reference")])
def test_runs_as_stored(mini, relative_error, name, reference):
    expected = load_numpy(mini / f"{reference}.safetensors")
    runner = backend.load(checkpoint.open(mini / name), device="cpu", dtype="float32", limits=Limits(1, 200, 64))
    got = runner.logits(expected["prompt"].tolist())
    assert relative_error(got, expected["logits"]) < 2e-5
    assert np.abs(got - expected["logits"]).max() < 1e-4


def test_each_expert_may_have_its_own_second_scale(mini, edited):
    factors = torch.tensor([1.0, 2, 0.5, 1, 4, 1])
    name = EXPERTS.format(0, "gate_up")

    def split(tensors):
        tensors[f"{name}_weight_scale_2"] = tensors[f"{name}_weight_scale_2"] * factors

    before, after = checkpoint.open(mini / "nvfp4"), checkpoint.open(edited("nvfp4", split))
    for part in ("gate", "up"):
        weight = after.read(f"layers.0.experts.{part}.weight")
        assert weight.outer.shape == (6, 1, 1)
        one = codecs.dequantize(before.read(f"layers.0.experts.{part}.weight"))
        np.testing.assert_array_equal(codecs.dequantize(weight), one * factors.numpy()[:, None, None])


def test_modules_may_be_bfloat16_and_input_scales_absent(mini, edited):
    dense = load_file(mini / "nvfp4-bf16" / "model.safetensors")

    def mix(tensors):
        for name in list(tensors):
            if "input_scale" in name or ("self_attn" in name and "scale" in name):
                del tensors[name]
        for part in "qkvo":
            for layer in (0, 1):
                name = ATTENTION.format(layer, part) + ".weight"
                tensors[name] = dense[name]
        tensors[EXPERTS.format(1, "down")] = dense[EXPERTS.format(1, "down")]
        del tensors[EXPERTS.format(1, "down") + "_weight_scale"], tensors[EXPERTS.format(1, "down") + "_weight_scale_2"]

    opened = checkpoint.open(edited("nvfp4", mix))
    assert opened.format == "nvfp4"
    assert opened.summary().roles["attention"]["format"] == "bf16"
    assert opened.summary().roles["experts"]["format"] == "bf16+nvfp4"
    weight = opened.read("layers.1.experts.down.weight")
    assert isinstance(weight, Dense)
    expected = dense[EXPERTS.format(1, "down")].transpose(1, 2).float().numpy()
    np.testing.assert_array_equal(codecs.dequantize(weight), expected)


def test_scales_of_an_8_bit_cache_are_accepted(edited):
    def add(tensors):
        for layer in (0, 1):
            tensors[ATTENTION.format(layer, "k") + ".k_scale"] = torch.tensor(1.0)
            tensors[ATTENTION.format(layer, "v") + ".v_scale"] = torch.tensor(1.0)

    assert checkpoint.open(edited("nvfp4", add)).format == "nvfp4"


def test_a_scale_of_zero_makes_zeros(edited, decode):
    name = EXPERTS.format(0, "down")

    def zero_one_scale(tensors):
        scale = tensors[f"{name}_weight_scale"].view(torch.uint8)
        scale[2, 1, 7] = 0

    weight = decode(edited("nvfp4", zero_one_scale), "layers.0.experts.down.weight")
    assert not weight[2, 7, 16:32].any() and weight[2, 7, :16].any()


# Refusals


def test_a_scale_that_is_not_a_number_is_refused(edited):
    name = ATTENTION.format(1, "o")

    def damage(tensors):
        tensors[f"{name}.weight_scale"].view(torch.uint8)[3, 3] = 0x7F

    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.o\.weight has a scale that is not a number"):
        checkpoint.open(edited("nvfp4", damage)).read("layers.1.attention.o.weight")


@pytest.mark.parametrize("part, shape", [("gate_up", (6, 192, 8)), ("down", (6, 64, 12))])
def test_the_scales_of_modelopt_0_35_are_refused_with_the_reason(edited, part, shape):
    def along_the_outputs(tensors):
        tensors[EXPERTS.format(0, part) + "_weight_scale"] = torch.zeros(shape, dtype=torch.float8_e4m3fn)

    with pytest.raises(CheckpointError, match=r"ModelOpt 0\.35 .* wrong axis, .* 0\.37"):
        checkpoint.open(edited("nvfp4", along_the_outputs))


@pytest.mark.parametrize("name", [ATTENTION.format(0, "q") + ".pre_quant_scale", EXPERTS.format(1, "down") + "_extra"])
def test_unknown_tensors_are_refused(edited, name):
    with pytest.raises(CheckpointError, match=f"1 unknown: {name}"):
        checkpoint.open(edited("nvfp4", lambda tensors: tensors.update({name: torch.zeros(())})))


# Fake-quantized checkpoints


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def test_a_fake_quantized_checkpoint_reads_as_bf16_with_a_note(mini):
    opened = checkpoint.open(mini / "nvfp4-bf16")
    assert opened.format == "bf16"
    assert "fake-quantized NVFP4" in opened.summary().note


def test_the_pickle_beside_a_fake_quantized_checkpoint_is_not_opened(edited, tmp_path):
    def without_amax(tensors):
        for name in [name for name in tensors if name.endswith("_amax")]:
            del tensors[name]

    folder = edited("nvfp4-bf16", without_amax)
    assert checkpoint.open(folder).summary().note == ""
    proof = tmp_path / "opened"
    (folder / "modelopt_state.pth").write_bytes(pickle.dumps(Trap(proof)))
    opened = checkpoint.open(folder)
    assert opened.format == "bf16" and "fake-quantized NVFP4" in opened.summary().note
    convert(folder, tmp_path / "real", "nvfp4")
    assert not proof.exists() and not (tmp_path / "real" / "modelopt_state.pth").exists()
