"""transformers, auto-round through transformers, and mlx-lm load converted checkpoints, each in its own process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_gptoss.config import ModelConfig
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.config_json import published
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.formats import recipe_of
from mlx_gptoss.weights.params import parameters
from mlx_gptoss.weights.safetensors import DTYPES
from mlx_gptoss.weights.tensor import NVFP4, Quantized
from mlx_gptoss.weights.writer import Writer

TRANSFORMERS = """
import sys, numpy as np, torch
from transformers import GptOssForCausalLM, Mxfp4Config
options = {"quantization_config": Mxfp4Config(dequantize=True)} if sys.argv[2] == "mxfp4" else {}
model = GptOssForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager", **options)
with torch.no_grad():
    np.save(sys.argv[4], model(torch.tensor(np.load(sys.argv[3]))[None].long()).logits[0].numpy())
"""
AUTO_ROUND = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu", output_loading_info=True)
assert not any(info.values()), info
weights = {}
for name, module in model.named_modules():
    if hasattr(module, "qweight"):
        with torch.no_grad():  # rows of the identity select the columns
            weights[name] = (module(torch.eye(module.qweight.shape[0] * 8)) - module.bias).float().T.numpy()
np.savez(sys.argv[2], **weights)
"""
MLX_LM = """
import sys, numpy as np, mlx.core as mx
from pathlib import Path
from mlx_lm.utils import load_model, dequantize_model
from mlx.utils import tree_flatten
from mlx_gptoss.weights.config_json import published
mx.set_default_device(mx.cpu)
model, _ = load_model(Path(sys.argv[1]))
model = dequantize_model(model)
weights = {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(model.parameters())}
np.savez(sys.argv[2], **weights)
"""


def run(code: str, *arguments) -> None:
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
@pytest.mark.parametrize("name", ["mxfp4", "bf16"])
def test_transformers_computes_the_reference_logits(mini, tmp_path, relative_error, name):
    convert(mini / "mxfp4-original", tmp_path / name, name)
    reference = load_file(mini / "reference.safetensors")
    np.save(tmp_path / "prompt.npy", reference["prompt"])
    run(TRANSFORMERS, tmp_path / name, name, tmp_path / "prompt.npy", tmp_path / "logits.npy")
    assert relative_error(np.load(tmp_path / "logits.npy"), reference["logits"]) < 1e-4


@pytest.mark.skipif(not importlib.util.find_spec("auto_round"), reason="auto-round is not installed")
def test_transformers_fills_every_expert_through_auto_round(mini, tmp_path):
    """Only the experts: auto-round 0.16.1 joins them wrongly under transformers 5 (see the README)."""
    convert(mini / "mxfp4", tmp_path / "out", "int4-autoround")
    run(AUTO_ROUND, tmp_path / "out", tmp_path / "weights.npz")
    theirs, ours = np.load(tmp_path / "weights.npz"), checkpoint.open(tmp_path / "out")
    names = [(layer, kind) for layer in range(2) for kind in ("gate", "up", "down")]
    assert len(theirs.files) == 6 * len(names)
    for layer, kind in names:
        for expert, wanted in enumerate(codecs.dequantize(ours.read(f"layers.{layer}.experts.{kind}.weight"))):
            got = theirs[f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj"]
            assert np.allclose(got, wanted, rtol=0, atol=2e-3), (layer, expert, kind)  # auto-round computes in float16


@pytest.mark.skipif(not importlib.util.find_spec("mlx_lm"), reason="mlx-lm is not installed")
def test_mlx_lm_loads_modules_that_stay_dense(tmp_path):
    """Rows of 96 and 160 values have no whole groups of 64, so those modules are not quantized."""
    config = ModelConfig(
        num_hidden_layers=2, hidden_size=96, intermediate_size=160, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=100,
    )  # fmt: skip
    source = tmp_path / "source"
    source.mkdir()
    form, _ = recipe_of("bf16")
    infos = [info for unit in form.units("bf16", parameters(config), {}) for info in unit.tensors]
    writer, rng = Writer(source, infos, {"format": "pt"}), np.random.default_rng(0)
    for info in infos:
        writer.write(info.name, 0, rng.standard_normal(info.shape, np.float32).astype(DTYPES[info.dtype]))
    writer.finish()
    writer.close()
    (source / "config.json").write_text(json.dumps(published(config)))
    convert(source, tmp_path / "mlx", "mlx-4bit")
    run(MLX_LM, tmp_path / "mlx", tmp_path / "weights.npz")
    theirs = np.load(tmp_path / "weights.npz")
    ours = checkpoint.open(tmp_path / "mlx")
    names = {
        "layers.1.attention.o.weight": "model.layers.1.self_attn.o_proj.weight",
        "layers.0.experts.down.weight": "model.layers.0.mlp.experts.down_proj.weight",
        "layers.0.router.weight": "model.layers.0.mlp.router.weight",
        "embed.weight": "model.embed_tokens.weight",
    }
    for name, stored in names.items():
        ours_decoded = codecs.dequantize(ours.read(name))
        assert np.allclose(theirs[stored], ours_decoded, rtol=0, atol=0.03), name  # mlx-lm rounds to bfloat16


def test_a_global_scale_has_the_same_meaning_as_in_mlx():
    mx = pytest.importorskip("mlx.core")
    values = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    amax = np.abs(values).max()
    packed, scales = mx.quantize(mx.array(values), mode="nvfp4", global_scale=mx.array(amax), stream=mx.cpu)
    wanted = mx.dequantize(packed, scales, mode="nvfp4", global_scale=mx.array(amax), dtype=mx.float32, stream=mx.cpu)
    outer = np.float32(amax / 2688)
    codes = np.array(packed).view(np.uint8)
    ours = codecs.dequantize(Quantized(NVFP4, codes, np.array(scales), outer=outer))
    assert np.allclose(ours, np.array(wanted), rtol=1e-6)
