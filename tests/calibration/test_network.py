"""The network in numpy: the whole of it against the reference's logits, and its parts where the two differ in kind."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_gptoss.calibration import network
from mlx_gptoss.calibration.network import attend, rms_norm, route, swiglu
from mlx_gptoss.weights import checkpoint, codecs


def logits(source: checkpoint.Checkpoint, ids: np.ndarray) -> np.ndarray:
    """[T, V], with nothing but this module's operations and products."""
    config = source.config

    def read(name: str) -> np.ndarray:
        return codecs.dequantize(source.read(name))

    def linear(name: str, x: np.ndarray, expert: int | slice = slice(None)) -> np.ndarray:
        return x @ read(f"{name}.weight")[expert].T + read(f"{name}.bias")[expert]

    x = read("embed.weight")[ids]
    for layer in range(config.num_hidden_layers):
        at = f"layers.{layer}."
        h = rms_norm(x, read(f"{at}attention_norm.weight"), config.rms_norm_eps)
        q, k, v = (linear(f"{at}attention.{name}", h) for name in "qkv")
        mixed = attend(q, k, v, read(f"{at}attention.sinks"), [len(ids)], config, config.windows[layer])
        x = x + linear(f"{at}attention.o", mixed)
        h = rms_norm(x, read(f"{at}mlp_norm.weight"), config.rms_norm_eps)
        chosen, share = route(linear(f"{at}router", h), config.num_experts_per_tok)
        out = np.zeros_like(x)
        for token in range(len(ids)):
            for expert, part in zip(chosen[token].tolist(), share[token], strict=True):
                one = h[token : token + 1]
                gate, up = (linear(f"{at}experts.{name}", one, expert) for name in ("gate", "up"))
                inner = swiglu(gate, up, config.swiglu_limit, config.swiglu_alpha)
                out[token] += part * linear(f"{at}experts.down", inner, expert)[0]
        x = x + out
    return rms_norm(x, read("norm.weight"), config.rms_norm_eps) @ read("lm_head.weight").T


def test_logits_are_the_references(mini):
    reference = load_file(mini / "reference.safetensors")
    found = logits(checkpoint.open(mini / "mxfp4"), reference["prompt"])
    assert np.abs(found - reference["logits"]).max() < 1e-4 * np.abs(reference["logits"]).max()


@pytest.mark.parametrize("window", [None, 16])
def test_windows_and_blocks_of_queries_do_not_matter(mini, monkeypatch, window):
    """Two texts side by side are as each alone, and a block of queries is as all of them."""
    config = checkpoint.open(mini / "mxfp4").config
    rng = np.random.default_rng(5)
    q = rng.standard_normal((70, config.q_size), np.float32)
    k, v = (rng.standard_normal((70, config.kv_size), np.float32) for _ in range(2))
    sinks = rng.standard_normal(config.num_attention_heads).astype(np.float32)
    parts = [attend(q[r], k[r], v[r], sinks, [len(q[r])], config, window) for r in (slice(0, 30), slice(30, 70))]
    monkeypatch.setattr(network, "QUERIES", 7)
    assert np.allclose(attend(q, k, v, sinks, [30, 40], config, window), np.concatenate(parts), atol=1e-5)


def test_gates_far_below_zero_give_zero():
    gate = np.array([[-200.0, -1e4, 3.0]], np.float32)
    found = swiglu(gate, np.ones_like(gate), 7.0, 1.702)
    assert found[0, :2].tolist() == [0.0, 0.0] and found[0, 2] > 0
