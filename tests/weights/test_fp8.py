"""compressed-tensors' formats: every layout read as an independent decoding reads it and run as stored; what we write
equals the tool's bytes; the tool itself agrees where it is installed; whatever cannot be read is refused by name."""

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
from mlx_gptoss.weights.tensor import FP8_ROW, MXFP4, NVFP4, Dense, Quantized

LAYOUTS = {  # fixture -> the reference that belongs to it
    "fp8-dynamic": "fp8-dynamic",
    "fp8-half-split": "fp8-dynamic",
    "fp8-doubled-names": "fp8-dynamic",
    "fp8-attention-only": "fp8-attention-only",
}
EXPERTS = 6
FUSED = ["gate", "up"]  # interleaved row by row
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Q = "model.layers.0.self_attn.q_proj"
GATE = "model.layers.0.mlp.experts.{}.gate_proj"


@pytest.fixture
def fixture(mini, shared):
    """fixture("fp8-dynamic") -> its folder, in the repository or among the shared files."""

    def find(name: str) -> Path:
        folders = [root / name for root in (mini, shared / "fixtures" / "mini")]
        found = next((folder for folder in folders if folder.exists()), None)
        return found or pytest.skip(f"the fixture {name} is not in this checkout and the shared files are absent")

    return find


@pytest.fixture
def variant(fixture, tmp_path):
    """variant("fp8-dynamic", tensors, config) -> a copy whose dict of tensors and config.json these have changed."""

    def make(name: str, tensors=lambda found: None, config=lambda found: None) -> Path:
        source, folder = fixture(name), tmp_path / "variant"
        folder.mkdir()
        found, settings = stored(source), json.loads((source / "config.json").read_text())
        tensors(found)
        config(settings)
        save_file({key: value.contiguous() for key, value in found.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return {name: (tensor.dtype, tensor.shape, raw(tensor)) for name, tensor in tensors.items()}


def version(text: object):
    """A change of config.json."""
    return lambda settings: settings["quantization_config"].update(version=text)


def decoded(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    scale = tensors.get(f"{module}.weight_scale", torch.tensor(1.0))
    return tensors[f"{module}.weight"].float() * scale.float()


def read(folder: Path, name: str) -> np.ndarray:
    return codecs.dequantize(checkpoint.open(folder).read(name))


def expected_experts(tensors: dict[str, torch.Tensor], layout: str, layer: int, part: str, kind: str) -> torch.Tensor:
    """The experts of one part, decoded without the code under test, rows told apart as the layout says."""
    prefix = f"model.layers.{layer}.mlp.experts."
    if layout == "fp8-attention-only":
        name = prefix + ("down_proj" if part == "down" else "gate_up_proj") + ("_bias" if kind == "bias" else "")
        rows = tensors[name].float() if kind == "bias" else tensors[name].float().mT
        return rows if part == "down" else rows[:, FUSED.index(part) :: 2]
    prefix += "experts." if layout == "fp8-doubled-names" else ""

    def one(expert: int, part: str) -> torch.Tensor:
        module = f"{prefix}{expert}.{part}_proj"
        return decoded(tensors, module) if kind == "weight" else tensors[f"{module}.bias"].float()

    if layout == "fp8-half-split" and part != "down":
        both = [torch.cat([one(expert, "gate"), one(expert, "up")]) for expert in range(EXPERTS)]
        return torch.stack([rows[FUSED.index(part) :: 2] for rows in both])
    return torch.stack([one(expert, part) for expert in range(EXPERTS)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_runs_as_stored(layout, fixture, relative_error):
    folder = fixture(layout)
    wanted = load_numpy(fixture(LAYOUTS[layout] + ".reference.safetensors"))
    runner = backend.load(checkpoint.open(folder), device="cpu", dtype="float32", limits=Limits(1, 200, 64))
    assert relative_error(runner.logits(wanted["prompt"].tolist()), wanted["logits"]) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_decodes_exactly(layout, fixture):
    opened, tensors = checkpoint.open(fixture(layout)), stored(fixture(layout))
    assert opened.format == "fp8-dynamic"
    for param in opened.params:
        got = codecs.dequantize(opened.read(param.name))
        if param.role == "experts":
            part, kind = param.name.split(".")[3:]
            wanted = expected_experts(tensors, layout, param.layer, part, kind)
        elif param.role == "attention":
            part, kind = param.name.split(".")[3:]
            module = f"model.layers.{param.layer}.self_attn.{part}_proj"
            wanted = decoded(tensors, module) if kind == "weight" else tensors[f"{module}.bias"].float()
        else:
            continue
        assert got.shape == param.shape
        assert np.array_equal(got, wanted.numpy()), param.name


def test_codes_and_scales_are_kept(fixture):
    opened, tensors = checkpoint.open(fixture("fp8-dynamic")), stored(fixture("fp8-dynamic"))
    weight = opened.read("layers.1.experts.down.weight")
    assert isinstance(weight, Quantized)
    assert weight.spec == FP8_ROW
    assert weight.scale is None
    for expert in range(EXPERTS):
        module = f"model.layers.1.mlp.experts.{expert}.down_proj"
        assert np.array_equal(weight.codes[expert], tensors[f"{module}.weight"].view(torch.uint8).numpy())
        scale = tensors[f"{module}.weight_scale"].float().numpy()
        assert np.array_equal(weight.outer[expert].astype(np.float32), scale)


def test_summary_by_role(fixture):
    roles = checkpoint.open(fixture("fp8-dynamic")).summary().roles
    assert roles["experts"]["format"] == roles["attention"]["format"] == "fp8"
    assert roles["router"]["format"] == "bf16"
    rows, values = 256 + 128 + 128 + 192, (256 + 128 + 128) * 192 + 192 * 256
    assert roles["attention"]["bits"] == pytest.approx(8 + 16 * rows / values)


@pytest.mark.parametrize("source", ["mxfp4", "fp8-half-split", "fp8-doubled-names", "fp8-dynamic"])
def test_written_equals_the_tools_file(source, fixture, tmp_path):
    """From OpenAI's own checkpoint by quantizing, from the other layouts by renaming: the same bytes."""
    report = convert(fixture(source), tmp_path / "out", "fp8-dynamic")
    assert report.format == "fp8-dynamic"
    assert bits(stored(tmp_path / "out")) == bits(stored(fixture("fp8-dynamic")))
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", fixture("fp8-dynamic")))
    assert ours["quantization_config"] == theirs["quantization_config"]


def test_bf16_experts_become_fp8(fixture, tmp_path):
    convert(fixture("fp8-attention-only"), tmp_path / "out", "fp8-dynamic")
    assert bits(stored(tmp_path / "out")) == bits(stored(fixture("fp8-dynamic")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_of_another_dtype_are_kept(dtype, variant, tmp_path):
    """Values that bfloat16 cannot hold, read exactly and written back as they are."""

    def widen(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            noise = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(len(name)))
            tensors[name] = (tensors[name].float() * (1 + noise / 100)).to(dtype)

    folder = variant("fp8-dynamic", widen)
    tensors = stored(folder)
    wanted = torch.stack([decoded(tensors, GATE.format(expert)) for expert in range(EXPERTS)])
    assert np.array_equal(read(folder, "layers.0.experts.gate.weight"), wanted.numpy())
    convert(folder, tmp_path / "out", "fp8-dynamic")
    assert bits(stored(tmp_path / "out")) == bits(tensors)


@pytest.mark.parametrize(
    ("text", "halves"),
    [(text, True) for text in ("0.17.1", "0.17.1.a20260701", "0.18", "0.18.4.dev3+g1")]
    + [(text, False) for text in ("0.19.0", "0.19", "0.17.0", "0.16.0", "1.0.0")],
)
def test_the_version_tells_halves_from_gate_and_up(text, halves, variant, fixture):
    right = read(fixture("fp8-dynamic"), "layers.0.experts.up.weight")
    got = read(variant("fp8-half-split", config=version(text)), "layers.0.experts.up.weight")
    assert np.array_equal(got, right) == halves


@pytest.mark.parametrize("text", [None, "", "latest", 0.19, "9" * 5000])
def test_an_unknown_version_is_refused(text, variant):
    with pytest.raises(CheckpointError, match="version"):
        checkpoint.open(variant("fp8-dynamic", config=version(text)))


def test_without_a_quantization_block_the_order_is_unknown(variant):
    with pytest.raises(CheckpointError, match=re.escape("take config.json from the checkpoint's source")):
        checkpoint.open(variant("fp8-dynamic", config=lambda settings: settings.pop("quantization_config")))


def test_doubled_names_need_no_version(variant):
    folder = variant("fp8-doubled-names", config=lambda settings: settings.pop("quantization_config"))
    assert checkpoint.open(folder).format == "fp8-dynamic"


@pytest.mark.parametrize("layout", ["fp8-dynamic", "fp8-half-split"])
def test_modules_that_were_left_dense(layout, variant, fixture):
    """A layer's experts and one attention matrix in bfloat16, under the modules' own names and order of rows."""

    def thaw(tensors):
        for name in [n for n in tensors if n.startswith(("model.layers.1.mlp.experts", f"{Q}."))]:
            if name.endswith(".weight"):
                tensors[name] = decoded(tensors, name.removesuffix(".weight")).bfloat16()
                del tensors[f"{name}_scale"]

    opened = checkpoint.open(variant(layout, thaw))
    assert opened.format == "fp8-dynamic"
    assert opened.summary().roles["experts"]["format"] == "bf16+fp8"
    whole = checkpoint.open(fixture(layout))
    for name in ("layers.1.experts.gate.weight", "layers.1.experts.down.weight", "layers.0.attention.q.weight"):
        got = opened.read(name)
        assert isinstance(got, Dense)
        rounded = torch.from_numpy(codecs.dequantize(whole.read(name))).bfloat16().float()
        assert np.array_equal(codecs.dequantize(got), rounded.numpy())
    assert isinstance(opened.read("layers.0.experts.gate.weight"), Quantized)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_for_a_whole_matrix(shape, variant):
    """Static FP8: its scales of activations are left aside."""

    def flatten(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = tensors[name].float().max().reshape(shape)
            tensors[name.replace("weight_scale", "input_scale")] = torch.ones(shape)

    folder = variant("fp8-dynamic", flatten)
    tensors = stored(folder)
    assert np.array_equal(read(folder, "layers.0.attention.q.weight"), decoded(tensors, Q).numpy())
    wanted = torch.stack([decoded(tensors, GATE.format(expert)) for expert in range(EXPERTS)])
    assert np.array_equal(read(folder, "layers.0.experts.gate.weight"), wanted.numpy())


def packed(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Turn every FP8 module into random ones of an FP4 scheme; returns their decoded weights by module."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        module = name.removesuffix(".weight_scale")
        rows, width = tensors.pop(f"{module}.weight").shape
        codes = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, generator=generator)
        tensors[f"{module}.weight_packed"] = codes
        values = E2M1[torch.stack([codes & 15, codes >> 4], dim=-1).reshape(rows, width).long()]
        if kind == "nvfp4":
            stored_scale = (torch.rand(rows, width // 16, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
            divisor = torch.rand(1, generator=generator) * 1000 + 500
            tensors[f"{module}.weight_global_scale"] = divisor
            tensors[f"{module}.input_global_scale"] = torch.ones(1)
            scale, factor = stored_scale.float(), 1 / divisor
        else:
            stored_scale = torch.randint(115, 125, (rows, width // 32), dtype=torch.uint8, generator=generator)
            scale, factor = 2.0 ** (stored_scale.float() - 127), 1.0
        tensors[name] = stored_scale
        weights[module] = values * scale.repeat_interleave(width // scale.shape[1], dim=1) * factor
    return weights


@pytest.mark.parametrize(("kind", "spec"), [("nvfp4", NVFP4), ("mxfp4", MXFP4)])
def test_packed_fp4_schemes(kind, spec, variant):
    weights: dict[str, torch.Tensor] = {}
    folder = variant("fp8-dynamic", lambda tensors: weights.update(packed(tensors, kind)))
    opened = checkpoint.open(folder)
    assert opened.format == f"{kind}-pack-quantized"
    for name, modules in {
        "layers.0.attention.q.weight": [Q],
        "layers.1.experts.up.weight": [f"model.layers.1.mlp.experts.{expert}.up_proj" for expert in range(EXPERTS)],
    }.items():
        got = opened.read(name)
        assert got.spec == spec
        wanted = torch.stack([weights[module] for module in modules]).squeeze(0)
        assert np.array_equal(codecs.dequantize(got), wanted.numpy())
    ids = list(range(20))
    logits = backend.load(opened, device="cpu", dtype="float32", limits=Limits(1, 64, 64)).logits(ids)
    assert np.isfinite(logits).all()


def test_packed_fp4_runs_as_its_dense_weights_do(variant, tmp_path, relative_error):
    folder = variant("fp8-dynamic", lambda tensors: packed(tensors, "mxfp4") and None)
    convert(folder, tmp_path / "dense", "bf16")  # exact: MXFP4 fits bfloat16
    ids = list(range(30))
    got, wanted = (
        backend.load(checkpoint.open(path), device="cpu", dtype="float32", limits=Limits(1, 64, 64)).logits(ids)
        for path in (folder, tmp_path / "dense")
    )
    assert relative_error(got, wanted) < 1e-4


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, change):
    return lambda tensors: tensors.update({name: change(tensors.get(name))})


def as_integers(tensors):
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name.removesuffix("_scale")] = tensors[name.removesuffix("_scale")].view(torch.int8)


def as_packed_integers(tensors):
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        weight = tensors.pop(name.removesuffix("_scale"))
        rows, width = weight.shape
        tensors[name.replace("weight_scale", "weight_packed")] = torch.zeros(rows, width // 8, dtype=torch.int32)
        tensors[name.replace("weight_scale", "weight_shape")] = torch.tensor([rows, width])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{Q}.weight_scale"), f"missing: {Q}.weight_scale"),
        (drop(GATE.format(4) + ".weight"), f"missing: {GATE.format(4)}.weight"),
        (drop(GATE.format(5) + ".bias"), f"missing: {GATE.format(5)}.bias"),
        (put(f"{Q}.weight_scale", lambda scale: scale[:, 0]), "wrong shape: .*q_proj.weight_scale"),
        (put(f"{Q}.weight_scale", lambda scale: torch.ones(2, 2)), "one scale per block"),
        (put(f"{Q}.weight_zero_point", lambda none: torch.zeros(256, 1)), "unknown: .*weight_zero_point"),
        (put(GATE.format(6) + ".bias", lambda none: torch.zeros(64)), "unknown: .*experts.6.gate_proj.bias"),
        (put(GATE.format(2) + ".weight", lambda weight: weight.float()), "wrong dtype: .*2.gate_proj.weight F32"),
        (put(GATE.format(3) + ".weight_scale", lambda scale: scale.float()), "wrong dtype: .*weight_scale F32"),
        (as_integers, "int-quantized"),
        (as_packed_integers, "pack-quantized"),
    ],
)
def test_what_cannot_be_read_is_named(change, message, variant):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(variant("fp8-dynamic", change))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(value, variant):
    def break_one(tensors):
        tensors[GATE.format(3) + ".weight_scale"][5] = value

    opened = checkpoint.open(variant("fp8-dynamic", break_one))
    with pytest.raises(CheckpointError, match=re.escape("layers.0.experts.gate.weight")):
        opened.read("layers.0.experts.gate.weight")


def test_a_global_scale_of_zero_is_refused(variant):
    def break_one(tensors):
        packed(tensors, "nvfp4")
        tensors[f"{Q}.weight_global_scale"][0] = 0

    opened = checkpoint.open(variant("fp8-dynamic", break_one))
    with pytest.raises(CheckpointError, match="not a number"):
        opened.read("layers.0.attention.q.weight")


def test_more_experts_than_tensors_is_one_error(variant):
    with pytest.raises(CheckpointError, match="16000000 experts"):
        checkpoint.open(variant("fp8-dynamic", config=lambda settings: settings.update(num_local_experts=16_000_000)))


def test_reading_leaves_no_pages_of_copied_tensors(fixture, monkeypatch):
    """A parameter put together from many tensors must not keep the file's pages besides."""
    opened = checkpoint.open(fixture("fp8-dynamic"))
    released = []
    for file in opened._files:
        monkeypatch.setattr(file, "release", lambda start, stop: released.append(stop - start))
    weight = opened.read("layers.0.experts.down.weight")
    assert sum(released) == weight.codes.nbytes + weight.outer.nbytes
    opened.read("layers.0.attention.q.weight")  # views: they stay
    assert sum(released) == weight.codes.nbytes + weight.outer.nbytes


def difficult() -> torch.Tensor:
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


def fp8_arguments(fixture):
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    block = json.loads((fixture("fp8-dynamic") / "config.json").read_text())["quantization_config"]
    return quantization.QuantizationArgs.model_validate(block["config_groups"]["group_0"]["weights"])


def test_quantizes_as_compressed_tensors_does(fixture):
    arguments = fp8_arguments(fixture)
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    values = difficult()
    scale, zero = calculate_qparams(values.amin(1, keepdim=True), values.amax(1, keepdim=True), arguments)
    codes = quantize(values, scale, zero, arguments, dtype=torch.float8_e4m3fn)
    ours = quantization.quantize_fp8_rows(Dense(values.float().numpy()))
    assert np.array_equal(ours.outer.view(np.uint16), scale.view(torch.uint16).numpy())
    assert np.array_equal(ours.codes, codes.view(torch.uint8).numpy())


def test_compressed_tensors_decompresses_what_we_write(fixture, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    convert(fixture("mxfp4"), tmp_path / "out", "fp8-dynamic")
    block = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    settings = QuantizationConfig.model_validate(block)
    scheme = settings.config_groups["group_0"]
    compressor = BaseCompressor.load_from_registry(scheme.format or settings.format)
    tensors, opened = stored(tmp_path / "out"), checkpoint.open(tmp_path / "out")
    for expert in range(EXPERTS):
        module = GATE.format(expert)
        state = {part: tensors[f"{module}.{part}"] for part in ("weight", "weight_scale")}
        theirs = compressor.decompress(state, scheme)["weight"]
        ours = torch.from_numpy(codecs.dequantize(opened.read("layers.0.experts.gate.weight"))[expert])
        assert torch.equal(theirs, ours.to(theirs.dtype))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_packed_fp4_is_what_compressed_tensors_packs(kind, variant):
    """The tool's own compressor writes one attention matrix; ours reads what its decompressor reads."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    scheme: QuantizationScheme = preset_name_to_scheme({"nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}[kind], ["Linear"])
    compressor = BaseCompressor.load_from_registry(f"{kind}-pack-quantized")
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(256, 192, generator=generator).bfloat16()
    group = scheme.weights.group_size
    scale = 2.0 ** torch.randint(-3, 3, (256, 192 // group), generator=generator)
    state = {"weight": weight, "weight_scale": scale.bfloat16()}
    if kind == "nvfp4":
        state |= {"weight_scale": (scale * 8).bfloat16(), "weight_global_scale": torch.tensor([8.0])}
    state = compressor.compress(state, scheme)

    def replace(tensors):
        del tensors[f"{Q}.weight"], tensors[f"{Q}.weight_scale"]
        tensors.update({f"{Q}.{part}": tensor for part, tensor in state.items()})

    got = read(variant("fp8-dynamic", replace), "layers.0.attention.q.weight")
    theirs = compressor.decompress(dict(state), scheme)["weight"]
    assert torch.equal(torch.from_numpy(got).to(theirs.dtype), theirs)
