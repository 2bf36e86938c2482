"""int4-autoround is read as an independent unpacking reads it, and run as stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy

from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.tensor import AFFINE4, Dense, Quantized

EXPERTS = 6
ZERO_WORD = 0x77777777  # eight stored zero points of 7


def unpacked(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """[N, K] by the format's own formula: code[8r + j, n] = (qweight[r, n] >> 4j) & 15, w = scale * (code - 8)."""
    words = tensors[f"{module}.qweight"].long()
    codes = (words[:, None, :] >> (4 * torch.arange(8))[None, :, None]) & 15
    codes = codes.reshape(-1, words.shape[1])
    scale = tensors[f"{module}.scales"].float().repeat_interleave(64, dim=0)
    return (scale * (codes - 8)).T


def unpacked_experts(tensors: dict[str, torch.Tensor], layer: int, part: str) -> np.ndarray:
    """[E, N, K]"""
    modules = [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj" for expert in range(EXPERTS)]
    return torch.stack([unpacked(tensors, module) for module in modules]).numpy()


def with_random_scales(dtype: torch.dtype):
    """Scales that use every bit of their dtype."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith("scales")]:
            noise = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(len(name)))
            tensors[name] = (tensors[name].float() * (1 + noise)).to(dtype)

    return change


def test_runs_as_stored(mini, relative_error):
    reference = load_numpy(mini / "int4-autoround.reference.safetensors")
    opened = checkpoint.open(mini / "int4-autoround")
    assert opened.format == "int4-autoround"
    runner = backend.load(opened, device="cpu", dtype="float32", limits=Limits(1, 200, 64))
    assert relative_error(runner.logits(reference["prompt"].tolist()), reference["logits"]) < 1e-4


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_decodes_exactly(part, mini, load_tensors):
    opened, tensors = checkpoint.open(mini / "int4-autoround"), load_tensors(mini / "int4-autoround")
    for layer in range(2):
        weight = opened.read(f"layers.{layer}.experts.{part}.weight")
        assert isinstance(weight, Quantized)
        assert weight.spec == AFFINE4
        assert weight.scale.dtype == weight.bias.dtype == np.float16
        assert (weight.scale < 0).mean() > 0.5
        assert np.array_equal(codecs.dequantize(weight), unpacked_experts(tensors, layer, part))
        bias = codecs.dequantize(opened.read(f"layers.{layer}.experts.{part}.bias"))
        modules = [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.bias" for expert in range(EXPERTS)]
        assert np.array_equal(bias, torch.stack([tensors[name] for name in modules]).float().numpy())


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)])
def test_scales_of_every_dtype(dtype, exact, edited, decode, load_tensors):
    """code * scale is exact in float32 unless the scale itself uses all of float32's bits."""
    folder = edited("int4-autoround", with_random_scales(dtype))
    got, expected = decode(folder, "layers.0.experts.gate.weight"), unpacked_experts(load_tensors(folder), 0, "gate")
    assert np.array_equal(got, expected) or not exact
    assert np.allclose(got, expected, rtol=0, atol=2**-20)


def test_modules_may_be_dense_or_integer_in_any_mix(edited, decode, mini, load_tensors):
    """The experts of one layer are dense, and one attention matrix is in integers."""

    def mix(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.1.mlp.experts") and "qweight" in name]:
            module = name.removesuffix(".qweight")
            tensors[f"{module}.weight"] = unpacked(tensors, module).bfloat16()
            for part in ("qweight", "qzeros", "scales"):
                del tensors[f"{module}.{part}"]
        module = "model.layers.0.self_attn.k_proj"
        del tensors[f"{module}.weight"]
        tensors[f"{module}.qweight"] = torch.randint(-(2**31), 2**31 - 1, (24, 128), dtype=torch.int32)
        tensors[f"{module}.qzeros"] = torch.full((3, 16), ZERO_WORD, dtype=torch.int32)
        tensors[f"{module}.scales"] = torch.randn(3, 128).half()

    folder = edited("int4-autoround", mix, lambda settings: settings["quantization_config"].pop("extra_config"))
    opened, tensors = checkpoint.open(folder), load_tensors(folder)
    assert opened.format == "int4-autoround"
    assert opened.summary().roles["experts"]["format"] == "affine4-g64+bf16"
    dense = opened.read("layers.1.experts.up.weight")
    assert isinstance(dense, Dense)
    rounded = torch.from_numpy(decode(mini / "int4-autoround", "layers.1.experts.up.weight")).bfloat16().float()
    assert np.array_equal(codecs.dequantize(dense), rounded.numpy())
    k = opened.read("layers.0.attention.k.weight")
    assert np.array_equal(codecs.dequantize(k), unpacked(tensors, "model.layers.0.self_attn.k_proj").numpy())


def test_to_mlx_and_back_loses_nothing(edited, decode, load_tensors, tensor_bytes, tmp_path):
    """MLX's affine mode keeps the float16 scales as they are; bfloat16 would round them."""
    source = edited("int4-autoround", with_random_scales(torch.float16))
    original = load_tensors(source)
    convert(source, tmp_path / "mlx", "mlx-4bit")
    scales = load_tensors(tmp_path / "mlx")["model.layers.0.mlp.experts.gate_proj.scales"]
    assert scales.dtype == torch.float16
    assert not torch.equal(scales.bfloat16().half(), scales)
    for part in ("gate", "up", "down"):
        weight = decode(tmp_path / "mlx", f"layers.1.experts.{part}.weight")
        assert np.array_equal(weight, unpacked_experts(original, 1, part))
    convert(tmp_path / "mlx", tmp_path / "back", "int4-autoround")
    back = tensor_bytes(load_tensors(tmp_path / "back"))
    experts = {name: value for name, value in tensor_bytes(original).items() if ".experts." in name}
    assert {name: value for name, value in back.items() if name in experts} == experts
