"""fp8-dynamic is written with the tool's bytes, and compressed-tensors decompresses it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mlx_gptoss.weights import checkpoint, codecs, quantization
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.tensor import Dense

EXPERTS = 6
GATE = "model.layers.0.mlp.experts.{}.gate_proj"


@pytest.mark.parametrize("source", ["mxfp4", "fp8-half-split", "fp8-doubled-names", "fp8-dynamic"])
def test_writes_the_bytes_of_the_tools_file(source, checkpoint_path, tmp_path, load_tensors, tensor_bytes):
    """OpenAI's checkpoint is quantized and the other layouts renamed: all give the same bytes."""
    theirs = checkpoint_path("fp8-dynamic")
    report = convert(checkpoint_path(source), tmp_path / "out", "fp8-dynamic")
    assert report.format == "fp8-dynamic"
    assert tensor_bytes(load_tensors(tmp_path / "out")) == tensor_bytes(load_tensors(theirs))
    ours, expected = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", theirs))
    assert ours["quantization_config"] == expected["quantization_config"]


def test_bf16_experts_become_fp8(checkpoint_path, tmp_path, load_tensors, tensor_bytes):
    convert(checkpoint_path("fp8-attention-only"), tmp_path / "out", "fp8-dynamic")
    written, theirs = load_tensors(tmp_path / "out"), load_tensors(checkpoint_path("fp8-dynamic"))
    assert tensor_bytes(written) == tensor_bytes(theirs)


def difficult_weights() -> torch.Tensor:
    """bfloat16 [200, 256]: normal rows of many sizes, zeros, signed zeros, outliers, tiny and large values."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(200, 256, generator=generator) * 10.0 ** torch.randint(-6, 4, (200, 1), generator=generator)
    values[0] = 0
    values[1] = -0.0
    values[2, ::3] = -0.0
    values[3:20, 5] *= 1000
    values[20] = 1e-39
    values[21] = torch.linspace(-1, 1, 256)
    return values.bfloat16()


def test_quantizes_like_compressed_tensors(checkpoint_path):
    tool = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    block = json.loads((checkpoint_path("fp8-dynamic") / "config.json").read_text())["quantization_config"]
    arguments = tool.QuantizationArgs.model_validate(block["config_groups"]["group_0"]["weights"])
    values = difficult_weights()
    scale, zero = calculate_qparams(values.amin(1, keepdim=True), values.amax(1, keepdim=True), arguments)
    codes = quantize(values, scale, zero, arguments, dtype=torch.float8_e4m3fn)
    ours = quantization.quantize_fp8_rows(Dense(values.float().numpy()))
    assert np.array_equal(ours.outer.view(np.uint16), scale.view(torch.uint16).numpy())
    assert np.array_equal(ours.codes, codes.view(torch.uint8).numpy())


def test_compressed_tensors_decompresses_what_we_write(checkpoint_path, tmp_path, load_tensors):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    convert(checkpoint_path("mxfp4"), tmp_path / "out", "fp8-dynamic")
    block = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    settings = QuantizationConfig.model_validate(block)
    scheme = settings.config_groups["group_0"]
    compressor = BaseCompressor.load_from_registry(scheme.format or settings.format)
    tensors, opened = load_tensors(tmp_path / "out"), checkpoint.open(tmp_path / "out")
    for expert in range(EXPERTS):
        module = GATE.format(expert)
        state = {part: tensors[f"{module}.{part}"] for part in ("weight", "weight_scale")}
        theirs = compressor.decompress(state, scheme)["weight"]
        ours = torch.from_numpy(codecs.dequantize(opened.read("layers.0.experts.gate.weight"))[expert])
        assert torch.equal(theirs, ours.to(theirs.dtype))
