"""NVFP4 encoding: MXFP4's codes are kept within e4m3's range, other weights are quantized as ModelOpt does.

ModelOpt itself is the judge where it is installed.
"""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys

import numpy as np
import pytest

from mlx_gptoss.weights import codecs, quantization
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.formats.nvfp4_encoding import choose_encoding
from mlx_gptoss.weights.tensor import MXFP4, NVFP4, Dense, Quantized

ATTENTION = "model.layers.{}.self_attn.{}_proj"
EXPERTS = "model.layers.{}.mlp.experts.{}_proj"
SPAN = 17  # octaves between the smallest and the largest power of two in e4m3


def random_mxfp4(exponents: tuple[int, int], seed: int = 0) -> Quantized:
    chance = np.random.default_rng(seed)
    codes = chance.integers(0, 256, (3, 32, 64), dtype=np.uint8)
    scale = chance.integers(127 + exponents[0], 128 + exponents[1], (3, 32, 4), dtype=np.uint8)
    codes[0, 0], scale[0, 0] = 0x80, 254  # a row of zeros, whose scale must be ignored
    return Quantized(MXFP4, codes, scale)


def as_nvfp4(weight: Quantized) -> Quantized:
    encoding = choose_encoding([weight], "some.weight")
    return encoding.encode(weight)


@pytest.mark.parametrize("bottom", [-30, -1, 0, 40])
def test_mxfp4_within_17_octaves_is_exact(bottom, caplog):
    weight = random_mxfp4((bottom, bottom + SPAN))
    result = as_nvfp4(weight)
    assert not caplog.records
    np.testing.assert_array_equal(result.codes, weight.codes)
    np.testing.assert_array_equal(codecs.dequantize(result), codecs.dequantize(weight))


def test_mxfp4_blocks_below_17_octaves_are_rounded_with_a_warning(caplog):
    weight = random_mxfp4((-6 - SPAN, -2))
    with caplog.at_level(logging.WARNING):
        result = as_nvfp4(weight)
    assert "some.weight: blocks more than 17 octaves below" in caplog.text
    old, new = codecs.dequantize(weight), codecs.dequantize(result)
    exact = np.repeat(weight.scale >= weight.scale[1:].max() - SPAN, 32, axis=-1)
    np.testing.assert_array_equal(new[exact], old[exact])
    assert (old[~exact] != new[~exact]).any()
    assert np.abs(old - new).max() <= float(result.outer) * 2**-9 * 0.5  # half the finest step below code 3


@pytest.mark.parametrize("amax", [3e-30, 1e-3, 0.7, 448.0, 2e30])
def test_quantizing_is_within_half_a_step(amax):
    chance = np.random.default_rng(1)
    values = (chance.standard_normal((2, 16, 64)) * np.exp2(chance.integers(-6, 0, (2, 16, 64)))).astype(np.float32)
    values *= np.float32(amax) / np.abs(values).max()
    values[0, 0] = 0
    outer = np.float32(quantization.max_abs(Dense(values)) / np.float32(2688))
    result = quantization.quantize_nvfp4(Dense(values), np.asarray(outer))
    error = np.abs(codecs.dequantize(result) - values).reshape(2, 16, 4, 16)
    step = codecs.E4M3[result.scale] * outer
    assert (error <= step[..., None] * np.float32(1.0001)).all()  # codes 4 and 6 are two steps apart
    assert not codecs.dequantize(result)[0, 0].any() and (result.scale[0, 0] == 0x38).all()


def test_a_weight_of_zeros_can_be_written():
    weight = Dense(np.zeros((2, 4, 32), np.float32))
    encoding = choose_encoding([weight], "zeros")
    assert encoding.outer == 1
    assert not codecs.dequantize(encoding.encode(weight)).any()


# ModelOpt's own code

