"""int4-autoround: read as an independent unpacking reads it and run as stored; what we write equals AutoRound's bytes;
its own code unpacks ours where it is installed; packings that mean something else are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint, codecs, quantization
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.tensor import AFFINE4, Dense, Quantized

EXPERTS = 6
SEVENS, EIGHTS = 0x77777777, -0x77777778  # eight nibbles of 7, and of 8, as a signed word
MODULE = "model.layers.0.mlp.experts.{}.gate_proj"
NAME = "layers.0.experts.gate.weight"


@pytest.fixture
def variant(mini, tmp_path):
    """variant(tensors, config) -> a copy of the fixture whose dict of tensors and quantization_config these change."""

    def make(tensors=lambda found: None, config=lambda found: None) -> Path:
        folder = tmp_path / "variant"
        folder.mkdir()
        settings = json.loads((mini / "int4-autoround/config.json").read_text())
        found = stored(mini / "int4-autoround")
        tensors(found)
        config(settings["quantization_config"])
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return {name: (tensor.dtype, tensor.shape, raw(tensor)) for name, tensor in tensors.items()}


def unpacked(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """[N, K] by FORMATS' formula: code[8r + j, n] = (qweight[r, n] >> 4j) & 15, w = scale * (code - 8)."""
    words = tensors[f"{module}.qweight"].long()
    codes = (words[:, None, :] >> (4 * torch.arange(8))[None, :, None]) & 15
    codes = codes.reshape(-1, words.shape[1])
    scale = tensors[f"{module}.scales"].float().repeat_interleave(64, dim=0)
    return (scale * (codes - 8)).T


