"""compressed-tensors' integer schemes: values as the tool decodes what it compresses, and float64 logits."""

from __future__ import annotations

import family
import integer_models
import numpy as np
import pytest
from integer_models import decoded, random_integers, to_words

import mlx_gptoss
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.loading.recommend import derived_bytes
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.tensor import AFFINE

IDS = list(range(40))
Q = "model.layers.0.self_attn.q_proj"


def packed(bits=4, group=64, symmetric=True, reorder=False):
    """An encoder: random integers as pack-quantized. group: None is a scale per row."""

    def encode(rows, width, seed):
        codes, scale, zeros = random_integers(rows, width, bits, group or width, seed, symmetric)
        order = np.arange(width) // (group or width)
        parts = {"weight_shape": np.array([rows, width], np.int64), "weight_scale": scale}
        if reorder:
            order = np.random.default_rng(seed).permutation(order)
            parts["weight_g_idx"] = order.astype(np.int32)
        if not symmetric:
            parts["weight_zero_point"] = to_words(zeros.T, bits).T
        return parts | {"weight_packed": to_words(codes, bits)}, decoded(codes, scale, zeros, order)

    return encode


def signed_bytes(group=None, symmetric=True):
    """An encoder: random integers as int-quantized, each in a byte. group: None is a scale per row."""

    def encode(rows, width, seed):
        codes, scale, zeros = random_integers(rows, width, 8, group or width, seed, symmetric)
        parts = {"weight": (codes - 128).astype(np.int8), "weight_scale": scale}
        if not symmetric:
            parts["weight_zero_point"] = (zeros - 128).astype(np.int8)
        return parts, decoded(codes, scale, zeros, np.arange(width) // (group or width))

    return encode


def by_the_tool(format_name, bits, group, symmetric, activations=False):
    """An encoder that compressed-tensors compresses and, with float32 scales, decompresses."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel", group_size=group
    )
    activation = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if activations else None
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activation)
    compressor = BaseCompressor.load_from_registry(format_name)

    def encode(rows, width, seed):
        codes, scale, zeros = random_integers(rows, width, bits, group or width, seed, symmetric)
        values = decoded(codes, scale, zeros, np.arange(width) // (group or width))
        state = {"weight": torch.from_numpy(values), "weight_scale": torch.from_numpy(scale.astype(np.float32))}
        if not symmetric:
            state["weight_zero_point"] = torch.from_numpy((zeros - 2 ** (bits - 1)).astype(np.int8))
        state = compressor.compress(state, scheme)
        found = compressor.decompress(dict(state), scheme)["weight"].float().numpy()
        parts = {name: tensor.contiguous().numpy() for name, tensor in state.items()}
        return parts | {"weight_scale": scale}, found

    return encode


def config_of(format_name, bits, group, symmetric=True, activations=None, version="0.20.1"):
    """`quantization_config` as llm-compressor writes it."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "group_size": group}
    weights["strategy"] = "group" if group else "channel"
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": format_name}
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "version": version,
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


PACKED, INT = "pack-quantized", "int-quantized"
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
CASES = {  # name -> (encoder, quantization_config, keywords of the model, the storage of q in memory or None)
    "W4A16": (lambda: packed(), config_of(PACKED, 4, 64), {}, (4, 64)),
    "W4A16 g128": (lambda: packed(group=128), config_of(PACKED, 4, 128), {}, (4, 64)),
    "W4A16_ASYM": (lambda: packed(symmetric=False), config_of(PACKED, 4, 64, False), {}, (4, 64)),
    "W8A16": (lambda: packed(8, None), config_of(PACKED, 8, None), {}, (8, 64)),
    "8 bits, asymmetric, a scale per row": (
        lambda: packed(8, None, symmetric=False),
        config_of(PACKED, 8, None, False),
        {"lm_head": True},
        (8, 64),
    ),
    "3 bits": (lambda: packed(3, 32, symmetric=False), config_of(PACKED, 3, 32, False), {}, (3, 32)),
    "act-order": (lambda: packed(symmetric=False, reorder=True), config_of(PACKED, 4, 64, False), {}, None),
    "groups of 16": (lambda: packed(group=16), config_of(PACKED, 4, 16), {}, None),
    "the halves of llm-compressor 0.12": (
        lambda: packed(),
        config_of(PACKED, 4, 64, version="0.17.1"),
        {"half_split": True},
        (4, 64),
    ),
    "W8A8": (lambda: signed_bytes(), config_of(INT, 8, None, activations=TOKEN), {}, (8, 64)),
    "W8A8, asymmetric groups": (
        lambda: signed_bytes(32, symmetric=False),
        config_of(INT, 8, 32, False, activations=TOKEN),
        {},
        (8, 32),
    ),
    **{
        f"by the tool: {name} {bits} bits g{group}{'' if symmetric else ' asymmetric'}": (
            lambda name=name, bits=bits, group=group, symmetric=symmetric: by_the_tool(
                name, bits, group, symmetric, name == INT
            ),
            config_of(name, bits, group, symmetric, activations=TOKEN if name == INT else None),
            {},
            (8 if name == INT else bits, group or 64),
        )
        for name, bits, group, symmetric in (
            (PACKED, 4, 32, True),
            (PACKED, 4, 64, False),
            (PACKED, 8, None, True),
            (PACKED, 8, None, False),
            (INT, 8, None, True),
            (INT, 8, None, False),
            (INT, 4, 64, True),
        )
    },
}


def made(tmp_path, case):
    """(the folder of a case, the same model's float32 tensors)"""
    encoder, config, keywords, _ = CASES[case]
    stored, plain = integer_models.model(encoder(), **keywords)
    return integer_models.write(tmp_path / "stored", stored, config), plain


@pytest.mark.parametrize("case", CASES)
def test_values(tmp_path, case):
    folder, plain = made(tmp_path, case)
    source = checkpoints.open(folder)
    reference = checkpoints.open(family.write_checkpoint(tmp_path / "plain", integer_models.CONFIG, plain))
    for param in source.params:
        found, wanted = (codecs.dequantize(each.read(param.name)) for each in (source, reference))
        assert np.array_equal(found, wanted), param.name
    name, expected = "layers.1.experts.up.weight", CASES[case][3]
    assert source.stored_as("layers.0.attention.q.weight")[0] == (AFFINE[expected] if expected else None)
    part = codecs.dequantize(source.read(name, range(1, 3)))
    assert np.array_equal(part, codecs.dequantize(source.read(name))[1:3])
    read = sum(source.read(param.name).nbytes for param in source.params)
    assert source.size_bytes + derived_bytes(source) == pytest.approx(read, rel=1e-3)
    assert source.format == CASES[case][1]["format"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["W4A16 g128", "W4A16_ASYM", "act-order", "W8A8"])
def test_logits(tmp_path, relative_error, backend_module, device_of, case, backend):
    backend_module(backend)
    folder, plain = made(tmp_path, case)
    with mlx_gptoss.load(folder, backend=backend, dtype="float32", device=device_of(backend)) as model:
        found = model.logits(IDS)
    assert relative_error(found, family.logits(plain, [integer_models.WINDOW, None], IDS)) < 1e-4


def test_show_names_the_storage_and_the_activation_scheme(tmp_path):
    summary = checkpoints.open(made(tmp_path, "W8A8")[0]).summary()
    assert "activation scheme (int8, dynamic, per token) is not applied" in summary.note
    assert summary.roles["attention"]["format"] == "affine8-g64+int8-row"  # o_proj has rows of 64


def test_one_scale_for_the_whole_tensor(tmp_path):
    def encode(rows, width, seed):
        parts, values = signed_bytes()(rows, width, seed)
        scale = parts["weight_scale"][:1, 0]
        values = parts["weight"].astype(np.float32) * scale.astype(np.float32)
        return parts | {"weight_scale": scale}, values

    stored, plain = integer_models.model(encode)
    config = config_of(INT, 8, None)
    config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    source = checkpoints.open(integer_models.write(tmp_path / "stored", stored, config))
    found = codecs.dequantize(source.read("layers.0.attention.q.weight"))
    assert np.array_equal(found, plain[f"{Q}.weight"])


def test_a_g_idx_that_is_not_used(tmp_path):
    """compressed-tensors fills it with -1 where the columns are in order."""
    encode = packed()
    stored, plain = integer_models.model(
        lambda rows, width, seed: (
            (made := encode(rows, width, seed))[0] | {"weight_g_idx": np.full(width, -1, np.int32)},
            made[1],
        )
    )
    source = checkpoints.open(integer_models.write(tmp_path / "stored", stored, config_of(PACKED, 4, 64)))
    assert np.array_equal(codecs.dequantize(source.read("layers.0.attention.q.weight")), plain[f"{Q}.weight"])


def test_conversion_keeps_codes_and_scales(tmp_path):
    folder, _ = made(tmp_path, "W4A16")
    convert(folder, tmp_path / "out", "mlx-4bit")
    name = "layers.0.experts.gate.weight"
    first, second = (checkpoints.open(each).read(name) for each in (folder, tmp_path / "out"))
    assert np.array_equal(first.codes, second.codes) and np.array_equal(first.scale, second.scale)


def without(part):
    return lambda stored: stored.pop(f"{Q}.{part}")


def put(part, change):
    return lambda stored: stored.update({f"{Q}.{part}": change(stored[f"{Q}.{part}"])})


def set_first(value):
    def change(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return change


def unchanged(stored):
    """No change."""


@pytest.mark.parametrize(
    ("case", "change", "config", "message"),
    [
        ("W4A16", without("weight_shape"), None, "missing: .*weight_shape"),
        ("W4A16", without("weight_scale"), None, "missing: .*weight_scale|scales for each row"),
        ("W4A16_ASYM", without("weight_zero_point"), None, "has no weight_zero_point"),
        ("W4A16", put("weight_shape", set_first(65)), None, r"says \[65, 192\], but"),
        ("W4A16", put("weight_packed", lambda a: a[:, :-1].copy()), None, "wrong shape"),
        ("W4A16", put("weight_packed", lambda a: a.astype(np.int64)), None, "weight_packed is I64"),
        ("W4A16", put("weight_scale", lambda a: a[:-1].copy()), None, "wrong shape"),
        ("W4A16", put("weight_scale", lambda a: a[:, :2].copy()), None, "2 scales for each row of 192"),
        ("W4A16", put("weight_scale", set_first(np.nan)), None, "not a number"),
        ("W4A16_ASYM", put("weight_zero_point", lambda a: a[:-1].copy()), None, "wrong shape"),
        ("W4A16_ASYM", put("weight_zero_point", lambda a: a.astype(np.int8)), None, "wrong dtype"),
        ("W4A16_ASYM", unchanged, config_of(PACKED, 4, 64), "has zero points, but"),
        ("W4A16", unchanged, config_of(PACKED, 4, 64, False), "has no weight_zero_point, but"),
        ("W4A16", unchanged, config_of(PACKED, 8, 64), "4 bits and 3 scales .*says 8 bits in groups of 64"),
        ("W4A16", unchanged, config_of(PACKED, 4, 32), "says 4 bits in groups of 32"),
        ("W8A16", unchanged, config_of(PACKED, 7, None), "8 bits and 1 scales .*says 7 bits"),
        ("W4A16", unchanged, config_of(PACKED, "4", 64), "which is no size"),
        ("act-order", put("weight_g_idx", set_first(3)), None, "from 0 to 3"),
        ("act-order", put("weight_g_idx", set_first(-1)), None, "from -1 to 2"),
        ("act-order", put("weight_scale", set_first(np.inf)), None, "not a number"),
        ("W8A8", put("weight", lambda a: a[:-1].copy()), None, "wrong shape"),
        ("W8A8", put("weight_scale", lambda a: a.astype(np.int16)), None, "wrong dtype"),
        ("W8A8, asymmetric groups", put("weight_zero_point", lambda a: a.astype(np.int32)), None, "wrong dtype"),
        ("W8A8", unchanged, {"quant_method": "compressed-tensors"}, "version None"),
    ],
)
def test_damage_and_disagreement_is_one_error(tmp_path, case, change, config, message):
    encoder, stored_config, keywords, _ = CASES[case]
    stored, _ = integer_models.model(encoder(), **keywords)
    change(stored)
    folder = integer_models.write(tmp_path / "stored", stored, config or stored_config)
    with pytest.raises(CheckpointError, match=message):
        for _ in checkpoints.open(folder).weights():
            pass
