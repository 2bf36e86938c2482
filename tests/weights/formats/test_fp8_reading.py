"""Every FP8 layout of compressed-tensors is read as an independent decoding reads it, and run as stored."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy

from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.tensor import FP8_ROW, Dense, Quantized

LAYOUTS = {  # fixture -> the fixture whose reference logits it has
    "fp8-dynamic": "fp8-dynamic",
    "fp8-half-split": "fp8-dynamic",
    "fp8-doubled-names": "fp8-dynamic",
    "fp8-attention-only": "fp8-attention-only",
}
EXPERTS = 6
FUSED = ["gate", "up"]  # interleaved row by row
Q = "model.layers.0.self_attn.q_proj"
GATE = "model.layers.0.mlp.experts.{}.gate_proj"


def with_version(text: object):
    """A change of config.json."""
    return lambda settings: settings["quantization_config"].update(version=text)


def without_quantization_config(settings):
    del settings["quantization_config"]


def decoded(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    scale = tensors.get(f"{module}.weight_scale", torch.tensor(1.0))
    return tensors[f"{module}.weight"].float() * scale.float()


def decoded_experts(tensors: dict[str, torch.Tensor], layout: str, layer: int, part: str, kind: str) -> torch.Tensor:
    """The weights or biases of all experts, decoded without the code under test, rows ordered as the layout says."""
    prefix = f"model.layers.{layer}.mlp.experts."
    if layout == "fp8-attention-only":
        name = prefix + ("down_proj" if part == "down" else "gate_up_proj") + ("_bias" if kind == "bias" else "")
        rows = tensors[name].float() if kind == "bias" else tensors[name].float().mT
        return rows if part == "down" else rows[:, FUSED.index(part) :: 2]
    prefix += "experts." if layout == "fp8-doubled-names" else ""

    def one(expert: int, part: str) -> torch.Tensor:
        module = f"{prefix}{expert}.{part}_proj"
        return decoded(tensors, module) if kind == "weight" else tensors[f"{module}.bias"].float()

    if layout == "fp8-half-split" and part != "down":
        both = [torch.cat([one(expert, "gate"), one(expert, "up")]) for expert in range(EXPERTS)]
        return torch.stack([rows[FUSED.index(part) :: 2] for rows in both])
    return torch.stack([one(expert, part) for expert in range(EXPERTS)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_runs_as_stored(layout, checkpoint_path, relative_error):
    reference = load_numpy(checkpoint_path(LAYOUTS[layout] + ".reference.safetensors"))
    opened = checkpoint.open(checkpoint_path(layout))
    runner = backend.load(opened, device="cpu", dtype="float32", limits=Limits(1, 200, 64))
    assert relative_error(runner.logits(reference["prompt"].tolist()), reference["logits"]) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_decodes_exactly(layout, checkpoint_path, load_tensors):
    opened, tensors = checkpoint.open(checkpoint_path(layout)), load_tensors(checkpoint_path(layout))
    assert opened.format == "fp8-dynamic"
    for param in opened.params:
        got = codecs.dequantize(opened.read(param.name))
        if param.role == "experts":
            part, kind = param.name.split(".")[3:]
            expected = decoded_experts(tensors, layout, param.layer, part, kind)
        elif param.role == "attention":
            part, kind = param.name.split(".")[3:]
            module = f"model.layers.{param.layer}.self_attn.{part}_proj"
            expected = decoded(tensors, module) if kind == "weight" else tensors[f"{module}.bias"].float()
        else:
            continue
        assert got.shape == param.shape
        assert np.array_equal(got, expected.numpy()), param.name


def test_codes_and_scales_are_kept(checkpoint_path, load_tensors):
    opened, tensors = checkpoint.open(checkpoint_path("fp8-dynamic")), load_tensors(checkpoint_path("fp8-dynamic"))
    weight = opened.read("layers.1.experts.down.weight")
    assert isinstance(weight, Quantized)
    assert weight.spec == FP8_ROW
    assert weight.scale is None
    for expert in range(EXPERTS):
        module = f"model.layers.1.mlp.experts.{expert}.down_proj"
        assert np.array_equal(weight.codes[expert], tensors[f"{module}.weight"].view(torch.uint8).numpy())
        scale = tensors[f"{module}.weight_scale"].float().numpy()
        assert np.array_equal(weight.outer[expert].astype(np.float32), scale)


def test_summary_by_role(checkpoint_path):
    roles = checkpoint.open(checkpoint_path("fp8-dynamic")).summary().roles
    assert roles["experts"]["format"] == roles["attention"]["format"] == "fp8"
    assert roles["router"]["format"] == "bf16"
    rows, values = 256 + 128 + 128 + 192, (256 + 128 + 128) * 192 + 192 * 256
    assert roles["attention"]["bits"] == pytest.approx(8 + 16 * rows / values)


@pytest.mark.parametrize(
    ("text", "half_split"),
    [(text, True) for text in ("0.17.1", "0.17.1.a20260701", "0.18", "0.18.4.dev3+g1")]
    + [(text, False) for text in ("0.19.0", "0.19", "0.17.0", "0.16.0", "1.0.0")],
)
def test_the_version_tells_half_split_from_gate_and_up(text, half_split, edited, decode, checkpoint_path):
    up = decode(checkpoint_path("fp8-dynamic"), "layers.0.experts.up.weight")
    got = decode(edited("fp8-half-split", config=with_version(text)), "layers.0.experts.up.weight")
    assert np.array_equal(got, up) == half_split


@pytest.mark.parametrize("text", [None, "", "latest", 0.19, "9" * 5000])
def test_an_unknown_version_is_refused(text, edited):
    with pytest.raises(CheckpointError, match="version"):
        checkpoint.open(edited("fp8-dynamic", config=with_version(text)))


def test_a_missing_quantization_config_is_refused_as_the_row_order_is_unknown(edited):
    with pytest.raises(CheckpointError, match=re.escape("take config.json from the checkpoint's source")):
        checkpoint.open(edited("fp8-dynamic", config=without_quantization_config))


def test_doubled_names_need_no_version(edited):
    assert checkpoint.open(edited("fp8-doubled-names", config=without_quantization_config)).format == "fp8-dynamic"


@pytest.mark.parametrize("layout", ["fp8-dynamic", "fp8-half-split"])
def test_modules_may_be_dense(layout, edited, checkpoint_path):
    """The experts of one layer and one attention matrix are bfloat16, with the layout's own names and row order."""

    def dequantize_some(tensors):
        for name in [n for n in tensors if n.startswith(("model.layers.1.mlp.experts", f"{Q}."))]:
            if name.endswith(".weight"):
                tensors[name] = decoded(tensors, name.removesuffix(".weight")).bfloat16()
                del tensors[f"{name}_scale"]

    opened = checkpoint.open(edited(layout, dequantize_some))
    assert opened.format == "fp8-dynamic"
    assert opened.summary().roles["experts"]["format"] == "bf16+fp8"
    original = checkpoint.open(checkpoint_path(layout))
    for name in ("layers.1.experts.gate.weight", "layers.1.experts.down.weight", "layers.0.attention.q.weight"):
        got = opened.read(name)
        assert isinstance(got, Dense)
        rounded = torch.from_numpy(codecs.dequantize(original.read(name))).bfloat16().float()
        assert np.array_equal(codecs.dequantize(got), rounded.numpy())
    assert isinstance(opened.read("layers.0.experts.gate.weight"), Quantized)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_for_a_whole_matrix(shape, edited, decode, load_tensors):
    """Static FP8, whose activation scales are accepted and not used."""

    def flatten(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = tensors[name].float().max().reshape(shape)
            tensors[name.replace("weight_scale", "input_scale")] = torch.ones(shape)

    folder = edited("fp8-dynamic", flatten)
    tensors = load_tensors(folder)
    assert np.array_equal(decode(folder, "layers.0.attention.q.weight"), decoded(tensors, Q).numpy())
    expected = torch.stack([decoded(tensors, GATE.format(expert)) for expert in range(EXPERTS)])
    assert np.array_equal(decode(folder, "layers.0.experts.gate.weight"), expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_of_another_dtype_are_kept(dtype, edited, decode, load_tensors, tensor_bytes, tmp_path):
    """Scales that bfloat16 cannot hold are read exactly, and written back unchanged."""

    def widen(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            noise = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(len(name)))
            tensors[name] = (tensors[name].float() * (1 + noise / 100)).to(dtype)

    folder = edited("fp8-dynamic", widen)
    tensors = load_tensors(folder)
    expected = torch.stack([decoded(tensors, GATE.format(expert)) for expert in range(EXPERTS)])
    assert np.array_equal(decode(folder, "layers.0.experts.gate.weight"), expected.numpy())
    convert(folder, tmp_path / "out", "fp8-dynamic")
    assert tensor_bytes(load_tensors(tmp_path / "out")) == tensor_bytes(tensors)


def test_reading_releases_the_pages_of_copied_tensors(checkpoint_path, monkeypatch):
    """A parameter assembled from many tensors must not keep the file's pages resident as well as its copy."""
    opened = checkpoint.open(checkpoint_path("fp8-dynamic"))
    released = []
    for file in opened._files:
        monkeypatch.setattr(file, "release", lambda start, stop: released.append(stop - start))
    weight = opened.read("layers.0.experts.down.weight")
    assert sum(released) == weight.codes.nbytes + weight.outer.nbytes
    opened.read("layers.0.attention.q.weight")  # views of the file, whose pages must stay
    assert sum(released) == weight.codes.nbytes + weight.outer.nbytes
