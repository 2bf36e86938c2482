"""mlx-lm and this program load each other's checkpoints and agree, apart from one known difference.

mlx-lm rounds YaRN's correction range to whole dimensions; gpt-oss does not. With `truncate: true` in the config we
round it as well, and the logits agree. mlx-lm runs in its own process, because importing it is slow and changes process
limits.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import mlx_gptoss

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'mlx-gptoss[test]')")

LOGITS = """
import sys, numpy as np, mlx.core as mx
from pathlib import Path
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
model, _ = load_model(Path(sys.argv[1]))
model.set_dtype(mx.float32)
prompt = np.load(sys.argv[2])
np.save(sys.argv[3], np.array(model(mx.array(prompt)[None])[0].astype(mx.float32)))
"""
CONVERT = """
import sys
from mlx_lm import convert
convert(sys.argv[1], sys.argv[2], quantize=True, q_group_size=64, q_bits=int(sys.argv[3]))
"""
NAMES = ["mlx-4bit", "mlx-8bit", "mlx-mxfp8", "mlx-nvfp4", "mlx-mxfp4", "mlx-mxfp4-q8", "mlx-mxfp4-q4"]


def run(code, *arguments):
    out = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr[-3000:]


@pytest.fixture(scope="module")
def prompt(request):
    return load_file(request.getfixturevalue("mini") / "reference.safetensors")["prompt"]


def mlx_lm_logits(folder, prompt, tmp_path):
    np.save(tmp_path / "prompt.npy", prompt)
    run(LOGITS, folder, tmp_path / "prompt.npy", tmp_path / "logits.npy")
    return np.load(tmp_path / "logits.npy")


def our_logits(folder, prompt):
    with mlx_gptoss.load(folder, dtype="float32", device="cpu") as model:
        return model.logits(prompt.tolist())


def truncate(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"]["truncate"] = True
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", NAMES)
def test_mlx_lm_loads_what_we_write_and_agrees_once_we_round_too(mini, tmp_path, prompt, relative_error, name):
    mlx_gptoss.convert(mini / "mxfp4", tmp_path / "out", to=name)
    theirs = mlx_lm_logits(tmp_path / "out", prompt, tmp_path)
    assert relative_error(our_logits(tmp_path / "out", prompt), theirs) > 1e-3  # not rounded, as OpenAI computes it
    truncate(tmp_path / "out")
    assert relative_error(our_logits(tmp_path / "out", prompt), theirs) < 1e-4


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_we_load_what_mlx_lm_writes_and_agree(mini, tmp_path, prompt, relative_error, bits):
    run(CONVERT, mini / "mxfp4", tmp_path / "theirs", bits)
    truncate(tmp_path / "theirs")
    theirs = mlx_lm_logits(tmp_path / "theirs", prompt, tmp_path)
    assert relative_error(our_logits(tmp_path / "theirs", prompt), theirs) < 1e-4
