"""Affine weights at every width and group that MLX has: codes, quantizer, widening and files, against MLX itself."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

import mlx_gptoss
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.backends.base import run_as
from mlx_gptoss.config import PRESETS
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights import codecs, quantization
from mlx_gptoss.weights.convert import convert, write_checkpoint
from mlx_gptoss.weights.formats import CONVERTERS, mlx
from mlx_gptoss.weights.formats.base import matrix_recipe
from mlx_gptoss.weights.formats.hf_layout import hf_name
from mlx_gptoss.weights.split import RankShard, RankWeights
from mlx_gptoss.weights.synthetic import Synthetic
from mlx_gptoss.weights.tensor import AFFINE, Dense, Quantized

VALUES = np.random.default_rng(0).standard_normal((3, 24, 384)).astype(np.float32)
WIDTHS = pytest.mark.parametrize(("bits", "group"), AFFINE)


def by_mlx(bits, group):
    """VALUES quantized by MLX: its arrays, and the same as a Quantized."""
    codes, scale, bias = mx.quantize(mx.array(VALUES), group_size=group, bits=bits)
    weight = Quantized(AFFINE[bits, group], np.array(codes).view(np.uint8), np.array(scale), np.array(bias))
    return (codes, scale, bias), weight


@WIDTHS
def test_decoding_is_mlxs(bits, group):
    arrays, weight = by_mlx(bits, group)
    expected = np.array(mx.dequantize(*arrays, group_size=group, bits=bits))
    assert weight.shape == VALUES.shape
    assert np.allclose(codecs.dequantize(weight), expected, rtol=0, atol=1e-6)  # MLX may fuse the product and the sum


@WIDTHS
def test_quantizing_is_mlxs(bits, group):
    _, expected = by_mlx(bits, group)
    found = quantization.quantize(VALUES, AFFINE[bits, group], np.dtype(np.float32))
    for name in ("codes", "scale", "bias"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_packing_round_trips(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, 64), np.uint8)
    packed = codecs.pack(codes, bits)
    assert packed.shape == (5, 64 * bits // 8) and np.array_equal(codecs.unpack(packed, bits), codes)
    stream = np.unpackbits(packed, axis=-1, bitorder="little").reshape(5, 64, bits)
    assert np.array_equal(stream @ (1 << np.arange(bits)), codes)


@WIDTHS
def test_wider_codes_have_the_same_values(bits, group):
    _, weight = by_mlx(bits, group)
    wide = codecs.widen(weight, run_as("cuda", weight.spec))
    assert wide.spec == AFFINE[4 if bits <= 4 else 8, group]
    assert np.array_equal(codecs.dequantize(wide), codecs.dequantize(weight))
    assert run_as("mlx", weight.spec) == weight.spec


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    write_checkpoint(Synthetic(PRESETS["tiny"], "bf16"), folder, "bf16")
    return folder


@pytest.fixture
def written(dense, tmp_path, monkeypatch):
    """written(bits, group, **others): the tiny model at this width, in other specs for the roles in `others`."""

    def write(bits, group, **others):
        others = {"lm_head": (8, 32), **others}  # else some are formats with a name of their own
        recipe = matrix_recipe("mlx", AFFINE[bits, group], **{role: ("mlx", AFFINE[at]) for role, at in others.items()})
        monkeypatch.setitem(mlx.Mlx.recipes, "mlx-test", recipe)
        monkeypatch.setitem(CONVERTERS, "mlx-test", mlx.FORMAT)
        convert(dense, tmp_path / "written", "mlx-test")
        return tmp_path / "written"

    return write


def decoded(folder, out):
    """The same model with every matrix decoded, in float32."""
    source = checkpoints.open(folder)
    out.mkdir()
    tensors = {hf_name(param): codecs.dequantize(weight) for param, weight in source.weights()}
    save_file(tensors, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


IDS = np.random.default_rng(5).integers(0, 300, 40).tolist()


@pytest.fixture(params=BACKENDS)
def logits(request, backend_module, device_of):
    backend_module(request.param)

    def logits(folder):
        device = device_of(request.param)
        with mlx_gptoss.load(folder, backend=request.param, device=device, dtype="float32") as model:
            found = model.complete(IDS, max_tokens=4, sampling=mlx_gptoss.Sampling(temperature=0))
            return model.logits(IDS), found.ids

    return logits


@WIDTHS
def test_a_model_runs_at_every_width(written, tmp_path, logits, relative_error, bits, group):
    folder = written(bits, group)
    (found, ids), (expected, expected_ids) = logits(folder), logits(decoded(folder, tmp_path / "decoded"))
    assert relative_error(found, expected) < 1e-5
    assert ids == expected_ids


def test_a_mixed_recipe(written, tmp_path, logits, relative_error):
    """As mlx-lm's --quant-predicate mixed_3_6 writes it, with q, k and v alike and the rest in other widths."""
    folder = written(3, 64, lm_head=(6, 64), attention=(5, 32), router=(8, 64), embed=(2, 64))
    roles = checkpoints.open(folder).summary().roles
    assert roles["attention"]["format"] == "affine5-g32" and roles["lm_head"]["format"] == "affine6-g64"
    (found, _), (expected, _) = logits(folder), logits(decoded(folder, tmp_path / "decoded"))
    assert relative_error(found, expected) < 1e-5


def test_a_group_size_of_null_is_the_modes_default(written):
    folder = written(4, 64)
    config = json.loads((folder / "config.json").read_text())
    others = {"lm_head": {"group_size": 32, "bits": 8}}
    config["quantization"] = config["quantization_config"] = {"group_size": None, "bits": 4, "mode": "affine", **others}
    (folder / "config.json").write_text(json.dumps(config))
    assert checkpoints.open(folder).summary().roles["experts"]["format"] == "affine4-g64"
    config["quantization"] = config["quantization_config"] = {"group_size": 32, "bits": 4, **others}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="says"):
        checkpoints.open(folder)


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_ranks_split_the_columns_of_o(written, bits):
    source = checkpoints.open(written(bits, 32))
    name = "layers.1.attention.o.weight"
    parts = [RankWeights(source, RankShard.of(source.config, rank, 2)).read(name) for rank in range(2)]
    joined = np.concatenate([codecs.dequantize(part) for part in parts], axis=1)
    assert np.array_equal(joined, codecs.dequantize(source.read(name)))


def test_show_and_the_plan_know_what_a_backend_widens(written):
    from mlx_gptoss.backends import find_backend
    from mlx_gptoss.loading.plan import memory_plan
    from mlx_gptoss.loading.recommend import run_otherwise

    source = checkpoints.open(written(3, 64))
    assert run_otherwise(source, "mlx") == {}
    assert run_otherwise(source, "cuda") == {AFFINE[3, 64]: AFFINE[4, 64]}
    sizes = {b: memory_plan(source, find_backend(b)[0], device="cpu").weights_bytes for b in ("mlx", "cuda")}
    in_3_bits = sum(p.size for p in source.params if source.stored_as(p.name)[0] == AFFINE[3, 64])
    assert sizes["mlx"] == source.size_bytes and sizes["cuda"] == source.size_bytes + in_3_bits // 8


def test_dense_weights_are_not_widened():
    weight = Dense(VALUES[0])
    assert codecs.widen(weight, AFFINE[4, 64]) is weight
