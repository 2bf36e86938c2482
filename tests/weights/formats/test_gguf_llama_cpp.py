"""llama.cpp itself, where llama-cpp-python is installed: it loads the GGUF files that are written, with our tokens and
our logits, and what its quantizer writes of every type has its own values."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from judges import with_ggml
from safetensors.numpy import load_file

import mlx_gptoss
from mlx_gptoss.backends import mlx
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.weights import checkpoint, codecs, gguf_blocks
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.formats.gguf import GGUF_NAMES, tensor_name

from .test_gguf_types import config, package, write  # noqa: F401

pytestmark = pytest.mark.slow
needs_llama_cpp = pytest.mark.skipif(
    not importlib.util.find_spec("llama_cpp"), reason="llama-cpp-python is not installed"
)
QUANTIZE = """
import sys, llama_cpp
llama_cpp.llama_backend_init()
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.allow_requantize = int(sys.argv[3]), True
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), settings) == 0
"""
LOGITS = """
import sys, json, numpy as np, llama_cpp
prompt = np.load(sys.argv[2]).tolist()
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, logits_all=True, verbose=False, type_k=llama_cpp.GGML_TYPE_F32,
                        type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False, n_gpu_layers=0)
model.eval(prompt)
np.save(sys.argv[3], model.scores[: len(prompt)])
print(json.dumps(model.tokenize(sys.argv[4].encode(), add_bos=False, special=True)))
"""
ALL_F32 = 0
TYPES = {  # llama_ftype
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17,
    "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "IQ3_S": 26,
}  # fmt: skip


def run(code: str, *arguments) -> str:
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_llama_cpp
@pytest.mark.parametrize("name", GGUF_NAMES)
def test_it_computes_our_logits_from_a_written_file(mini, tmp_path, relative_error, name):
    """In float32, to which llama.cpp decodes the file itself, since its products with blocks round the activations; and
    with YaRN's correction range rounded to whole dimensions, as it rounds it."""
    convert(mini / "mxfp4", tmp_path / "new", name)
    run(QUANTIZE, tmp_path / "new/model.gguf", tmp_path / "f32.gguf", ALL_F32)
    prompt, text = load_file(mini / "reference.safetensors")["prompt"], "self.name: 12 <|return|>é"
    np.save(tmp_path / "prompt.npy", prompt)
    logits = {}
    for file in ("new/model.gguf", "f32.gguf"):
        ids = run(LOGITS, tmp_path / file, tmp_path / "prompt.npy", tmp_path / "logits.npy", text).splitlines()[-1]
        logits[file] = np.load(tmp_path / "logits.npy")
        assert json.loads(ids) == checkpoint.open(tmp_path / "new").tokenizer().encode_with_specials(text)
    opened = checkpoint.open(tmp_path / "new")
    opened.config = replace(opened.config, yarn=replace(opened.config.yarn, truncate=True))
    ours = mlx.load(opened, device="cpu", dtype="float32", limits=Limits(1, 200, 64)).logits(prompt.tolist())
    assert relative_error(logits["f32.gguf"], ours) < 1e-4
    assert (logits["new/model.gguf"].argmax(-1) == ours.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("name", with_ggml.NUMBERS)
def test_what_ggml_quantizes_decodes_to_its_own_values(name):
    """Of rows of very different sizes, and of zeros."""
    if with_ggml.version() is None:
        pytest.skip("no library of ggml")
    values = np.random.default_rng(1).standard_normal((4, 6, 512)).astype(np.float32)
    values *= np.array([1e-4, 0.02, 1, 30, 0, 5], np.float32)[:, None]
    blocks, decoded = with_ggml.quantize(values, name)
    kind = gguf_blocks.BY_NAME[name]
    weight = gguf_blocks.load(kind, blocks.reshape(4, 6, -1, kind.size))
    np.testing.assert_array_equal(codecs.dequantize(weight), decoded)


@needs_llama_cpp
@pytest.mark.parametrize("name", TYPES)
def test_what_its_quantizer_writes_decodes_to_the_packages_values(mini, tmp_path, config, name):  # noqa: F811
    from gguf.quants import dequantize

    _, source = write(tmp_path / "model", mini, config, {"": "Q8_0"})
    run(QUANTIZE, source, tmp_path / "out.gguf", TYPES[name])
    opened = checkpoint.open(tmp_path / "out.gguf")
    theirs = {t.name: dequantize(t.data, t.tensor_type) for t in package.GGUFReader(tmp_path / "out.gguf").tensors}
    kinds = {info.blocks for info in opened.tensors.values()} - {""}
    assert name.removesuffix("_M") in kinds
    for param, weight in opened.weights():
        wanted = theirs[tensor_name(param)]
        np.testing.assert_array_equal(codecs.dequantize(weight), wanted, param.name)
    with mlx_gptoss.load(tmp_path / "out.gguf", backend="mlx", device="cpu", dtype="float32") as model:
        assert np.isfinite(model.logits([40, 41, 42])).all()
