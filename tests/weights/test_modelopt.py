"""ModelOpt's NVFP4: read as an independent decoding reads it and run as stored; what we write equals its export bit for
bit, and ModelOpt itself agrees where it is installed; whatever cannot be read is refused by name."""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
import subprocess
import sys
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
from mlx_gptoss.weights.formats.nvfp4_encoding import choose_encoding
from mlx_gptoss.weights.tensor import MXFP4, NVFP4, Dense, Quantized

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
ATTENTION = "model.layers.{}.self_attn.{}_proj"
EXPERTS = "model.layers.{}.mlp.experts.{}_proj"
SPAN = 17  # octaves between the smallest and the largest power of two in e4m3


@pytest.fixture
def variant(mini, tmp_path):
    """variant(tensors, name) -> a copy of a fixture whose dict of tensors `tensors` has changed."""

    def make(tensors, name: str = "nvfp4") -> Path:
        folder = tmp_path / "variant"
        folder.mkdir()
        found = load_file(mini / name / "model.safetensors")
        tensors(found)
        save_file({key: value.contiguous() for key, value in found.items()}, folder / "model.safetensors")
        (folder / "config.json").write_bytes((mini / name / "config.json").read_bytes())
        return folder

    return make


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return {name: (tensor.dtype, tuple(tensor.shape), raw(tensor)) for name, tensor in tensors.items()}


