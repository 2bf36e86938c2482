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

from mlx_gptoss.backends import mlx
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.weights import checkpoint, codecs, gguf_blocks
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.formats.gguf import GGUF_NAMES

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
def test_what_its_quantizer_writes_decodes_to_its_own_values(name):
    """Of rows of very different sizes, and of zeros. Whole files are made and run by ../judge_tools.py."""
    if with_ggml.version() is None:
        pytest.skip("no library of ggml")
    values = np.random.default_rng(1).standard_normal((4, 6, 512)).astype(np.float32)
    values *= np.array([1e-4, 0.02, 1, 30, 0, 5], np.float32)[:, None]
    blocks, decoded = with_ggml.quantize(values, name)
    kind = gguf_blocks.BY_NAME[name]
    weight = gguf_blocks.load(kind, blocks.reshape(4, 6, -1, kind.size))
    np.testing.assert_array_equal(codecs.dequantize(weight), decoded)
