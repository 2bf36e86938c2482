"""Files that llama.cpp's converter wrote are read bit for bit, run as stored, and give the original tokenizer.

The gguf package is the judge where it is installed.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_numpy

import mlx_gptoss
from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.weights import checkpoint, codecs, gguf, gguf_blocks
from mlx_gptoss.weights.config_json import read_config
from mlx_gptoss.weights.formats import gguf as gguf_format
from mlx_gptoss.weights.gguf_blocks import BY_NAME
from mlx_gptoss.weights.tensor import AFFINE8_G32, MXFP4

MODELS = {"model.gguf": "reference", "model-q8_0.gguf": "gguf-q8_0.reference"}


@pytest.mark.parametrize("name", MODELS)
def test_runs_as_stored(mini, relative_error, name):
    reference = load_numpy(mini / f"{MODELS[name]}.safetensors")
    opened = checkpoint.open(mini / "gguf" / name)
    assert opened.format == "gguf"
    runner = backend.load(opened, device="cpu", dtype="float32", limits=Limits(1, 200, 64))
    got = runner.logits(reference["prompt"].tolist())
    assert relative_error(got, reference["logits"]) < 2e-5
    assert np.abs(got - reference["logits"]).max() < 1e-4


def test_generates_the_reference_text(mini):
    reference = load_numpy(mini / "reference.safetensors")
    with mlx_gptoss.load(mini / "gguf" / "model.gguf", backend="mlx", device="cpu") as opened:
        done = opened.complete(reference["prompt"].tolist(), max_tokens=8, sampling=mlx_gptoss.Sampling(temperature=0))
        assert list(done.ids) == reference["greedy"][: len(done.ids)].tolist()
        assert opened.tokenizer.decode(opened.tokenizer.encode("Hi, you")) == "Hi, you"


def test_summary_by_role(mini):
    summary = mlx_gptoss.describe(mini / "gguf" / "model-q8_0.gguf")
    assert summary.format == "gguf"
    assert {role: kind["format"] for role, kind in summary.roles.items()} == {
        "attention": "q8_0",
        "experts": "mxfp4",
        "router": "f32",
        "embed": "q8_0",
        "lm_head": "q8_0",
    }
    assert summary.roles["experts"]["bits"] == 4.25 and summary.roles["embed"]["bits"] == 8.5


@pytest.mark.parametrize("name", MODELS)
def test_the_gguf_package_decodes_the_same_values(mini, name):
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    from gguf.quants import dequantize

    opened = checkpoint.open(mini / "gguf" / name)
    reader = package.GGUFReader(mini / "gguf" / name)
    theirs = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert len(theirs) == len(opened.params)
    for param, weight in opened.weights():
        np.testing.assert_array_equal(codecs.dequantize(weight), theirs[gguf_format.tensor_name(param)], param.name)
    header = gguf.read_header(mini / "gguf" / name)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            ours = header.metadata[key]
            assert (list(ours) if isinstance(ours, (gguf.StringArray, np.ndarray)) else ours) == field.contents(), key


def test_repacking_mxfp4_moves_nibbles_and_changes_no_value():
    blocks = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 17), dtype=np.uint8)
    weight = gguf_blocks.load(BY_NAME["MXFP4"], blocks)
    assert weight.spec == MXFP4
    for at in np.ndindex(3, 5):
        for group in range(4):
            packed = blocks[(*at, group)][1:]
            elements = [*(packed & 15), *(packed >> 4)]
            row = codecs.unpack(weight.codes[at], 4)
            assert row[32 * group : 32 * group + 32].tolist() == elements
            assert weight.scale[(*at, group)] == blocks[(*at, group)][0]


@pytest.mark.parametrize("scale, dtype", [(0.01, "float16"), (6e-8, "float16"), (511.5, "float16"), (60000, "float32")])
def test_repacking_q8_0_as_affine_changes_no_value(scale, dtype):
    values = np.arange(-128, 128, dtype=np.int8).reshape(2, 4, 32)
    scales = np.full((2, 4, 1), scale, np.float16)
    scales[1] *= -1
    weight = gguf_blocks.load(BY_NAME["Q8_0"], np.concatenate([scales.view(np.uint8), values.view(np.uint8)], axis=-1))
    assert weight.spec == AFFINE8_G32 and weight.scale.dtype == weight.bias.dtype == dtype
    expected = (values.astype(np.float64) * scales.astype(np.float64)).reshape(2, 128)
    np.testing.assert_array_equal(codecs.dequantize(weight), expected)


def test_the_config_equals_that_of_the_source_checkpoint(mini):
    expected = read_config(json.loads((mini / "mxfp4" / "config.json").read_text()))
    opened = checkpoint.open(mini / "gguf" / "model.gguf")
    generation = json.loads((mini / "nvfp4" / "generation_config.json").read_text())
    assert sorted(opened.stop_ids) == sorted(generation["eos_token_id"])
    for name in vars(expected):
        if name != "eos_token_id":
            assert getattr(opened.config, name) == getattr(expected, name), name
    assert opened.config.eos_token_id[0] == expected.eos_token_id[0]


@pytest.fixture(scope="module")
def tokenizers(mini) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer from the GGUF metadata, and the original."""
    return checkpoint.open(mini / "gguf" / "model.gguf").tokenizer(), Tokenizer.from_folder(mini / "nvfp4")


def test_the_tokenizer_has_the_original_vocabulary(tokenizers):
    ours, theirs = tokenizers
    assert dict(ours.specials) == dict(theirs.specials) and ours.vocab_size == theirs.vocab_size
    assert all(ours.token_bytes(id) == theirs.token_bytes(id) for id in range(ours.vocab_size))


@settings(max_examples=200, deadline=None)
@given(value=st.text(max_size=80) | st.text(alphabet="def self.:=()\n #in rtestoandl'S0123", max_size=80))
def test_the_tokenizer_encodes_like_the_original(tokenizers, value):
    ours, theirs = tokenizers
    assert ours.encode(value) == theirs.encode(value)
    assert ours.decode(ours.encode(value)) == value
