"""GPTQ's and AWQ's packings: values as the formats define them and as the tools decode them, and float64 logits.

AutoRound's and GPTQModel's own layers pack and decode the matrices where these tools are installed.
"""

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
from mlx_gptoss.weights.tensor import AFFINE, Dense

IDS = list(range(40))
GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}, "quant_method": "gptq"}
AUTOROUND = {"autoround_version": "0.16.1", "quant_method": "auto-round"}
OLD_NAMES = {"gate": "gate_up.{}", "down": "down.{}"}  # GPTQModel's until March 2026
Q = "model.layers.0.self_attn.q_proj"


def gptq(bits=4, group=64, version=2, symmetric=False, reorder=False, g_idx=False):
    """An encoder: random integers in GPTQ's packing."""

    def encode(rows, width, seed):
        codes, scale, zeros = random_integers(rows, width, bits, group, seed, symmetric)
        order = np.arange(width) // group
        if reorder:
            order = np.random.default_rng(seed).permutation(order)
        parts = {"qweight": to_words(codes, bits).T, "scales": scale.T}
        parts["qzeros"] = to_words(zeros.T - (version == 1), bits)
        if reorder or g_idx:
            parts["g_idx"] = order.astype(np.int32)
        return parts, decoded(codes, scale, zeros, order)

    return encode


def awq(group=64, symmetric=False):
    """An encoder: random integers in AWQ's packing, eight numbers along N in the order 0, 2, 4, 6, 1, 3, 5, 7."""

    def words(numbers):
        return to_words(numbers.reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(numbers.shape), 4)

    def encode(rows, width, seed):
        codes, scale, zeros = random_integers(rows, width, 4, group, seed, symmetric)
        order = np.arange(width) // group
        return {"qweight": words(codes.T), "scales": scale.T, "qzeros": words(zeros.T)}, decoded(
            codes, scale, zeros, order
        )

    return encode


def by_autoround(bits, group, module, symmetric=False):
    """An encoder that AutoRound's own layer packs and, with float32 scales, decodes."""
    torch = pytest.importorskip("torch")
    layers = pytest.importorskip(module, reason="auto-round is not installed")

    def encode(rows, width, seed):
        codes, scale, zeros = random_integers(rows, width, bits, group, seed, symmetric)
        values = decoded(codes, scale, zeros, np.arange(width) // group)
        linear = torch.nn.Linear(width, rows, bias=False)
        linear.weight.data = torch.from_numpy(values)
        scales, points = torch.from_numpy(scale.astype(np.float32)), torch.from_numpy(zeros.astype(np.float32))
        if hasattr(layers, "WQLinear_GEMM"):
            layer = layers.WQLinear_GEMM.from_linear(linear, bits, group, scales=scales.T, zeros=points.T)
            found = layers.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), bits, group).T
        else:
            layer = layers.QuantLinear(bits, group, width, rows, bias=False)
            layer.device = "cpu"
            layer.pack(linear, scales, points, None, device="cpu")
            layer.scales = layer.scales.float()
            found = layer(torch.eye(width)).T
        parts = {name: getattr(layer, name).numpy() for name in ("qweight", "qzeros")}
        return parts | {"scales": layer.scales.half().numpy()}, found.float().contiguous().numpy()

    return encode


def by_gptqmodel(bits, group, version, reorder=False):
    """An encoder that GPTQModel's own layer packs and, with float32 scales, decodes."""
    torch = pytest.importorskip("torch")
    linear_module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="gptqmodel is not installed")
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    def encode(rows, width, seed):
        codes, scale, zeros = random_integers(rows, width, bits, group, seed, False)
        if version == 1:
            zeros[::3] = 0  # its version 1 borrows from the next zero point of the word
        order = np.arange(width) // group
        if reorder:
            order = np.random.default_rng(seed).permutation(order)
        linear = torch.nn.Linear(width, rows, bias=False)
        linear.weight.data = torch.from_numpy(decoded(codes, scale, zeros, order))
        layer = linear_module.TorchLinear(
            bits, group, sym=False, desc_act=reorder, in_features=width, out_features=rows, register_buffers=True
        )
        scales, points = torch.from_numpy(scale), torch.from_numpy(zeros.astype(np.int32))
        layer.pack_original(linear, scales, points, torch.from_numpy(order.astype(np.int32)))
        layer.scales = layer.scales.float()
        found = layer.dequantize_weight().T.float().contiguous().numpy()
        if version == 1:

            class Config:
                bits = layer.bits
                pack_dtype = torch.int32

            convert_gptq_v2_to_v1_format_module(layer, Config)
        parts = {name: getattr(layer, name).numpy() for name in ("qweight", "qzeros", "g_idx")}
        return parts | {"scales": layer.scales.half().numpy()}, found

    return encode