def decoded(codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """[..., N, K / 2] and [..., N, K / 16] -> float32 [..., N, K]"""
    values = E2M1[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()]
    return values * (scale.float() * scale_2).repeat_interleave(16, dim=-1)


def independently(tensors: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """The quantized weights of a layer, by canonical names."""
    found = {}
    for part in "qkvo":
        name = ATTENTION.format(layer, part)
        scales = tensors[f"{name}.weight_scale"], tensors[f"{name}.weight_scale_2"]
        found[f"layers.{layer}.attention.{part}.weight"] = decoded(tensors[f"{name}.weight"], *scales)
    for part in ("gate_up", "down"):
        name = EXPERTS.format(layer, part)
        codes, scale = tensors[name].transpose(1, 2), tensors[f"{name}_weight_scale"].transpose(1, 2)
        weight = decoded(codes, scale, tensors[f"{name}_weight_scale_2"])
        parts = {"gate": weight[:, 0::2], "up": weight[:, 1::2]} if part == "gate_up" else {"down": weight}
        found |= {f"layers.{layer}.experts.{name}.weight": rows for name, rows in parts.items()}
    return found


def logits_of(folder: Path, prompt: np.ndarray) -> np.ndarray:
    runner = backend.load(checkpoint.open(folder), device="cpu", dtype="float32", limits=Limits(1, 200, 64))
    return runner.logits(prompt.tolist())


def matrices(folder: Path) -> dict[str, np.ndarray]:
    opened = checkpoint.open(folder)
    return {p.name: codecs.dequantize(w) for p, w in opened.weights() if p.role in ("attention", "experts")}


# Reading


def test_reads_what_the_bytes_say(mini):
    opened, tensors = checkpoint.open(mini / "nvfp4"), load_file(mini / "nvfp4" / "model.safetensors")
    assert opened.format == "nvfp4" and opened.summary().note == ""
    for layer in (0, 1):
        for name, wanted in independently(tensors, layer).items():
            weight = opened.read(name)
            assert isinstance(weight, Quantized) and weight.spec == NVFP4 and weight.outer is not None, name
            # one formula for all formats multiplies by the second scale last: a float32 rounding apart
            np.testing.assert_allclose(codecs.dequantize(weight), wanted.numpy(), rtol=2e-7, atol=0, err_msg=name)


def test_reads_codes_and_scales_without_copying_them(mini):
    weight = checkpoint.open(mini / "nvfp4").read("layers.0.experts.gate.weight")
    assert isinstance(weight, Quantized) and not weight.codes.flags.owndata and not weight.codes.flags.c_contiguous


@pytest.mark.parametrize("name, reference", [("nvfp4", "nvfp4.reference"), ("nvfp4-bf16", "reference")])
def test_runs_as_stored(mini, relative_error, name, reference):
    wanted = load_numpy(mini / f"{reference}.safetensors")
    got = logits_of(mini / name, wanted["prompt"])
    assert relative_error(got, wanted["logits"]) < 2e-5
    assert np.abs(got - wanted["logits"]).max() < 1e-4


def test_second_scales_may_be_one_an_expert(mini, variant):
    factors = torch.tensor([1.0, 2, 0.5, 1, 4, 1])
    name = EXPERTS.format(0, "gate_up")

    def split(tensors):
        tensors[f"{name}_weight_scale_2"] = tensors[f"{name}_weight_scale_2"] * factors

    before, after = checkpoint.open(mini / "nvfp4"), checkpoint.open(variant(split))
    for part in ("gate", "up"):
        weight = after.read(f"layers.0.experts.{part}.weight")
        assert weight.outer.shape == (6, 1, 1)
        one = codecs.dequantize(before.read(f"layers.0.experts.{part}.weight"))
        np.testing.assert_array_equal(codecs.dequantize(weight), one * factors.numpy()[:, None, None])


def test_modules_may_stay_bfloat16_and_input_scales_be_missing(mini, variant):
    dense = load_file(mini / "nvfp4-bf16" / "model.safetensors")

    def mix(tensors):
        for name in list(tensors):
            if "input_scale" in name or ("self_attn" in name and "scale" in name):
                del tensors[name]
        for part in "qkvo":
            name = ATTENTION.format(0, part) + ".weight"
            tensors[name] = dense[name]
            name = ATTENTION.format(1, part) + ".weight"
            tensors[name] = dense[name]
        tensors[EXPERTS.format(1, "down")] = dense[EXPERTS.format(1, "down")]
        del tensors[EXPERTS.format(1, "down") + "_weight_scale"], tensors[EXPERTS.format(1, "down") + "_weight_scale_2"]

    opened = checkpoint.open(variant(mix))
    assert opened.format == "nvfp4"
    assert opened.summary().roles["attention"]["format"] == "bf16"
    assert opened.summary().roles["experts"]["format"] == "bf16+nvfp4"
    weight = opened.read("layers.1.experts.down.weight")
    assert isinstance(weight, Dense)
    wanted = dense[EXPERTS.format(1, "down")].transpose(1, 2).float().numpy()
    np.testing.assert_array_equal(codecs.dequantize(weight), wanted)


def test_scales_of_an_8_bit_cache_are_accepted(variant):
    def add(tensors):
        for layer in (0, 1):
            tensors[ATTENTION.format(layer, "k") + ".k_scale"] = torch.tensor(1.0)
            tensors[ATTENTION.format(layer, "v") + ".v_scale"] = torch.tensor(1.0)

    assert checkpoint.open(variant(add)).format == "nvfp4"


def test_a_scale_of_zero_makes_zeros(mini, variant):
    name = EXPERTS.format(0, "down")

    def blank(tensors):
        scale = tensors[f"{name}_weight_scale"].view(torch.uint8)
        scale[2, 1, 7] = 0

    weight = codecs.dequantize(checkpoint.open(variant(blank)).read("layers.0.experts.down.weight"))
    assert not weight[2, 7, 16:32].any() and weight[2, 7, :16].any()


def test_a_scale_that_is_not_a_number_is_refused(variant):
    name = ATTENTION.format(1, "o")

    def damage(tensors):
        tensors[f"{name}.weight_scale"].view(torch.uint8)[3, 3] = 0x7F

    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.o\.weight has a scale that is not a number"):
        checkpoint.open(variant(damage)).read("layers.1.attention.o.weight")


@pytest.mark.parametrize("part, shape", [("gate_up", (6, 192, 8)), ("down", (6, 64, 12))])
def test_the_scales_of_modelopt_0_35_are_refused_with_the_reason(variant, part, shape):
    def along_the_outputs(tensors):
        tensors[EXPERTS.format(0, part) + "_weight_scale"] = torch.zeros(shape, dtype=torch.float8_e4m3fn)

    with pytest.raises(CheckpointError, match=r"ModelOpt 0\.35 .* wrong axis, .* 0\.37"):
        checkpoint.open(variant(along_the_outputs))


@pytest.mark.parametrize("name", [ATTENTION.format(0, "q") + ".pre_quant_scale", EXPERTS.format(1, "down") + "_extra"])
def test_nothing_is_left_over(variant, name):
    with pytest.raises(CheckpointError, match=f"1 unknown: {name}"):
        checkpoint.open(variant(lambda tensors: tensors.update({name: torch.zeros(())})))


# Fake-quantized checkpoints


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def test_a_fake_quantized_checkpoint_reads_as_bf16_and_says_so(mini):
    opened = checkpoint.open(mini / "nvfp4-bf16")
    assert opened.format == "bf16"
    assert "fake-quantized NVFP4" in opened.summary().note


def test_the_pickle_beside_a_fake_quantized_checkpoint_is_not_opened(mini, variant, tmp_path):
    def without_amax(tensors):
        for name in [name for name in tensors if name.endswith("_amax")]:
            del tensors[name]

    folder = variant(without_amax, "nvfp4-bf16")
    assert checkpoint.open(folder).summary().note == ""
    proof = tmp_path / "opened"
    (folder / "modelopt_state.pth").write_bytes(pickle.dumps(Trap(proof)))
    opened = checkpoint.open(folder)
    assert opened.format == "bf16" and "fake-quantized NVFP4" in opened.summary().note
    convert(folder, tmp_path / "real", "nvfp4")
    assert not proof.exists() and not (tmp_path / "real" / "modelopt_state.pth").exists()


# Writing


@pytest.mark.parametrize("source", ["nvfp4-bf16", "nvfp4"])
def test_writes_the_bytes_of_modelopts_export(mini, tmp_path, source):
    convert(mini / source, tmp_path / "new", "nvfp4")
    exported, written = map(stored, (mini / "nvfp4", tmp_path / "new"))
    assert bits(written) == bits(exported)
    for name in ("config.json", "hf_quant_config.json"):
        theirs, ours = (json.loads((folder / name).read_text()) for folder in (mini / "nvfp4", tmp_path / "new"))
        changed = {key for key in theirs | ours if theirs.get(key) != ours.get(key)}
        assert changed <= {"transformers_version", "dtype", "torch_dtype"}, name


def test_writes_the_bytes_of_modelopts_export_from_bf16(mini, variant, tmp_path):
    """Without a calibration nothing is known of activations: input scales are 1, all else is as exported."""
    plain = variant(lambda t: [t.pop(name) for name in list(t) if name.endswith("_amax")], "nvfp4-bf16")
    convert(plain, tmp_path / "new", "nvfp4")
    exported, written = map(stored, (mini / "nvfp4", tmp_path / "new"))
    for name in exported:
        if name.endswith("input_scale"):
            assert written[name].dtype == torch.float32 and written[name].shape == ()
            assert written[name] == 1
            written[name] = exported[name]
    assert bits(written) == bits(exported)


def test_mxfp4_keeps_its_codes(mini, tmp_path):
    convert(mini / "mxfp4", tmp_path / "new", "nvfp4")
    before, after = stored(mini / "mxfp4"), stored(tmp_path / "new")
    for layer in (0, 1):
        for part in ("gate_up", "down"):
            name = EXPERTS.format(layer, part)
            assert torch.equal(before[f"{name}_blocks"].flatten(-2), after[name].transpose(1, 2))
            mantissa, _ = torch.frexp(after[f"{name}_weight_scale_2"])
            assert mantissa == 0.5
    old, new = matrices(mini / "mxfp4"), matrices(tmp_path / "new")
    for name in new:
        if "experts" in name:
            np.testing.assert_array_equal(new[name], old[name], err_msg=name)


def test_codes_of_mlx_are_kept(mini, tmp_path):
    convert(mini / "nvfp4-bf16", tmp_path / "mlx", "mlx-nvfp4")
    convert(tmp_path / "mlx", tmp_path / "new", "nvfp4")
    old, new = matrices(tmp_path / "mlx"), matrices(tmp_path / "new")
    for name in new:
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)


def random_mxfp4(exponents: tuple[int, int], seed: int = 0) -> Quantized:
    chance = np.random.default_rng(seed)
    codes = chance.integers(0, 256, (3, 32, 64), dtype=np.uint8)
    scale = chance.integers(127 + exponents[0], 128 + exponents[1], (3, 32, 4), dtype=np.uint8)
    codes[0, 0], scale[0, 0] = 0x80, 254  # zeros of either sign, whose scale must not count
    return Quantized(MXFP4, codes, scale)


def recoded(weight: Quantized) -> Quantized:
    encoding = choose_encoding([weight], "some.weight")
    return encoding.encode(weight)


@pytest.mark.parametrize("bottom", [-30, -1, 0, 40])
def test_mxfp4_within_17_octaves_is_exact(bottom, caplog):
    weight = random_mxfp4((bottom, bottom + SPAN))
    found = recoded(weight)
    assert not caplog.records
    np.testing.assert_array_equal(found.codes, weight.codes)
    np.testing.assert_array_equal(codecs.dequantize(found), codecs.dequantize(weight))


def test_mxfp4_blocks_below_17_octaves_are_rounded_and_the_user_is_told(caplog):
    weight = random_mxfp4((-6 - SPAN, -2))
    with caplog.at_level(logging.WARNING):
        found = recoded(weight)
    assert "some.weight: blocks more than 17 octaves below" in caplog.text
    old, new = codecs.dequantize(weight), codecs.dequantize(found)
    exact = np.repeat(weight.scale >= weight.scale[1:].max() - SPAN, 32, axis=-1)
    np.testing.assert_array_equal(new[exact], old[exact])
    assert (old[~exact] != new[~exact]).any()
    assert np.abs(old - new).max() <= float(found.outer) * 2**-9 * 0.5  # half the finest step below code 3


@pytest.mark.parametrize("amax", [3e-30, 1e-3, 0.7, 448.0, 2e30])
def test_quantizing_is_within_half_a_step(amax):
    chance = np.random.default_rng(1)
    values = (chance.standard_normal((2, 16, 64)) * np.exp2(chance.integers(-6, 0, (2, 16, 64)))).astype(np.float32)
    values *= np.float32(amax) / np.abs(values).max()
    values[0, 0] = 0
    outer = np.float32(quantization.max_abs(Dense(values)) / np.float32(2688))
    found = quantization.quantize_nvfp4(Dense(values), np.asarray(outer))
    error = np.abs(codecs.dequantize(found) - values).reshape(2, 16, 4, 16)
    step = codecs.E4M3[found.scale] * outer
    assert (error <= step[..., None] * np.float32(1.0001)).all()  # codes 4 and 6 are two steps apart
    assert not codecs.dequantize(found)[0, 0].any() and (found.scale[0, 0] == 0x38).all()


def test_a_weight_of_zeros_can_be_written():
    weight = Dense(np.zeros((2, 4, 32), np.float32))
    encoding = choose_encoding([weight], "zeros")
    assert encoding.outer == 1
    assert not codecs.dequantize(encoding.encode(weight)).any()


# The tool itself

MODELOPT = """
import sys, numpy as np, torch
from safetensors.torch import load_file
try:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
    from modelopt.torch.export.shard_cast_utils import quantize_mxfp4_to_nvfp4_lossless
except ImportError as error:
    print(error), sys.exit(77)
found = {}
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
        found[name] = q.dequantize(
            dtype=torch.float32, scale=scale, double_scale=tensors[scale_2], block_sizes={-1: 16}
        ).numpy()
given = np.load(sys.argv[2])
for key in given:
    if key.startswith("values"):
        q, scale, scale_2 = NVFP4QTensor.quantize(torch.from_numpy(given[key]), 16)
        found[key + ".codes"], found[key + ".scale"] = q._quantized_data.numpy(), scale.view(torch.uint8).numpy()
        found[key + ".scale_2"] = scale_2.numpy()
codes, scale = torch.from_numpy(given["mxfp4.codes"]), torch.from_numpy(given["mxfp4.scale"])
q, scale, scale_2, blocks, lossless = quantize_mxfp4_to_nvfp4_lossless(codes, scale, int(scale.max()) - 127, "cpu")
found["mxfp4.codes"], found["mxfp4.scale"] = q.numpy(), scale.view(torch.uint8).numpy()
found["mxfp4.scale_2"] = scale_2.numpy()
np.savez(sys.argv[3], **found)
"""


@pytest.fixture(scope="module")
def judged(mini, tmp_path_factory):
    """What ModelOpt, in a process of its own, makes of a checkpoint that we wrote, random values and random MXFP4."""
    if not importlib.util.find_spec("modelopt"):
        pytest.skip("nvidia-modelopt is not installed")
    folder = tmp_path_factory.mktemp("modelopt")
    convert(mini / "mxfp4", folder / "ours", "nvfp4")
    chance = np.random.default_rng(5)
    given = {}
    for index, spread in enumerate((1, 2, 12, 30)):
        powers = np.exp2(chance.integers(-spread, 1, (24, 8)).repeat(16, axis=1))
        values = (chance.standard_normal((24, 128)) * powers).astype(np.float32)
        values[3, 16:48] = 0
        values[5] = np.tile([-0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 5, 6, -6, 0.1, -1e-9, 0, -0.0, 4, 2, 1], 8)  # ties
        given[f"values{index}"] = values
    weight = random_mxfp4((-30, -2))
    weight.codes[0, 0] = 0x17
    weight.scale[0, 0] = 120
    given |= {"mxfp4.codes": weight.codes, "mxfp4.scale": weight.scale}
    np.savez(folder / "given.npz", **given)
    arguments = [folder / "ours" / "model.safetensors", folder / "given.npz", folder / "found.npz"]
    done = subprocess.run([sys.executable, "-c", MODELOPT, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"nvidia-modelopt cannot be imported here: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "ours", given, dict(np.load(folder / "found.npz"))


def test_modelopt_decodes_what_we_write(judged):
    folder, _, found = judged
    ours = matrices(folder)
    for layer in (0, 1):
        for part in "qkvo":
            theirs = found[ATTENTION.format(layer, part) + ".weight"]
            np.testing.assert_allclose(ours[f"layers.{layer}.attention.{part}.weight"], theirs, rtol=2e-7, atol=0)
        fused, down = (found[EXPERTS.format(layer, part)] for part in ("gate_up", "down"))
        for part, rows in {"gate": fused[:, 0::2], "up": fused[:, 1::2], "down": down}.items():
            np.testing.assert_array_equal(ours[f"layers.{layer}.experts.{part}.weight"], rows)


def test_modelopt_quantizes_the_same(judged):
    _, given, found = judged
    for key in (key for key in given if key.startswith("values")):
        outer = np.float32(quantization.max_abs(Dense(given[key])) / np.float32(2688))
        assert outer == found[f"{key}.scale_2"]
        ours = quantization.quantize_nvfp4(Dense(given[key]), np.asarray(outer))
        np.testing.assert_array_equal(ours.scale, found[f"{key}.scale"], err_msg=key)
        np.testing.assert_array_equal(ours.codes, found[f"{key}.codes"], err_msg=key)


def test_modelopt_casts_mxfp4_to_the_same_values(judged):
    _, given, found = judged
    ours = recoded(Quantized(MXFP4, given["mxfp4.codes"], given["mxfp4.scale"]))
    assert ours.outer == found["mxfp4.scale_2"]
    theirs = Quantized(NVFP4, found["mxfp4.codes"], found["mxfp4.scale"], outer=found["mxfp4.scale_2"])
    np.testing.assert_array_equal(codecs.dequantize(ours), codecs.dequantize(theirs))
