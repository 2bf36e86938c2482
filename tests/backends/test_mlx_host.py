"""Products computed by numpy on a CPU match MLX's, for weights in every kind of storage."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.backends.mlx import host
from mlx_gptoss.backends.mlx.layers import DenseMatrix, ExpertLinear
from mlx_gptoss.backends.mlx.load import fuse, split_rows
from mlx_gptoss.config import PRESETS
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.synthetic import Synthetic
from mlx_gptoss.weights.tensor import Dense

RNG = np.random.default_rng(0)
EXPERTS = ["layers.0.experts.gate.weight", "layers.0.experts.up.weight"]

pytestmark = pytest.mark.skipif(
    not host.enabled(on_cpu=True, dtype=mx.float32), reason="a Mac's CPU has a BLAS that MLX uses"
)


@pytest.fixture(autouse=True)
def on_cpu():
    with mx.stream(mx.cpu):
        yield


def normal(*shape):
    return mx.array(RNG.standard_normal(shape, np.float32))


def error(found, wanted):
    wanted = np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [(1,), (3,), (1, 40), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_dense_matrix(monkeypatch, dtype, lead, biased):
    monkeypatch.setattr(host, "MIN_FLOPS_FOR_BLAS", 1)
    monkeypatch.setattr(host, "UPCAST_ELEMENTS", 50 * 192)  # seven blocks of rows
    weight, x, bias = normal(320, 192).astype(dtype), normal(*lead, 192), normal(320) if biased else None
    wanted = np.asarray(x, np.float64) @ np.asarray(weight.astype(mx.float32), np.float64).T
    wanted = wanted + np.asarray(bias) if biased else wanted
    assert error(host.HostMatrix(weight).matmul(x, bias), wanted) < 1e-6
    assert error(DenseMatrix(weight).matmul(x, bias), wanted) < 1e-6


def test_small_products_are_left_to_mlx(monkeypatch):
    monkeypatch.setattr(host, "to_numpy", None)
    matrix = host.HostMatrix(normal(320, 192))
    assert matrix.matmul(normal(4, 192)).shape == (4, 320)
    with pytest.raises(TypeError):
        matrix.matmul(normal(64, 192))


@pytest.mark.parametrize(
    "name",
    ["mxfp4", "fp8-dynamic", "int4-autoround", "mlx-4bit", "mlx-8bit", "mlx-mxfp8", "nvfp4", "mlx-nvfp4", "bf16"],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_experts(monkeypatch, name, parts):
    """With many rows, few and none. The 60 rows use 5 of 6 experts, in ascending order."""
    monkeypatch.setattr(host, "MAX_DECODED", 50 * 192)
    monkeypatch.setattr(host, "MIN_FLOPS_FOR_BLAS", 1)
    source = Synthetic(PRESETS["tiny"], name)
    weights = [source.read(expert) for expert in EXPERTS]
    if name == "bf16":
        matrices = (host.HostMatrix(fuse(weights).weight),)
    else:
        matrices = tuple(fuse(part) for part in split_rows(weights, parts))
    rows = np.array([1, 25, 0, 20, 13, 1])
    chosen = mx.array(np.repeat(np.arange(6), rows).astype(np.uint32))
    x = normal(len(chosen), 1, 192)
    decoded = np.concatenate([values(weight) for weight in weights], axis=1).astype(np.float64)
    wanted = np.einsum("pnd,pd->pn", decoded[np.asarray(chosen)], np.asarray(x)[:, 0])[:, None]
    assert error(host.HostExperts(matrices)(x, chosen, None), wanted) < 1e-6
    assert error(ExpertLinear(matrices)(x, chosen, None), wanted) < 2e-6
    if name != "bf16":
        monkeypatch.setattr(host, "as_quantized", None)
        few = host.HostExperts(matrices)(x[:19], chosen[:19], None)  # of two experts
        assert error(few, wanted[:19]) < 2e-6


def values(weight):
    return weight.values.astype(np.float32) if isinstance(weight, Dense) else codecs.dequantize(weight)


def exact(q, k, v, mask, sinks):
    """Attention with sinks in float64, as transformers' eager_attention_forward of gpt-oss computes it."""
    q, k, v, sinks = (np.asarray(a, np.float64) for a in (q, k, v, sinks))
    each, (L, S) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    scores = 0.125 * q @ np.repeat(k, each, axis=1).swapaxes(-1, -2)
    if isinstance(mask, str):
        scores = np.where(np.arange(S) <= np.arange(S - L, S)[:, None], scores, -np.inf)
    elif mask is not None:
        scores = np.where(np.asarray(mask), scores, -np.inf)
    sink = np.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
    weights = np.exp(np.concatenate([scores, sink], axis=-1))
    return (weights / weights.sum(axis=-1, keepdims=True))[..., :-1] @ np.repeat(v, each, axis=1)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(("queries", "keys"), [(1, 50), (7, 50), (50, 50)])
@pytest.mark.parametrize("mask", ["causal", "some", None])
def test_attention(monkeypatch, slots, queries, keys, mask):
    """In blocks of a few queries, over keys that are views of a larger cache."""
    monkeypatch.setattr(host, "MIN_FLOPS_FOR_BLAS", 1)
    monkeypatch.setattr(host, "MAX_SCORES", 3 * 2 * 50)
    q = normal(slots, queries, 4, 64).swapaxes(1, 2)
    k, v = (normal(slots, 2, 90, 64)[:, :, 20 : 20 + keys] for _ in range(2))
    if mask == "some":
        mask = mx.array(RNG.random((slots, 1, queries, keys)) < 0.3)
        mask[:, :, 0] = queries == 1  # otherwise the first query has no key, and the sink takes all probability
    sinks = normal(4)
    found = host.attend(q, k, v, 0.125, mask, sinks)
    assert error(found, exact(q, k, v, mask, sinks)) < 1e-6