def gptqmodel_config(bits, group, **others):
    return GPTQMODEL | {"bits": bits, "group_size": group, "sym": False, "checkpoint_format": "gptq_v2"} | others


def autoround_config(bits, group, packing, **others):
    return AUTOROUND | {"bits": bits, "group_size": group, "sym": False, "packing_format": packing} | others


V1, V2, AWQ = "auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq"
ZP, RAW = "auto_round_extension.torch.qlinear_torch_zp", "auto_round_extension.torch.qlinear_torch"
AWQ_LAYER = "auto_round.export.export_to_awq.utils"
CASES = {  # name -> (encoder, quantization_config, keywords of the model, the storage of q in memory or None)
    "v2 g64": (lambda: gptq(), gptqmodel_config(4, 64), {"half_split": True}, (4, 64)),
    "v1 g64 g_idx": (
        lambda: gptq(version=1, g_idx=True),
        gptqmodel_config(4, 64, checkpoint_format="gptq", desc_act=False),
        {"half_split": True},
        (4, 64),
    ),
    "g128, whose last group is shorter": (
        lambda: gptq(group=128),
        gptqmodel_config(4, 128),
        {"half_split": True},
        (4, 64),
    ),
    "a scale per row": (lambda: gptq(8, 192), gptqmodel_config(8, -1), {"half_split": True}, (8, 64)),
    "act-order": (lambda: gptq(reorder=True), gptqmodel_config(4, 64, desc_act=True), {"half_split": True}, None),
    "groups of 16": (lambda: gptq(group=16), gptqmodel_config(4, 16), {"half_split": True}, None),
    "3 bits": (lambda: gptq(3, 32), gptqmodel_config(3, 32), {"half_split": True}, (3, 32)),
    "2 bits v1": (
        lambda: gptq(2, 32, version=1),
        gptqmodel_config(2, 32, checkpoint_format="gptq"),
        {"half_split": True},
        (2, 32),
    ),
    "GPTQModel's older names": (lambda: gptq(g_idx=True), gptqmodel_config(4, 64), {"names": OLD_NAMES}, (4, 64)),
    "AutoRound's gptq, with lm_head": (
        lambda: gptq(8, 32, version=1, g_idx=True),
        {"provider": "auto-round", "quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False},
        {"lm_head": True},
        (8, 32),
    ),
    "with a quantized router": (
        lambda: gptq(8),
        gptqmodel_config(8, 64),
        {"half_split": True, "router": True},
        (8, 64),
    ),
    "AutoRound v1 8 bits": (
        lambda: gptq(8, 128, version=1, symmetric=True),
        autoround_config(8, 128, V1, sym=True),
        {},
        (8, 64),
    ),
    "AutoRound v2 5 bits": (lambda: gptq(5, 32), autoround_config(5, 32, V2), {}, (5, 32)),
    "AWQ": (lambda: awq(32), autoround_config(4, 32, AWQ), {}, (4, 32)),
    "AWQ by GPTQModel": (
        lambda: awq(),
        gptqmodel_config(4, 64, quant_method="awq", checkpoint_format="gemm"),
        {"half_split": True},
        (4, 64),
    ),
}
CASES |= {
    f"AutoRound's {kind} layer, {bits} bits g{group}": (
        lambda bits=bits, group=group, layer=layer: by_autoround(bits, group, layer),
        autoround_config(bits, group, packing),
        {},
        (bits, group),
    )
    for bits, group in ((2, 64), (3, 32), (4, 64), (6, 32), (8, 32))
    for kind, layer, packing in (("zp", ZP, V1), ("raw", RAW, V2))
}
CASES |= {
    "AutoRound's AWQ layer": (lambda: by_autoround(4, 32, AWQ_LAYER), autoround_config(4, 32, AWQ), {}, (4, 32)),
    **{
        f"GPTQModel's layer, {bits} bits v{version}": (
            lambda bits=bits, version=version: by_gptqmodel(bits, 64, version),
            gptqmodel_config(bits, 64, checkpoint_format="gptq" if version == 1 else "gptq_v2"),
            {"half_split": True},
            (bits, 64),
        )
        for bits, version in ((2, 1), (3, 2), (4, 1), (4, 2), (8, 1))
    },
    "GPTQModel's layer, act-order": (
        lambda: by_gptqmodel(4, 32, 2, reorder=True),
        gptqmodel_config(4, 32, desc_act=True),
        {"half_split": True},
        None,
    ),
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
    assert source.stored_as("layers.1.router.weight")[0] == (
        AFFINE[8, 64] if case == "with a quantized router" else None
    )
    assert source.stored_as("layers.0.attention.q.weight")[0] == (AFFINE[expected] if expected else None)
    part = codecs.dequantize(source.read(name, range(1, 3)))
    assert np.array_equal(part, codecs.dequantize(source.read(name))[1:3])
    read = sum(source.read(param.name).nbytes for param in source.params)
    assert source.size_bytes + derived_bytes(source) == pytest.approx(read, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", ["g128, whose last group is shorter", "act-order", "3 bits", "with a quantized router", "AWQ"]
)
def test_logits(tmp_path, relative_error, backend_module, device_of, case, backend):
    backend_module(backend)
    folder, plain = made(tmp_path, case)
    with mlx_gptoss.load(folder, backend=backend, dtype="float32", device=device_of(backend)) as model:
        found = model.logits(IDS)
    assert relative_error(found, family.logits(plain, [integer_models.WINDOW, None], IDS)) < 1e-4


def test_show_and_conversion(tmp_path):
    folder, _ = made(tmp_path, "act-order")
    summary = checkpoints.open(folder).summary()
    assert summary.format == "gptq" and "act-order" in summary.note and "decoded to float32" in summary.note
    assert summary.roles["experts"]["format"] == "int4-g64-act-order"
    assert 4 < summary.roles["attention"]["bits"] < 5
    convert(folder, tmp_path / "out", "mlx-8bit")
    assert checkpoints.open(tmp_path / "out").format == "mlx-8bit"


def test_a_conversion_keeps_codes_and_the_float32_biases(tmp_path):
    folder, _ = made(tmp_path, "v2 g64")
    convert(folder, tmp_path / "out", "mlx-4bit")
    for name in ("layers.0.experts.gate.weight", "layers.1.attention.v.weight"):
        first, second = (checkpoints.open(each).read(name) for each in (folder, tmp_path / "out"))
        assert np.array_equal(codecs.dequantize(first), codecs.dequantize(second))


def test_bits_and_groups_of_single_modules(tmp_path):
    """AutoRound's extra_config: q in 8 bits by its name, down in 2 bits and groups of 32 by a pattern."""
    eight, two, four = gptq(8, 64, 1, True), gptq(2, 32, 1, True), gptq(4, 64, 1, True)

    def encode(rows, width, seed):
        return (two if width == integer_models.INNER else eight if rows == 64 else four)(rows, width, seed)

    stored, plain = integer_models.model(encode)
    queries = {f"model.layers.{layer}.self_attn.q_proj": {"bits": 8} for layer in range(2)}
    patterns = {r"model\.layers.*\.(down|o)_proj": {"bits": 2, "group_size": 32}, ".*(gate|up)_proj.*": {"bits": 8}}
    config = autoround_config(4, 64, V1, sym=True, extra_config=queries | patterns)
    source = checkpoints.open(integer_models.write(tmp_path / "stored", stored, config))
    assert source.format == "auto-round"
    assert source.stored_as("layers.0.attention.q.weight") == (AFFINE[8, 64], "F16")
    assert source.stored_as("layers.0.experts.down.weight") == (AFFINE[2, 32], "F16")
    found = codecs.dequantize(source.read("layers.1.attention.q.weight"))
    assert np.array_equal(found, plain["model.layers.1.self_attn.q_proj.weight"])


def test_experts_that_were_left_dense_are_split_in_halves_too(tmp_path):
    """GPTQModel's `dynamic` leaves modules dense, under the names of the split."""

    def encode(rows, width, seed):
        if width == integer_models.HIDDEN and rows == integer_models.INNER:
            values = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
            return {"weight": values}, values
        return gptq()(rows, width, seed)

    stored, plain = integer_models.model(encode, half_split=True)
    config = gptqmodel_config(4, 64, dynamic={r"-:.*(q|gate|up)_proj": {}})
    source = checkpoints.open(integer_models.write(tmp_path / "stored", stored, config))
    weight = source.read("layers.0.experts.up.weight")
    assert isinstance(weight, Dense)
    wanted = plain["model.layers.0.mlp.experts.gate_up_proj"].swapaxes(1, 2)[:, 1::2]
    assert np.array_equal(weight.values, wanted)


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


@pytest.mark.parametrize(
    ("case", "change", "config", "message"),
    [
        ("v2 g64", without("qzeros"), {}, "missing: .*q_proj.qzeros"),
        ("v2 g64", without("scales"), {}, "0 scales for each row"),
        ("v2 g64", put("qweight", lambda a: a[:-1]), {}, "wrong shape"),
        ("v2 g64", put("qweight", lambda a: a.astype(np.int64)), {}, "wrong dtype"),
        ("v2 g64", put("scales", lambda a: a.astype(np.int16)), {}, "wrong dtype"),
        ("v2 g64", put("qzeros", lambda a: a[:, :-1].copy()), {}, "wrong shape"),
        ("v2 g64", put("scales", lambda a: a[:2].copy()), {}, "2 scales for each row of 192 .*says 4 bits in groups"),
        ("v2 g64", put("scales", set_first(np.nan)), {}, "not a number"),
        ("act-order", put("scales", set_first(np.inf)), {}, "not a number"),
        ("act-order", put("g_idx", set_first(3)), {}, "from 0 to 3, but there are 3"),
        ("act-order", put("g_idx", set_first(-1)), {}, "from -1 to 2"),
        ("act-order", put("g_idx", lambda a: a[:-1].copy()), {}, "wrong shape"),
        ("act-order", lambda stored: None, {"desc_act": False}, "desc_act is not true"),
        ("v2 g64", lambda stored: None, {"desc_act": True}, "missing: .*g_idx"),
        ("v2 g64", lambda stored: None, {"bits": 8}, "4 bits and 3 scales .*says 8 bits"),
        ("v2 g64", lambda stored: None, {"bits": 10**400}, "which is no size"),
        ("v2 g64", lambda stored: None, {"group_size": "64"}, "which is no size"),
        ("v2 g64", lambda stored: None, {"group_size": 0}, "groups of 0"),
        ("v2 g64", lambda stored: None, {"sym": True}, "so the zero point is not 8"),
        ("v2 g64", lambda stored: None, {"checkpoint_format": "marlin"}, "packing marlin"),
        ("v2 g64", lambda stored: None, {"quant_method": "awq"}, "says AWQ"),
        ("v2 g64", lambda stored: None, {"rotation": "hadamard"}, "rotates activations"),
        ("v2 g64", lambda stored: None, {"meta": None}, "meta.quantizer ''"),
        ("v2 g64", lambda stored: None, {"meta": {"quantizer": ["gptqmodel:8.0.0"]}}, "gptqmodel:8.0.0"),
        ("AWQ", lambda stored: None, {"packing_format": V1}, "has AWQ packing"),
        ("3 bits", lambda stored: None, {"checkpoint_format": "gptq_p"}, "bit planes"),
        ("AutoRound v2 5 bits", lambda stored: None, GPTQMODEL, "bit planes"),
    ],
)
def test_damage_and_disagreement_is_one_error(tmp_path, case, change, config, message):
    encoder, stored_config, keywords, _ = CASES[case]
    stored, _ = integer_models.model(encoder(), **keywords)
    change(stored)
    folder = integer_models.write(tmp_path / "stored", stored, stored_config | config)
    with pytest.raises(CheckpointError, match=message):
        for _ in checkpoints.open(folder).weights():
            pass


@pytest.mark.parametrize("group", [96, 128])
def test_groups_that_shapes_do_not_tell(tmp_path, group):
    """Two scales in a row of 192 are groups of 96, or of 128 with a shorter last one."""
    stored, _ = integer_models.model(gptq(group=group), half_split=True)
    config = gptqmodel_config(None, None)
    with pytest.raises(CheckpointError, match="may be groups of 96 and 128"):
        checkpoints.open(integer_models.write(tmp_path / "stored", stored, config))


def test_a_zero_point_that_version_1_cannot_store(tmp_path):
    stored, _ = integer_models.model(gptq(version=1))
    stored[f"{Q}.qzeros"] = np.full_like(stored[f"{Q}.qzeros"], -1)
    folder = integer_models.write(tmp_path / "stored", stored, autoround_config(4, 64, V1))
    with pytest.raises(CheckpointError, match="read as 0 and others read as 16"):
        checkpoints.open(folder).read("layers.0.attention.q.weight")
