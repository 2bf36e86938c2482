"""mlx-lm's adapters: random ones against mlx-lm's own forward pass, and one that it has trained on the bundled model.

mlx-lm runs in a process of its own, with the correction range of YaRN rounded on both sides (tests/golden).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.loading.plan import NANO

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'mlx-gptoss[test]')")

IDS = np.random.default_rng(3).integers(0, 300, 40).tolist()
PEER = """
import json, sys, numpy as np, mlx.core as mx
from pathlib import Path
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
model, adapter, keys, out = *map(Path, sys.argv[1:3]), json.loads(sys.argv[3]), sys.argv[4]
parameters = {"rank": 3, "scale": 1.7, "dropout": 0.0} | ({"keys": keys} if keys else {})
first, _ = load_model(model)
linear_to_lora_layers(first, 2, parameters)
mx.random.seed(4)
factors = {n: mx.random.normal(v.shape) * 0.1 for n, v in tree_flatten(first.parameters()) if n[-7:-1] == ".lora_"}
adapter.mkdir()
mx.save_safetensors(str(adapter / "adapters.safetensors"), factors)
settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "x", "iters": 1}
(adapter / "adapter_config.json").write_text(json.dumps(settings))
loaded = load_adapters(load_model(model)[0], str(adapter))
loaded.set_dtype(mx.float32)
loaded.eval()
np.save(out, np.array(loaded(mx.array(json.loads(sys.argv[5])))[0].astype(mx.float32)))
"""
KEYS = {
    "attention": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "experts": ["mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"],
    "all": [],
}


@pytest.mark.parametrize("case", KEYS)
def test_logits_are_those_of_mlx_lm(mini, tmp_path, relative_error, case):
    """The last two layers; the scale is not divided by the rank."""
    folder, adapter, out = tmp_path / "model", tmp_path / "adapter", tmp_path / "logits.npy"
    mlx_gptoss.convert(mini / "mxfp4", folder, to="mlx-8bit")
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"]["truncate"] = True
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", PEER, folder, adapter, json.dumps(KEYS[case]), out, json.dumps([IDS])]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = np.load(out)
    for backend in ("mlx", "cuda"):
        with mlx_gptoss.load(
            folder, backend=backend, device="cpu", dtype="float32", adapters={"theirs": adapter}
        ) as model:
            base = relative_error(model.logits(IDS), theirs)
            assert base > 1e-2
            assert relative_error(model.logits(IDS, "theirs"), theirs) < 1e-5


@pytest.mark.slow
def test_trained_by_mlx_lm_on_the_bundled_model(tmp_path):
    """A few steps on one sentence: afterwards it is likelier, here."""
    data = tmp_path / "data"
    data.mkdir()
    line = json.dumps({"text": "The quick brown fox jumps over the lazy dog."}) + "\n"
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text(line * 8)
    base = shutil.copytree(NANO, tmp_path / "base")
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|return|>"}))  # which ends each example
    settings = ["--iters", "20", "--batch-size", "1", "--num-layers", "2", "--learning-rate", "1e-3"]
    settings += ["--val-batches", "1"]
    command = [sys.executable, "-m", "mlx_lm", "lora", "--model", str(base), "--train", "--data", str(data)]
    command += ["--adapter-path", str(tmp_path / "adapter"), "--max-seq-length", "64", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    with mlx_gptoss.load(adapters={"fox": tmp_path / "adapter"}) as model:
        ids = model.tokenizer.encode("The quick brown fox jumps over the lazy dog.")

        def nll(adapter):
            logits = model.logits(ids, adapter).astype(np.float64)[:-1]
            logits -= logits.max(axis=-1, keepdims=True)
            return (np.log(np.exp(logits).sum(axis=-1)) - logits[range(len(logits)), ids[1:]]).mean()

        assert nll("fox") < nll(None) - 0.5
