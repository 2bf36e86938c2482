"""FP8 with a scale for each block of 128 by 128: values as compressed-tensors decodes them."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights import codecs


def to_blocks(weight):
    """(e4m3 codes [N, K], bfloat16 scales per block, the decoded values) of a float32 matrix."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = np.empty((rows, columns), ml_dtypes.bfloat16)
    codes = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            at = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale[i, j] = np.abs(weight[at]).max() / 448
            codes[at] = np.clip(weight[at] / np.float32(scale[i, j]), -448, 448)
    wide = np.repeat(np.repeat(scale, 128, 0), 128, 1)[: weight.shape[0], : weight.shape[1]]
    return codes, scale, codes.astype(np.float32) * wide.astype(np.float32)


torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


def rewrite(folder, change):
    """Read the tensors of a checkpoint, let `change` edit them, and write them again."""
    (file,) = folder.glob("*.safetensors")
    tensors = safetensors_torch.load_file(file)
    change(tensors)
    safetensors_torch.save_file(tensors, file)


@pytest.fixture
def folder(mini, tmp_path):
    """The small fp8-dynamic checkpoint with blocks in place of rows, and its decoded matrices by module."""
    mlx_gptoss.convert(mini / "mxfp4", tmp_path / "block", to="fp8-dynamic")
    decoded = {}

    def change(tensors):
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            module = name.removesuffix(".weight_scale")
            values = (tensors[f"{module}.weight"].float() * tensors[name].float()).numpy()
            codes, scale, decoded[module] = to_blocks(values)
            tensors[f"{module}.weight"] = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
            tensors[name] = torch.from_numpy(scale.view(np.int16)).view(torch.bfloat16)

    rewrite(tmp_path / "block", change)
    return tmp_path / "block", decoded


def test_values(folder):
    path, decoded = folder
    source = checkpoints.open(path)
    found = codecs.dequantize(source.read("layers.0.attention.q.weight"))
    assert np.array_equal(found, decoded["model.layers.0.self_attn.q_proj"])
    for part in ("gate", "up", "down"):
        whole = codecs.dequantize(source.read(f"layers.1.experts.{part}.weight"))
        assert np.array_equal(whole[3], decoded[f"model.layers.1.mlp.experts.3.{part}_proj"])
        assert np.array_equal(
            codecs.dequantize(source.read(f"layers.1.experts.{part}.weight", range(2, 4))), whole[2:4]
        )
    assert source.format == "fp8-block" and "decoded to float32" in source.summary().note


def test_compressed_tensors_decodes_the_same():
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs

    weight = np.random.default_rng(0).standard_normal((192, 320)).astype(np.float32)
    codes, scale, decoded = to_blocks(weight)
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    stored = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
    scales = torch.from_numpy(scale.view(np.int16)).view(torch.bfloat16).float()
    assert np.allclose(forward.dequantize(stored, scales, args=args).numpy(), decoded, rtol=1e-6)


def test_it_runs_and_is_converted(folder, tmp_path, relative_error):
    path, _ = folder
    mlx_gptoss.convert(path, tmp_path / "bf16", to="bf16")
    with mlx_gptoss.load(path, device="cpu", dtype="float32") as model:
        found = model.logits(list(range(50)))
    with mlx_gptoss.load(tmp_path / "bf16", device="cpu", dtype="float32") as model:
        assert relative_error(found, model.logits(list(range(50)))) < 0.2  # bfloat16 rounds the decoded values


def test_a_scale_that_is_not_a_number(folder):
    path, _ = folder
    rewrite(path, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight_scale"].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="not a number"):
        checkpoints.open(path).read("layers.0.attention.q.weight")


def test_the_config_of_llm_compressor(folder):
    """Its quantization_config says strategy block; the shapes decide all the same."""
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= {
        "strategy": "block",
        "block_structure": [128, 128],
    }
    (path / "config.json").write_text(json.dumps(config))
    assert checkpoints.open(path).format == "fp8-block"
