"""AMD Quark's checkpoints: the values that Quark decodes, the network's logits, and what is refused."""

from __future__ import annotations

import hashlib
import json

import family
import ml_dtypes
import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights import codecs

EXPERTS = [4, 4]
INPUTS = {"dtype": "fp8_e4m3", "is_dynamic": False}
QUARK = {"quant_method": "quark", "global_quant_config": {"input_tensors": INPUTS, "weight": {"dtype": "fp4"}}}
CONFIG = family.CONFIG | {
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "sliding_window": 8,
    "quantization_config": QUARK,
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP8 = ml_dtypes.float8_e4m3fn


def random_codes(shape):
    rng = np.random.default_rng(sum(shape))
    return rng, rng.integers(0, 16, shape).astype(np.uint8)


def packed(codes):
    return codes[:, ::2] | codes[:, 1::2] << 4


def mxfp4(weight):
    """(tensors by part, decoded values), as Quark lays them out, from random codes."""
    rng, codes = random_codes(weight.shape)
    scale = rng.integers(122, 126, (weight.shape[0], weight.shape[1] // 32)).astype(np.uint8)
    values = E2M1[codes] * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, axis=1)
    return {"weight": packed(codes), "weight_scale": scale, "input_scale": np.float32([1])[0]}, values


def nvfp4(weight):
    rng, codes = random_codes(weight.shape)
    scale = rng.uniform(1, 200, (weight.shape[0], weight.shape[1] // 16)).astype(FP8)
    outer = np.float32(0.001)
    values = E2M1[codes] * np.repeat(scale.astype(np.float32), 16, axis=1) * outer
    return {"weight": packed(codes), "weight_scale": scale, "weight_scale_2": np.asarray(outer)}, values


def fp8(weight, by_row=False):
    rows = (np.abs(weight).max(axis=1) if by_row else np.abs(weight).max()[None]) / 448
    scale = rows.astype(ml_dtypes.bfloat16)
    codes = (weight / scale.astype(np.float32)[:, None]).astype(FP8)
    return {"weight": codes, "weight_scale": scale if by_row else scale.reshape(())}, codes.astype(
        np.float32
    ) * scale.astype(np.float32)[:, None]


def int8(weight, zero=0):
    scale = np.float32(np.abs(weight).max() / 100)
    codes = np.rint(weight / scale + zero).astype(np.int8)
    parts = {"weight": codes, "weight_scale": np.asarray(scale), "weight_zero_point": np.asarray(np.int8(zero))}
    return parts, (codes.astype(np.float32) - zero) * scale


ENCODERS = {
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "fp8": fp8,
    "ptpc_fp8": lambda weight: fp8(weight, True),
    "int8": int8,
    "int8 with a zero point": lambda weight: int8(weight, 5),
}


def layout(encode, attention=None):
    """(stored tensors, the same in float32 as `bf16` has them). attention: its encoder, None for floats."""
    plain = family.random_tensors(EXPERTS)
    stored = dict(plain)
    for layer in range(2):
        for part in "qkvo" if attention else "":
            name = f"model.layers.{layer}.self_attn.{part}_proj"
            parts, plain[f"{name}.weight"] = attention(stored.pop(f"{name}.weight"))
            stored |= {f"{name}.{key}": np.asarray(array) for key, array in parts.items()}
        for part in "kv":
            stored[f"model.layers.{layer}.self_attn.{part}_proj.output_scale"] = np.ones((), np.float32)
        prefix = f"model.layers.{layer}.mlp.experts"
        for fused in ("gate_up_proj", "down_proj"):
            weights, biases = stored.pop(f"{prefix}.{fused}"), stored.pop(f"{prefix}.{fused}_bias")
            decoded = np.empty_like(weights)
            for expert, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                parts, values = encode(np.ascontiguousarray(weight.T))
                stored |= {f"{prefix}.{expert}.{fused}.{key}": np.asarray(a) for key, a in parts.items()}
                stored[f"{prefix}.{expert}.{fused}.bias"], decoded[expert] = bias, values.T
            plain[f"{prefix}.{fused}"] = decoded
    return stored, plain


def test_values_of_a_file_that_quark_wrote(mini):
    folder = mini / "quark"
    source = checkpoints.open(folder)
    reference = json.loads((folder / "reference.json").read_text())["sha256_of_float32"]
    assert len(reference) == 7
    for name, digest in reference.items():
        values = codecs.dequantize(source.read(name))
        assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == digest, name
    summary = source.summary()
    assert summary.format == "quark" and summary.roles["experts"]["format"] == "mxfp4"
    assert summary.roles["attention"]["format"] == "fp8+int8"
    assert "fp8_e4m3" in summary.note and "activations stay unquantized" in summary.note


@pytest.mark.parametrize("attention", [False, True], ids=["attention-bf16", "attention-quantized"])
@pytest.mark.parametrize("scheme", ENCODERS)
def test_values(tmp_path, scheme, attention):
    stored, plain = layout(ENCODERS[scheme], ENCODERS[scheme] if attention else None)
    source = checkpoints.open(family.write_checkpoint(tmp_path / "quark", CONFIG, stored))
    reference = checkpoints.open(family.write_checkpoint(tmp_path / "plain", CONFIG, plain))
    for param in source.params:
        found, wanted = (codecs.dequantize(each.read(param.name)) for each in (source, reference))
        assert np.allclose(found, wanted, rtol=2.5e-7, atol=0), param.name
        if param.role == "experts":
            assert np.array_equal(codecs.dequantize(source.read(param.name, range(1, 3))), found[1:3])


@pytest.mark.parametrize("backend", ["mlx", "cuda"])
@pytest.mark.parametrize("scheme", ["mxfp4", "ptpc_fp8", "int8 with a zero point"])
def test_logits(tmp_path, relative_error, scheme, backend):
    stored, plain = layout(ENCODERS[scheme], ENCODERS["fp8" if scheme == "mxfp4" else scheme])
    folder = family.write_checkpoint(tmp_path / "quark", CONFIG, stored)
    ids = list(range(40))
    with mlx_gptoss.load(folder, dtype="float32", device="cpu", backend=backend) as model:
        assert model.format == "quark"
        assert relative_error(model.logits(ids), family.logits(plain, [8, None], ids)) < 1e-4


def test_conversion_keeps_codes_and_a_silent_config_is_read(tmp_path):
    stored, plain = layout(mxfp4)
    config = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    folder = family.write_checkpoint(tmp_path / "quark", config, stored)
    assert not checkpoints.open(folder).summary().note
    mlx_gptoss.convert(folder, tmp_path / "out", to="mxfp4")
    found = codecs.dequantize(checkpoints.open(tmp_path / "out").read("layers.1.experts.down.weight"))
    assert np.array_equal(found, plain["model.layers.1.mlp.experts.down_proj"].swapaxes(1, 2))


def test_conversion_keeps_the_codes_and_the_scales_of_fp8(tmp_path):
    stored, _ = layout(ENCODERS["ptpc_fp8"], ENCODERS["ptpc_fp8"])
    folder = family.write_checkpoint(tmp_path / "quark", CONFIG, stored)
    mlx_gptoss.convert(folder, tmp_path / "out", to="fp8-dynamic")
    source, written = checkpoints.open(folder), checkpoints.open(tmp_path / "out")
    for name in ("layers.0.attention.k.weight", "layers.1.experts.gate.weight"):
        one, other = source.read(name), written.read(name)
        assert one.outer.dtype == other.outer.dtype == ml_dtypes.bfloat16
        assert np.array_equal(one.codes.view(np.uint8), other.codes.view(np.uint8))
        assert np.array_equal(one.outer, other.outer)


Q = "model.layers.0.self_attn.q_proj"
E = "model.layers.1.mlp.experts.2.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{E}.weight_scale": None}, "1 missing: .*weight_scale"),
        ({f"{E}.bias": None}, "1 missing: .*bias"),
        ({f"{E}.weight": np.zeros((64, 15), np.uint8)}, "wrong shape"),
        ({f"{E}.weight": np.zeros((64, 16), np.int8)}, "wrong dtype"),
        ({f"{E}.weight_scale": np.full((64, 1), 255, np.uint8)}, "not a number"),
        ({f"{E}.weight_zero_point": np.zeros((), np.int8)}, "1 unknown"),
        ({f"{Q}.weight": np.zeros((64, 8), np.int32)}, "packed integers"),
        ({f"{Q}.weight_scale": np.zeros((3,), np.float32)}, "wrong shape"),
        ({f"{Q}.weight_scale": np.full((), np.nan, np.float32)}, "not a number"),
        ({f"{Q}.weight": np.zeros((64, 48), np.uint8), f"{Q}.weight_scale": np.zeros((64, 2), np.uint8)}, "mxfp6"),
        ({f"{Q}.weight": np.zeros((64, 32), np.uint8), f"{Q}.weight_scale": np.zeros((64, 4), np.uint8)}, "amdfp4"),
        ({f"{Q}.input_rotation": np.zeros((64, 64), np.int8)}, "rotates activations"),
    ],
)
def test_damaged_and_unknown_checkpoints_are_refused(tmp_path, change, message):
    stored, _ = layout(mxfp4, fp8)
    stored = {name: array for name, array in (stored | change).items() if array is not None}
    with pytest.raises(CheckpointError, match=message):
        source = checkpoints.open(family.write_checkpoint(tmp_path / "quark", CONFIG, stored))
        for param in source.params:
            source.read(param.name)


@pytest.mark.parametrize("block", [{"input_tensors": 3}, {"input_tensors": {"dtype": "x" * 10**5}}, 7])
def test_a_hostile_config_is_no_note(tmp_path, block):
    stored, _ = layout(mxfp4)
    hostile = {"quant_method": "quark", "global_quant_config": block, "layer_quant_config": [block]}
    folder = family.write_checkpoint(tmp_path / "quark", CONFIG | {"quantization_config": hostile}, stored)
    assert checkpoints.open(folder).summary().note == ""


def test_more_experts_than_tensors_are_refused(tmp_path):
    stored, _ = layout(mxfp4)
    with pytest.raises(CheckpointError, match=r"only .* tensors"):
        checkpoints.open(family.write_checkpoint(tmp_path / "quark", CONFIG | {"num_local_experts": 10**6}, stored))