MODELOPT = """
import sys, numpy as np, torch
from safetensors.torch import load_file
try:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
    from modelopt.torch.export.shard_cast_utils import quantize_mxfp4_to_nvfp4_lossless
except ImportError as error:
    print(error), sys.exit(77)
results = {}
tensors = load_file(sys.argv[1])
for name, tensor in tensors.items():
    fused, dotted = name + "_weight_scale", name + "_scale"
    if tensor.dtype == torch.uint8 and (fused in tensors or dotted in tensors):
        scale, scale_2 = (fused, fused + "_2") if fused in tensors else (dotted, dotted + "_2")
        scale = tensors[scale]
        if tensor.dim() == 3:
            tensor, scale = tensor.transpose(1, 2).contiguous(), scale.transpose(1, 2).contiguous()
        shape = (*tensor.shape[:-1], tensor.shape[-1] * 2)
        q = NVFP4QTensor(torch.Size(shape), torch.float32, tensor)
        results[name] = q.dequantize(
            dtype=torch.float32, scale=scale, double_scale=tensors[scale_2], block_sizes={-1: 16}
        ).numpy()
inputs = np.load(sys.argv[2])
for key in inputs:
    if key.startswith("values"):
        q, scale, scale_2 = NVFP4QTensor.quantize(torch.from_numpy(inputs[key]), 16)
        results[key + ".codes"], results[key + ".scale"] = q._quantized_data.numpy(), scale.view(torch.uint8).numpy()
        results[key + ".scale_2"] = scale_2.numpy()
codes, scale = torch.from_numpy(inputs["mxfp4.codes"]), torch.from_numpy(inputs["mxfp4.scale"])
q, scale, scale_2, blocks, lossless = quantize_mxfp4_to_nvfp4_lossless(codes, scale, int(scale.max()) - 127, "cpu")
results["mxfp4.codes"], results["mxfp4.scale"] = q.numpy(), scale.view(torch.uint8).numpy()
results["mxfp4.scale_2"] = scale_2.numpy()
np.savez(sys.argv[3], **results)
"""


@pytest.fixture(scope="module")
def judged(mini, tmp_path_factory):
    """(folder, inputs, results): ModelOpt, in its own process, decodes a checkpoint that we wrote, quantizes random
    values and casts random MXFP4."""
    if not importlib.util.find_spec("modelopt"):
        pytest.skip("nvidia-modelopt is not installed")
    folder = tmp_path_factory.mktemp("modelopt")
    convert(mini / "mxfp4", folder / "ours", "nvfp4")
    chance = np.random.default_rng(5)
    inputs = {}
    for index, spread in enumerate((1, 2, 12, 30)):
        powers = np.exp2(chance.integers(-spread, 1, (24, 8)).repeat(16, axis=1))
        values = (chance.standard_normal((24, 128)) * powers).astype(np.float32)
        values[3, 16:48] = 0
        values[5] = np.tile([-0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 5, 6, -6, 0.1, -1e-9, 0, -0.0, 4, 2, 1], 8)  # ties
        inputs[f"values{index}"] = values
    weight = random_mxfp4((-30, -2))
    weight.codes[0, 0] = 0x17
    weight.scale[0, 0] = 120
    inputs |= {"mxfp4.codes": weight.codes, "mxfp4.scale": weight.scale}
    np.savez(folder / "inputs.npz", **inputs)
    arguments = [folder / "ours" / "model.safetensors", folder / "inputs.npz", folder / "results.npz"]
    done = subprocess.run([sys.executable, "-c", MODELOPT, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"nvidia-modelopt cannot be imported here: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "ours", inputs, dict(np.load(folder / "results.npz"))


def test_modelopt_decodes_what_we_write(judged, decode_matrices):
    folder, _, results = judged
    ours = decode_matrices(folder)
    for layer in (0, 1):
        for part in "qkvo":
            theirs = results[ATTENTION.format(layer, part) + ".weight"]
            np.testing.assert_allclose(ours[f"layers.{layer}.attention.{part}.weight"], theirs, rtol=2e-7, atol=0)
        fused, down = (results[EXPERTS.format(layer, part)] for part in ("gate_up", "down"))
        for part, rows in {"gate": fused[:, 0::2], "up": fused[:, 1::2], "down": down}.items():
            np.testing.assert_array_equal(ours[f"layers.{layer}.experts.{part}.weight"], rows)


def test_modelopt_quantizes_to_the_same_bytes(judged):
    _, inputs, results = judged
    for key in (key for key in inputs if key.startswith("values")):
        outer = np.float32(quantization.max_abs(Dense(inputs[key])) / np.float32(2688))
        assert outer == results[f"{key}.scale_2"]
        ours = quantization.quantize_nvfp4(Dense(inputs[key]), np.asarray(outer))
        np.testing.assert_array_equal(ours.scale, results[f"{key}.scale"], err_msg=key)
        np.testing.assert_array_equal(ours.codes, results[f"{key}.codes"], err_msg=key)


def test_modelopt_casts_mxfp4_to_the_same_values(judged):
    _, inputs, results = judged
    ours = as_nvfp4(Quantized(MXFP4, inputs["mxfp4.codes"], inputs["mxfp4.scale"]))
    assert ours.outer == results["mxfp4.scale_2"]
    theirs = Quantized(NVFP4, results["mxfp4.codes"], results["mxfp4.scale"], outer=results["mxfp4.scale_2"])
    np.testing.assert_array_equal(codecs.dequantize(ours), codecs.dequantize(theirs))
