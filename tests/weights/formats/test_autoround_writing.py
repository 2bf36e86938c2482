"""int4-autoround is written with AutoRound's bytes, and AutoRound's own code unpacks it where it is installed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint, codecs, quantization
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.tensor import Dense

EXPERTS = 6
MODULE = "model.layers.0.mlp.experts.{}.gate_proj"
NAME = "layers.0.experts.gate.weight"


@pytest.mark.parametrize("source", ["mxfp4", "int4-autoround"])
def test_writes_the_bytes_of_autorounds_file(source, mini, tmp_path, load_tensors, tensor_bytes):
    """OpenAI's checkpoint is quantized and AutoRound's own file copied: both give the same bytes and settings."""
    convert(mini / source, tmp_path / "out", "int4-autoround")
    written, theirs = load_tensors(tmp_path / "out"), load_tensors(mini / "int4-autoround")
    assert tensor_bytes(written) == tensor_bytes(theirs)
    block = json.loads((mini / "int4-autoround/quantization_config.json").read_text())
    assert json.loads((tmp_path / "out/quantization_config.json").read_text()) == block
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == block


def test_affine_weights_that_are_not_symmetric_are_requantized(mini, tmp_path, decode):
    convert(mini / "mlx-4bit", tmp_path / "out", "int4-autoround")
    source = checkpoint.open(mini / "mlx-4bit").read(NAME)
    expected = quantization.quantize_symmetric(source)
    assert np.array_equal(decode(tmp_path / "out", NAME), codecs.dequantize(expected))
    error = np.abs(codecs.dequantize(source) - codecs.dequantize(expected))
    steps = np.abs(np.repeat(expected.scale.astype(np.float32), 64, axis=-1))
    assert (error <= 1.01 * steps).all()  # half a step, or a whole one at the end of the range that has no code


def difficult_weights() -> torch.Tensor:
    """bfloat16 [200, 256]: normal rows of many sizes, one-sided and constant ones, zeros, ties between extremes."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(200, 256, generator=generator) * 10.0 ** torch.randint(-7, 4, (200, 1), generator=generator)
    values[0] = 0
    values[1] = -0.0
    values[2:10] = values[2:10].abs()
    values[10:20] = -values[10:20].abs()
    values[20], values[21] = 0.3, -0.3
    values[22, ::2], values[22, 1::2] = 1, -1
    values[23] = torch.linspace(-1, 1, 256)
    values[24] = 1e-9
    return values.bfloat16()


def test_the_largest_magnitude_gets_code_zero():
    values = difficult_weights().float().numpy()
    got = quantization.quantize_symmetric(Dense(values))
    codes = codecs.unpack(got.codes, 4).reshape(-1, 64)
    groups = values.reshape(-1, 64)
    normal = np.abs(groups).max(axis=1) > 1e-3
    largest = np.abs(groups).argmax(axis=1)
    assert (codes[np.arange(len(codes)), largest] == 0)[normal].mean() > 0.9  # float16 rounds some scales up
    assert np.array_equal(got.bias, -8 * got.scale)
    assert not np.signbit(got.scale.reshape(200, 4)[:2]).any()


def test_values_too_large_for_float16_scales_are_refused():
    with pytest.raises(CheckpointError, match="float16"):
        quantization.quantize_symmetric(Dense(np.full((1, 64), 1e6, np.float32)))
    with pytest.raises(CheckpointError, match="too large"):
        quantization.quantize_symmetric(Dense(np.full((1, 64), 1e5, np.float32)))


def test_a_bias_beyond_float16_is_refused(mini, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    convert(mini / "mxfp4", source / "bf16", "bf16")
    path = next((source / "bf16").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["model.layers.0.mlp.experts.down_proj_bias"][0, 0] = 1e5
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="float16"):
        convert(source / "bf16", tmp_path / "out", "int4-autoround")
    assert not (tmp_path / "out").exists()


# AutoRound's own code


@pytest.fixture(scope="module")
def quant_linear():
    """AutoRound's own module for `auto_round:auto_gptq`."""
    why = "auto-round (with what it imports) is not installed"
    return pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp", reason=why).QuantLinear


def as_quant_linear(quant_linear, tensors: dict[str, torch.Tensor], module: str):
    words = tensors[f"{module}.qweight"]
    layer = quant_linear(4, 64, words.shape[0] * 8, words.shape[1], bias=True)
    layer.load_state_dict({part: tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "bias")})
    return layer


def test_autoround_unpacks_what_we_write(quant_linear, mini, tmp_path, load_tensors, decode):
    convert(mini / "mxfp4", tmp_path / "out", "int4-autoround")
    tensors, ours = load_tensors(tmp_path / "out"), decode(tmp_path / "out", NAME)
    for expert in range(EXPERTS):
        layer = as_quant_linear(quant_linear, tensors, MODULE.format(expert))
        with torch.no_grad():
            theirs = layer(torch.eye(192)) - layer.bias  # multiplying by the identity returns the matrix
        assert torch.allclose(theirs.float().T, torch.from_numpy(ours[expert]), rtol=0, atol=2e-3)
        assert torch.equal(theirs.float().T.sign(), torch.from_numpy(ours[expert]).sign())


def test_quantizes_and_packs_like_autoround(quant_linear):
    from auto_round.data_type.int import quant_tensor_sym

    values = difficult_weights()
    rounded, scale, zero = quant_tensor_sym(values, bits=4, group_size=64)
    linear = torch.nn.Linear(256, 200, bias=False, dtype=torch.bfloat16)
    linear.weight.data = rounded
    layer = quant_linear(4, 64, 256, 200, bias=False)
    layer.pack(linear, scale.reshape(200, -1), zero, None, device="cpu")
    ours = quantization.quantize_symmetric(Dense(values.float().numpy()))
    assert np.array_equal(ours.scale.T, layer.scales.numpy())
    assert np.array_equal(ours.codes.view(np.int32).T, layer.qweight.numpy())