def all_unpacked(tensors: dict[str, torch.Tensor], layer: int, part: str) -> np.ndarray:
    modules = [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj" for expert in range(EXPERTS)]
    return torch.stack([unpacked(tensors, module) for module in modules]).numpy()


def read(folder: Path, name: str = NAME) -> np.ndarray:
    return codecs.dequantize(checkpoint.open(folder).read(name))


def test_runs_as_stored(mini, relative_error):
    wanted = load_numpy(mini / "int4-autoround.reference.safetensors")
    opened = checkpoint.open(mini / "int4-autoround")
    assert opened.format == "int4-autoround"
    runner = backend.load(opened, device="cpu", dtype="float32", limits=Limits(1, 200, 64))
    assert relative_error(runner.logits(wanted["prompt"].tolist()), wanted["logits"]) < 1e-4


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_decodes_exactly(part, mini):
    opened, tensors = checkpoint.open(mini / "int4-autoround"), stored(mini / "int4-autoround")
    for layer in range(2):
        weight = opened.read(f"layers.{layer}.experts.{part}.weight")
        assert isinstance(weight, Quantized)
        assert weight.spec == AFFINE4
        assert weight.scale.dtype == weight.bias.dtype == np.float16
        assert (weight.scale < 0).mean() > 0.5
        assert np.array_equal(codecs.dequantize(weight), all_unpacked(tensors, layer, part))
        bias = codecs.dequantize(opened.read(f"layers.{layer}.experts.{part}.bias"))
        modules = [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.bias" for expert in range(EXPERTS)]
        assert np.array_equal(bias, torch.stack([tensors[name] for name in modules]).float().numpy())


@pytest.mark.parametrize("source", ["mxfp4", "int4-autoround"])
def test_written_equals_autorounds_file(source, mini, tmp_path):
    """From OpenAI's own checkpoint by quantizing, from its own file by copying: the same bytes and settings."""
    convert(mini / source, tmp_path / "out", "int4-autoround")
    assert bits(stored(tmp_path / "out")) == bits(stored(mini / "int4-autoround"))
    block = json.loads((mini / "int4-autoround/quantization_config.json").read_text())
    assert json.loads((tmp_path / "out/quantization_config.json").read_text()) == block
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == block


def test_to_mlx_and_back_loses_nothing(variant, tmp_path):
    """Affine with the float16 scales as they are; these would not survive bfloat16."""
    source = variant(with_noise(torch.float16))
    wanted = stored(source)
    convert(source, tmp_path / "mlx", "mlx-4bit")
    scales = stored(tmp_path / "mlx")["model.layers.0.mlp.experts.gate_proj.scales"]
    assert scales.dtype == torch.float16
    assert not torch.equal(scales.bfloat16().half(), scales)
    for part in ("gate", "up", "down"):
        name = f"layers.1.experts.{part}"
        assert np.array_equal(read(tmp_path / "mlx", f"{name}.weight"), all_unpacked(wanted, 1, part))
    convert(tmp_path / "mlx", tmp_path / "back", "int4-autoround")
    experts = {name: value for name, value in bits(wanted).items() if ".experts." in name}
    assert {name: value for name, value in bits(stored(tmp_path / "back")).items() if name in experts} == experts


def test_affine_that_is_not_symmetric_is_quantized_anew(mini, tmp_path):
    convert(mini / "mlx-4bit", tmp_path / "out", "int4-autoround")
    source = checkpoint.open(mini / "mlx-4bit").read(NAME)
    wanted = quantization.quantize_symmetric(source)
    assert np.array_equal(read(tmp_path / "out"), codecs.dequantize(wanted))
    error = np.abs(codecs.dequantize(source) - codecs.dequantize(wanted))
    steps = np.abs(np.repeat(wanted.scale.astype(np.float32), 64, axis=-1))
    assert (error <= 1.01 * steps).all()  # half a step, a whole one at the end that has no code


def with_noise(dtype: torch.dtype):
    """Scales that fill their dtype."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith("scales")]:
            noise = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(len(name)))
            tensors[name] = (tensors[name].float() * (1 + noise)).to(dtype)

    return change


def with_g_idx(order=lambda width: torch.arange(width) // 64):
    def add(tensors):
        for name in [name for name in tensors if name.endswith("qweight")]:
            width = tensors[name].shape[0] * 8
            tensors[name.replace("qweight", "g_idx")] = order(width).int()

    return add


def with_zeros(word: int):
    def change(tensors):
        for name in [name for name in tensors if name.endswith("qzeros")]:
            tensors[name] = torch.full_like(tensors[name], word)

    return change


def both(*changes):
    return lambda tensors: [change(tensors) for change in changes]


def packing(**settings):
    """A quantization_config of these settings alone."""
    return lambda block: (block.clear(), block.update(settings))


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (
            both(with_zeros(EIGHTS), with_g_idx()),
            packing(quant_method="auto-round", packing_format="auto_round:gptqmodel"),
        ),
        (with_zeros(EIGHTS), packing(quant_method="gptq", checkpoint_format="gptq_v2", sym=True)),
        (with_g_idx(), packing(quant_method="gptq", bits=4, group_size=64, sym=True, desc_act=False)),
        (with_g_idx(), packing(quant_method="gptq", checkpoint_format="gptq", desc_act=True)),
        (with_zeros(EIGHTS), packing()),
        (with_zeros(SEVENS), packing()),
    ],
)
def test_other_packings_of_the_same_weights(tensors, config, variant, mini):
    assert np.array_equal(read(variant(tensors, config)), read(mini / "int4-autoround"))


def test_shards_of_one_layer_differ_only_where_they_say(variant, mini):
    """Mixtures: one layer's experts and all attention dense, another attention matrix in integers."""

    def mix(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.1.mlp.experts") and "qweight" in name]:
            module = name.removesuffix(".qweight")
            tensors[f"{module}.weight"] = unpacked(tensors, module).bfloat16()
            for part in ("qweight", "qzeros", "scales"):
                del tensors[f"{module}.{part}"]
        module = "model.layers.0.self_attn.k_proj"
        del tensors[f"{module}.weight"]
        tensors[f"{module}.qweight"] = torch.randint(-(2**31), 2**31 - 1, (24, 128), dtype=torch.int32)
        tensors[f"{module}.qzeros"] = torch.full((3, 16), SEVENS, dtype=torch.int32)
        tensors[f"{module}.scales"] = torch.randn(3, 128).half()

    folder = variant(mix)
    opened, tensors = checkpoint.open(folder), stored(folder)
    assert opened.format == "int4-autoround"
    assert opened.summary().roles["experts"]["format"] == "affine4-g64+bf16"
    dense = opened.read("layers.1.experts.up.weight")
    assert isinstance(dense, Dense)
    rounded = torch.from_numpy(read(mini / "int4-autoround", "layers.1.experts.up.weight")).bfloat16().float()
    assert np.array_equal(codecs.dequantize(dense), rounded.numpy())
    k = opened.read("layers.0.attention.k.weight")
    assert np.array_equal(codecs.dequantize(k), unpacked(tensors, "model.layers.0.self_attn.k_proj").numpy())


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)])
def test_scales_of_every_dtype(dtype, exact, variant):
    """code * scale is exact in float32 but for scales that are themselves as long."""
    folder = variant(with_noise(dtype))
    got, wanted = read(folder), all_unpacked(stored(folder), 0, "gate")
    assert np.array_equal(got, wanted) or not exact
    assert np.allclose(got, wanted, rtol=0, atol=2**-20)


