"""bitsandbytes' 4-bit checkpoints, in transformers' and in Unsloth's layout, from random codes.

What bitsandbytes itself writes and decodes is compared by ../judge_tools.py.
"""

from __future__ import annotations

import json

import family
import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights import codecs

EXPERTS = [4, 4]
CONFIG = family.CONFIG | {"num_hidden_layers": 2, "num_local_experts": 4, "sliding_window": 8}
TABLE = np.sort(np.random.default_rng(3).uniform(-1, 1, 16)).astype(np.float32)
NESTED_TABLE = np.sort(np.random.default_rng(4).uniform(-1, 1, 256)).astype(np.float32)


def own_encoder(weight, nested=True):
    """(tensors by suffix, decoded values), as bitsandbytes lays them out, from random codes."""
    rng = np.random.default_rng(weight.size)
    codes = rng.integers(0, 16, weight.size).astype(np.uint8)
    blocks = -(-weight.size // 64)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    found = {"": (codes[::2] << 4 | codes[1::2])[:, None], ".quant_map": TABLE}
    if nested:
        absmax = rng.integers(0, 256, blocks).astype(np.uint8)
        outer = rng.uniform(0.1, 0.2, -(-blocks // 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.3}
        found |= {".absmax": absmax, ".nested_absmax": outer, ".nested_quant_map": NESTED_TABLE}
        scales = NESTED_TABLE[absmax] * np.repeat(outer, 256)[:blocks] + np.float32(0.3)
    else:
        scales = rng.uniform(0.1, 0.5, blocks).astype(np.float32)
        found[".absmax"] = scales
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    values = (TABLE[codes] * np.repeat(scales, 64)[: weight.size]).reshape(weight.shape)
    return found | {".quant_state.bitsandbytes__nf4": text}, values


def layout(encode, per_expert):
    """(stored tensors, the same in float32 as `bf16` has them)"""
    plain = family.random_tensors(EXPERTS)
    stored = dict(plain)
    for layer in range(2):
        for part in "qkvo":
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            parts, plain[name] = encode(stored.pop(name))
            stored |= {name + suffix: array for suffix, array in parts.items()}
        prefix = f"model.layers.{layer}.mlp.experts"
        for fused in ("gate_up_proj", "down_proj") if per_expert else ():
            weights, biases = stored.pop(f"{prefix}.{fused}"), stored.pop(f"{prefix}.{fused}_bias")
            decoded = np.empty_like(weights)
            for expert, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                name = f"{prefix}.{fused}s.{expert}"
                parts, values = encode(np.ascontiguousarray(weight.T))
                stored |= {f"{name}.weight{suffix}": array for suffix, array in parts.items()}
                stored[f"{name}.bias"], decoded[expert] = bias, values.T
            plain[f"{prefix}.{fused}"] = decoded
    return stored, plain


@pytest.mark.parametrize("per_expert", [False, True], ids=["transformers", "unsloth"])
@pytest.mark.parametrize("encode", [own_encoder, lambda w: own_encoder(w, nested=False)])
def test_values_and_logits(tmp_path, relative_error, encode, per_expert):
    stored, plain = layout(encode, per_expert)
    source = checkpoints.open(family.write_checkpoint(tmp_path / "bnb", CONFIG, stored))
    reference = checkpoints.open(family.write_checkpoint(tmp_path / "plain", CONFIG, plain))
    for param in source.params:
        found, wanted = (codecs.dequantize(each.read(param.name)) for each in (source, reference))
        assert np.allclose(found, wanted, rtol=1e-6, atol=1e-6), param.name
    name = "layers.1.experts.up.weight"
    part = codecs.dequantize(source.read(name, range(1, 3)))
    assert np.array_equal(part, codecs.dequantize(source.read(name))[1:3])
    ids = list(range(40))
    with mlx_gptoss.load(tmp_path / "bnb", dtype="float32", device="cpu") as model:
        assert model.format == "bnb-4bit"
        expected = family.logits(plain, [8, None], ids)
        assert relative_error(model.logits(ids), expected) < 1e-4


def test_show_and_conversion(tmp_path):
    stored, _ = layout(own_encoder, True)
    folder = family.write_checkpoint(tmp_path / "bnb", CONFIG, stored)
    summary = checkpoints.open(folder).summary()
    assert "decoded to float32" in summary.note and summary.roles["experts"]["format"] == "bnb-4bit"
    mlx_gptoss.convert(folder, tmp_path / "out", to="mlx-8bit")
    assert checkpoints.open(tmp_path / "out").format == "mlx-8bit"


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)}, "not JSON"),
        ({f"{Q}.quant_state.bitsandbytes__nf4": np.frombuffer(b"[1]", np.uint8)}, "not a JSON object"),
        ({f"{Q}.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"blocksize": 128}', np.uint8)}, "blocks of 128"),
        ({f"{Q}.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"blocksize": 64}', np.uint8)}, "nested_offset"),
        ({f"{Q}.quant_map": np.full(16, np.nan, np.float32)}, "not a number"),
        ({f"{Q}.quant_map": np.zeros(8, np.float32)}, "wrong shape"),
        ({f"{Q}.absmax": np.zeros(3, np.uint8)}, "wrong shape"),
        ({Q: np.zeros((7, 1), np.uint8)}, "wrong shape"),
        ({f"{Q}.nested_absmax": None}, "missing"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, change, message):
    stored, _ = layout(own_encoder, False)
    stored = {name: array for name, array in (stored | change).items() if array is not None}
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open(family.write_checkpoint(tmp_path / "bnb", CONFIG, stored)).read("layers.0.attention.q.weight")
