"""torchao's flattened tensors: the values that torchao decodes, the network's logits, and what is refused."""

from __future__ import annotations

import hashlib
import json

import family
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import mlx_gptoss
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.formats.torchao import unswizzle

EXPERTS = [4, 4]
CONFIG = family.CONFIG | {
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "sliding_window": 8,
    "quantization_config": {"quant_method": "torchao"},
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def floats(array):
    return np.asarray(array).astype(np.float32)


def swizzle(scale):
    """[rows, groups] in cuBLAS's order, value by value."""
    rows, groups = scale.shape
    down, across = -(-rows // 128), -(-groups // 4)
    out = np.zeros((32 * down, 16 * across), scale.dtype).reshape(-1)
    for row in range(rows):
        for group in range(groups):
            tile = row // 128 * across + group // 4
            out[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4] = scale[row, group]
    return out.reshape(32 * down, 16 * across)


def integers(weight, bits, group, dtype, zero=0, kind="IntxUnpackedToInt8Tensor"):
    """(class, attributes, parts, decoded values). group: values with a scale, 0 for a row."""
    group = group or weight.shape[-1]
    grouped = weight.reshape(*weight.shape[:-1], -1, group)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale = (np.abs(grouped).max(-1) / (high - abs(zero))).astype(dtype)
    q = np.clip(np.rint(grouped / floats(scale)[..., None]) + zero, low, high).astype(np.int8)
    parts = {"qdata": q.reshape(weight.shape), "scale": scale, "zero_point": np.full(scale.shape, zero, np.int8)}
    data = {"target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}, "activation_quantization": None}
    return kind, data, parts, ((floats(q) - zero) * floats(scale)[..., None]).reshape(weight.shape)


def float8(weight, scale_of="row"):
    axis = {"row": -1, "matrix": None}[scale_of]
    scale = (np.abs(weight).max(axis, keepdims=True) / 448).astype(np.float32)
    codes = (weight / scale).astype(FP8)
    return "Float8Tensor", {}, {"qdata": codes, "scale": scale}, floats(codes) * scale


def float8_blocks(weight):
    scale = np.random.default_rng(0).uniform(0.001, 0.002, (weight.shape[0] // 16, weight.shape[1] // 32))
    scale, codes = scale.astype(np.float32), (weight * 500).astype(FP8)
    values = floats(codes) * np.repeat(np.repeat(scale, 16, axis=0), 32, axis=1)
    return "Float8Tensor", {}, {"qdata": codes, "scale": scale}, values


def int4(weight):
    """As MSLK's kernels have it: scale * q + zero, scales [K / g, N]."""
    grouped = weight.reshape(weight.shape[0], -1, 32)
    rng = np.random.default_rng(1)
    q = rng.integers(-8, 8, grouped.shape)
    scale, zero = (rng.uniform(0.01, 0.03, grouped.shape[:2]).astype(BF16) for _ in range(2))
    flat = q.reshape(weight.shape).astype(np.int8)
    codes = (flat[:, ::2] & 15 | flat[:, 1::2] << 4).astype(np.int8)
    values = (q * floats(scale)[..., None] + floats(zero)[..., None]).reshape(weight.shape).astype(np.float32)
    parts = {"qdata": codes, "scale": np.ascontiguousarray(scale.T), "zero_point": np.ascontiguousarray(zero.T)}
    return "Int4Tensor", {"block_size": [1, 32]}, parts, values


def mx(weight, bits, swizzled):
    rng = np.random.default_rng(2)
    scale = rng.integers(122, 126, (weight.shape[0], weight.shape[1] // 32)).astype(np.uint8)
    factor = np.repeat(np.exp2(floats(scale) - 127), 32, axis=1)
    if bits == 8:
        codes, name = rng.uniform(-4, 4, weight.shape).astype(FP8), "float8_e4m3fn"
        stored, values = codes, floats(codes)
    else:
        codes, name = rng.integers(0, 16, weight.shape).astype(np.uint8), "float4_e2m1fn_x2"
        stored, values = codes[:, ::2] | codes[:, 1::2] << 4, E2M1[codes]
    data = {"elem_dtype": {"_type": "torch.dtype", "_data": name}, "block_size": 32, "is_swizzled_scales": swizzled}
    return "MXTensor", data, {"qdata": stored, "scale": swizzle(scale) if swizzled else scale}, values * factor


def nvfp4(weight, swizzled):
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, weight.shape).astype(np.uint8)
    scale = rng.uniform(1, 200, (weight.shape[0], weight.shape[1] // 16)).astype(FP8)
    outer = np.asarray(np.float32(0.001))
    values = E2M1[codes] * np.repeat(floats(scale), 16, axis=1) * outer
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    parts = {"qdata": packed, "scale": swizzle(scale) if swizzled else scale, "per_tensor_scale": outer}
    return "NVFP4Tensor", {"block_size": 16, "is_swizzled_scales": swizzled}, parts, values


ENCODERS = {  # and how it runs
    "int8 per row": (lambda w: integers(w, 8, 0, np.float32, 0, "Int8Tensor"), "affine8-g64"),
    "int8 per group": (lambda w: integers(w, 8, 32, np.float32, 0, "Int8Tensor"), None),
    "intx8 per row": (lambda w: integers(w, 8, 0, BF16, 3), "affine8-g64"),
    "intx8 per group": (lambda w: integers(w, 8, 32, BF16, -4), "affine8-g32"),
    "intx4": (lambda w: integers(w, 4, 32, BF16, 1), "affine4-g32"),
    "intx4 in float32": (lambda w: integers(w, 4, 64, np.float32), "affine4-g64"),
    "intx3": (lambda w: integers(w, 3, 64, BF16), "affine3-g64"),
    "intx7": (lambda w: integers(w, 7, 32, BF16), "affine8-g32"),
    "intx4 in groups of 16": (lambda w: integers(w, 4, 16, BF16), None),
    "float8 per row": (float8, "fp8"),
    "float8 per matrix": (lambda w: float8(w, "matrix"), "fp8"),
    "float8 per block": (float8_blocks, None),
    "int4": (int4, "affine4-g32"),
    "mxfp8": (lambda w: mx(w, 8, False), "mxfp8"),
    "mxfp4 swizzled": (lambda w: mx(w, 4, True), "mxfp4"),
    "nvfp4": (lambda w: nvfp4(w, False), "nvfp4"),
    "nvfp4 swizzled": (lambda w: nvfp4(w, True), "nvfp4"),
}
EXPERT_ENCODERS = {
    "int8": lambda w: integers(w, 8, 0, np.float32, 0, "Int8Tensor"),
    "float8": float8,
}


def flatten(name, encoded):
    """(tensors, metadata) of one tensor, by torchao's names."""
    kind, data, parts, _ = encoded
    module, _, last = name.rpartition(".")
    entry = {"_type": kind, "_data": data, "_tensor_data_names": list(parts)}
    return {f"{module}._{last}_{part}": array for part, array in parts.items()}, {name: json.dumps(entry)}


def layout(encode, encode_experts=None, head=False):
    """(stored tensors, their metadata, the same in float32 as `bf16` has them)"""
    plain = family.random_tensors(EXPERTS)
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in "qkvo"]
    names += ["lm_head.weight"] if head else []
    chosen = dict.fromkeys(names, encode)
    if encode_experts:
        experts = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
        chosen |= {f"{e}.{part}": encode_experts for e in experts for part in ("gate_up_proj", "down_proj")}
        chosen |= {f"{e}.gate_up_proj_bias": encode_experts for e in experts}
    stored = {name: array for name, array in plain.items() if name not in chosen}
    metadata = {"format": "pt"}
    for name, encoder in chosen.items():
        encoded = encoder(plain[name])
        tensors, entry = flatten(name, encoded)
        stored, metadata, plain[name] = stored | tensors, metadata | entry, encoded[3].astype(np.float32)
    return stored, metadata, plain


def write(folder, stored, metadata):
    family.write_checkpoint(folder, CONFIG, {})
    save_file(stored, folder / "model.safetensors", metadata=metadata)
    return folder


def check_values(source, reference):
    for param in source.params:
        found, wanted = (codecs.dequantize(each.read(param.name)) for each in (source, reference))
        largest = np.abs(wanted).max(-1, keepdims=True) if param.is_matrix else np.abs(wanted)
        assert np.allclose(found, wanted, rtol=1e-6, atol=0) or (np.abs(found - wanted) <= 1e-7 * largest).all()


def test_values_of_a_file_that_torchao_wrote(mini):
    folder = mini / "torchao"
    source = checkpoints.open(folder)
    reference = json.loads((folder / "reference.json").read_text())["sha256_of_float32"]
    assert len(reference) == 7
    for name, digest in reference.items():
        values = codecs.dequantize(source.read(name))
        assert hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16] == digest, name
    summary = source.summary()
    assert summary.format == "torchao" and "decoded to float32" in summary.note
    assert "quantization of activations is not applied" in summary.note


@pytest.mark.parametrize("name", ENCODERS)
def test_values(tmp_path, name):
    encode, storage = ENCODERS[name]
    stored, metadata, plain = layout(encode, head=True)
    source = checkpoints.open(write(tmp_path / "ao", stored, metadata))
    check_values(source, checkpoints.open(family.write_checkpoint(tmp_path / "plain", CONFIG, plain)))
    spec, dtype = source.stored_as("lm_head.weight")
    assert (spec is None) == (storage is None) == ("decoded to float32" in source.summary().note)
    weight = source.read("lm_head.weight")
    if storage is not None:
        assert weight.spec == spec and mlx_gptoss.weights.tensor.storage_name(spec) == storage
    if dtype is not None:
        assert dtype == "F32" and {a.dtype for a in weight.arrays[1:]} == {np.dtype(np.float32)}
    held = 8 * weight.nbytes / weight.shape[0] / weight.shape[1]
    stored_bytes = sum(array.nbytes for part, array in stored.items() if part.startswith("lm_head."))
    planned = 8 * (stored_bytes + source.unpacked_bytes("lm_head.weight")) / weight.shape[0] / weight.shape[1]
    assert held <= planned * 1.001


@pytest.mark.parametrize("name", EXPERT_ENCODERS)
def test_experts_are_decoded(tmp_path, name):
    stored, metadata, plain = layout(float8, EXPERT_ENCODERS[name])
    source = checkpoints.open(write(tmp_path / "ao", stored, metadata))
    check_values(source, checkpoints.open(family.write_checkpoint(tmp_path / "plain", CONFIG, plain)))
    part = codecs.dequantize(source.read("layers.1.experts.up.weight", range(1, 3)))
    assert np.array_equal(part, codecs.dequantize(source.read("layers.1.experts.up.weight"))[1:3])


@pytest.mark.parametrize("backend", ["mlx", "cuda"])
@pytest.mark.parametrize("name", ["int8 per row", "intx4", "int4", "float8 per row", "mxfp4 swizzled", "nvfp4"])
def test_logits(tmp_path, relative_error, name, backend):
    stored, metadata, plain = layout(ENCODERS[name][0], EXPERT_ENCODERS["int8"] if "int8" in name else None, head=True)
    folder, ids = write(tmp_path / "ao", stored, metadata), list(range(40))
    with mlx_gptoss.load(folder, dtype="float32", device="cpu", backend=backend) as model:
        assert model.format == "torchao"
        assert relative_error(model.logits(ids), family.logits(plain, [8, None], ids)) < 1e-4


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("float8 per matrix", "fp8-dynamic"),
        ("float8 per row", "fp8-dynamic"),
        ("nvfp4 swizzled", "nvfp4"),
    ],
)
def test_conversion_keeps_codes(tmp_path, name, to):
    stored, metadata, _ = layout(ENCODERS[name][0])
    folder = write(tmp_path / "ao", stored, metadata)
    mlx_gptoss.convert(folder, tmp_path / "out", to=to)
    found, wanted = (
        codecs.dequantize(checkpoints.open(path).read("layers.1.attention.k.weight"))
        for path in (tmp_path / "out", folder)
    )
    assert np.array_equal(found, wanted)


def test_conversion_of_other_codes(tmp_path):
    stored, metadata, plain = layout(ENCODERS["int8 per row"][0])
    mlx_gptoss.convert(write(tmp_path / "ao", stored, metadata), tmp_path / "out", to="mlx-8bit")
    found = codecs.dequantize(checkpoints.open(tmp_path / "out").read("layers.1.attention.k.weight"))
    wanted = plain["model.layers.1.self_attn.k_proj.weight"]
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize("shape", [(1, 1), (96, 3), (128, 4), (130, 5), (300, 9)])
def test_unswizzling_undoes_swizzling(shape):
    scale = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(unswizzle(swizzle(scale), *shape), scale)


Q = "model.layers.0.self_attn.q_proj.weight"
P = "model.layers.0.self_attn.q_proj._weight_"


def entry(kind, **data):
    return json.dumps({"_type": kind, "_data": data})


INT4 = {"target_dtype": {"_data": "int4"}}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({f"{P}scale": None}, {}, "1 missing: .*_weight_scale"),
        ({f"{P}qdata": np.zeros((64, 63), np.int8)}, {}, "wrong shape"),
        ({f"{P}qdata": np.zeros((64, 64), np.float32)}, {}, "wrong dtype"),
        ({f"{P}scale": np.zeros((0, 0), np.float32)}, {}, "wrong shape"),
        ({f"{P}scale": np.ones((64, 3), np.float32)}, {}, "wrong shape"),
        ({f"{P}scale": np.full((64, 2), np.inf, np.float32)}, {}, "not a number"),
        ({f"{P}zero_point": np.zeros((64, 1), np.int8)}, {}, "wrong shape"),
        ({f"{P}qdata": np.full((64, 64), 8, np.int8)}, {}, "does not fit 4 bits"),
        ({f"{P}act_pre_scale": np.ones(64, np.float32)}, {}, "act_pre_scale"),
        ({}, {Q: None}, "does not say which class"),
        ({}, {Q: "{"}, "not valid JSON"),
        ({}, {Q: "[" * 1000}, "more items"),
        ({}, {Q: '{"_type": 3, "_data": {}}'}, "does not say which class"),
        ({}, {Q: entry("Int4TilePackedTo4dTensor")}, "one CUDA kernel.*not supported"),
        ({}, {Q: entry("AffineQuantizedTensor")}, "not known here"),
        ({}, {Q: entry("IntxUnpackedToInt8Tensor", target_dtype={"_data": "int9"})}, "int9"),
        ({}, {Q: entry("IntxUnpackedToInt8Tensor", target_dtype="int4")}, "not supported"),
        ({}, {Q: entry("MXTensor", elem_dtype={"_data": "float6"}, block_size=32)}, "float6"),
        ({}, {Q: entry("MXTensor", elem_dtype={"_data": "float8_e4m3fn"}, block_size=[32])}, "in blocks of"),
        ({}, {Q: entry("NVFP4Tensor", block_size=32)}, "in blocks of 32"),
        ({}, {Q: entry("Float8Tensor")}, "wrong dtype"),
    ],
)
def test_damaged_and_unknown_checkpoints_are_refused(tmp_path, tensors, metadata, message):
    stored, entries, _ = layout(ENCODERS["intx4"][0])
    stored = {name: array for name, array in (stored | tensors).items() if array is not None}
    entries = {name: text for name, text in (entries | metadata).items() if text is not None}
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open(write(tmp_path / "ao", stored, entries)).read("layers.0.attention.q.weight")


KINDS = ["Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor", "MXTensor", "NVFP4Tensor", "Tensor"]
ODD = [
    None,
    True,
    -1,
    0,
    3,
    32,
    2**64,
    0.5,
    "",
    "int4",
    "float8_e4m3fn",
    [],
    [1, 32],
    {},
    {"_data": "int8"},
    {"a": [1]},
]
SHAPES = [(), (0,), (1,), (64,), (0, 0), (1, 1), (64, 1), (1, 64), (64, 2), (2, 64), (64, 32), (64, 64), (4, 64, 64)]
DTYPES = [np.int8, np.uint8, np.float32, np.float16, BF16, FP8, np.int64]


@pytest.mark.parametrize("seed", range(6))
def test_odd_metadata_and_parts_give_one_error_or_load(tmp_path, seed):
    rng = np.random.default_rng(seed)
    stored, entries, _ = layout(ENCODERS[list(ENCODERS)[3 * seed - 1]][0], EXPERT_ENCODERS["int8"])
    names = [name for name in entries if name != "format"]
    refused = 0
    for _ in range(30):
        name = names[rng.integers(len(names))]
        module, _, last = name.rpartition(".")
        parts = dict(stored)
        if rng.random() < 0.7:
            part = f"{module}._{last}_{['qdata', 'scale', 'zero_point', 'per_tensor_scale'][rng.integers(4)]}"
            shape = SHAPES[rng.integers(len(SHAPES))]
            parts[part] = np.ones(shape, DTYPES[rng.integers(len(DTYPES))])
        data = json.loads(entries[name])["_data"]
        for key in ("elem_dtype", "target_dtype", "block_size", "is_swizzled_scales"):
            if rng.random() < 0.5:
                data[key] = ODD[rng.integers(len(ODD))]
        kind = KINDS[rng.integers(len(KINDS))] if rng.random() < 0.7 else json.loads(entries[name])["_type"]
        folder = write(tmp_path / "ao", parts, entries | {name: json.dumps({"_type": kind, "_data": data})})
        try:
            source = checkpoints.open(folder)
            for param in source.params:
                codecs.dequantize(source.read(param.name))
        except CheckpointError:
            refused += 1
    assert refused > 10