def repacked(shape, **others):
    """One module with words of another shape, as other bits, groups or packings have; config.json silent."""

    def change(tensors):
        for name in [name for name in tensors if ".experts.0.gate_proj.qweight" in name]:
            tensors[name] = torch.zeros(shape, dtype=torch.int32)
            for part, other in others.items():
                tensors[name.replace("qweight", part)] = torch.zeros(other, dtype=torch.float16)

    return change


def renamed(tensors):
    for name in [name for name in tensors if ".experts." in name]:
        old = re.sub(r"experts\.(\d)\.(gate|up|down)_proj", r"experts.\2_projs.\1", name)
        tensors[old.replace("gate_projs", "gate_up_projs")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (lambda t: None, lambda block: block.update(packing_format="auto_round:auto_awq"), "uses AWQ packing"),
        (lambda t: None, packing(quant_method="awq"), "uses AWQ packing"),
        (repacked((192, 8)), packing(), "uses AWQ packing"),
        (lambda t: None, lambda block: block.update(sym=False), "asymmetrically"),
        (repacked((48, 64)), lambda block: None, "has 8 bits per weight"),
        (repacked((12, 64)), lambda block: None, "has 2 bits per weight"),
        (repacked((18, 64)), lambda block: None, "has 3 bits per weight"),
        (repacked((24, 64), scales=(6, 64)), lambda block: None, "has groups of 32"),
        (repacked((24, 64), scales=(1, 64)), lambda block: None, "has groups of 192"),
        (repacked((24, 64), scales=(2, 64)), lambda block: None, "has groups of 96"),
        (renamed, lambda block: None, r"names like .*_projs\.0"),
        (repacked((23, 64)), lambda block: None, "wrong shape: .*0.gate_proj.qweight"),
        (lambda t: t.pop(MODULE.format(2) + ".qzeros"), lambda b: None, "missing: .*2.gate_proj.qzeros"),
        (
            lambda t: t.update({MODULE.format(1) + ".extra": torch.ones(1)}),
            lambda b: None,
            "unknown: .*gate_proj.extra",
        ),
        (
            lambda t: t.update({MODULE.format(1) + ".g_idx": torch.ones(1)}),
            lambda b: None,
            "unknown: .*gate_proj.g_idx",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tensors, config, message, variant):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(variant(tensors, config))


def with_value(part: str, value: float):
    def change(tensors):
        tensors[f"{MODULE.format(3)}.{part}"][0, 1] = value

    return change


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (with_g_idx(lambda width: torch.arange(width).flip(0) // 64), lambda block: None, "act-order"),
        (with_zeros(EIGHTS), lambda block: None, "not 7 throughout"),
        (with_zeros(SEVENS), packing(packing_format="auto_round:gptqmodel"), "not 8 throughout"),
        (with_zeros(0x66666666), packing(), "asymmetric"),
        (with_value("qzeros", 0x77777787), lambda block: None, "asymmetric"),
        (with_value("scales", 60000.0), lambda block: None, "too large"),
        (with_value("scales", float("nan")), lambda block: None, "not a number"),
        (with_value("scales", float("-inf")), lambda block: None, "not a number"),
    ],
)
def test_values_that_cannot_be_read_are_named(tensors, config, message, variant):
    opened = checkpoint.open(variant(tensors, config))
    with pytest.raises(CheckpointError, match=message):
        opened.read(NAME)


def test_more_experts_than_tensors_is_one_error(variant, mini):
    folder = variant()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_local_experts": 16_000_000}))
    with pytest.raises(CheckpointError, match="16000000 experts"):
        checkpoint.open(folder)


def difficult() -> torch.Tensor:
    """bfloat16 [200, 256]: normal rows of many sizes, one-sided and constant ones, zeros, ties of extremes."""
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


def test_largest_gets_code_zero():
    values = difficult().float().numpy()
    got = quantization.quantize_symmetric(Dense(values))
    codes = codecs.unpack(got.codes, 4).reshape(-1, 64)
    groups = values.reshape(-1, 64)
    normal = np.abs(groups).max(axis=1) > 1e-3
    largest = np.abs(groups).argmax(axis=1)
    assert (codes[np.arange(len(codes)), largest] == 0)[normal].mean() > 0.9  # float16 rounds some scales up
    assert np.array_equal(got.bias, -8 * got.scale)
    assert not np.signbit(got.scale.reshape(200, 4)[:2]).any()


def test_too_large_for_float16():
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


@pytest.fixture(scope="module")
def quant_linear():
    """AutoRound's own module for `auto_round:auto_gptq`."""
    why = "auto-round (with what it imports) is not installed"
    return pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp", reason=why).QuantLinear


def filled(quant_linear, tensors: dict[str, torch.Tensor], module: str):
    words = tensors[f"{module}.qweight"]
    layer = quant_linear(4, 64, words.shape[0] * 8, words.shape[1], bias=True)
    layer.load_state_dict({part: tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "bias")})
    return layer


def test_autoround_unpacks_what_we_write(quant_linear, mini, tmp_path):
    convert(mini / "mxfp4", tmp_path / "out", "int4-autoround")
    tensors, ours = stored(tmp_path / "out"), read(tmp_path / "out")
    for expert in range(EXPERTS):
        layer = filled(quant_linear, tensors, MODULE.format(expert))
        with torch.no_grad():
            theirs = layer(torch.eye(192)) - layer.bias  # the rows of the identity pick out the columns
        assert torch.allclose(theirs.float().T, torch.from_numpy(ours[expert]), rtol=0, atol=2e-3)
        assert torch.equal(theirs.float().T.sign(), torch.from_numpy(ours[expert]).sign())


def test_quantizes_and_packs_as_autoround_does(quant_linear):
    from auto_round.data_type.int import quant_tensor_sym

    values = difficult()
    rounded, scale, zero = quant_tensor_sym(values, bits=4, group_size=64)
    linear = torch.nn.Linear(256, 200, bias=False, dtype=torch.bfloat16)
    linear.weight.data = rounded
    layer = quant_linear(4, 64, 256, 200, bias=False)
    layer.pack(linear, scale.reshape(200, -1), zero, None, device="cpu")
    ours = quantization.quantize_symmetric(Dense(values.float().numpy()))
    assert np.array_equal(ours.scale.T, layer.scales.numpy())
    assert np.array_equal(ours.codes.view(np.int32).T, layer.qweight.numpy())
