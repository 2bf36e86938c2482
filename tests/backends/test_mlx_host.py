"""Products and attention of a CPU match float64, for weights in every kind of storage, with kernels and by numpy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.backends import mlx
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.backends.mlx import host
from mlx_gptoss.backends.mlx.cpu import products as cpu_products
from mlx_gptoss.backends.mlx.cpu.products import Products, Stored
from mlx_gptoss.backends.mlx.elementwise import UNCOMPILED
from mlx_gptoss.backends.mlx.fuse import fuse, split_rows
from mlx_gptoss.backends.mlx.host_step import HostBlock
from mlx_gptoss.backends.mlx.layers import DenseMatrix, ExpertLinear
from mlx_gptoss.backends.mlx.load import load_model
from mlx_gptoss.backends.mlx.runner import MlxRunner
from mlx_gptoss.config import PRESETS
from mlx_gptoss.loading.plan import memory_plan
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.synthetic import Synthetic
from mlx_gptoss.weights.tensor import Dense

RNG = np.random.default_rng(0)
GREEDY = Sampling(temperature=0)
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


@pytest.fixture(params=[True, False], ids=["compiled", "numpy"], scope="module")
def products(request):
    if request.param:
        pytest.importorskip("llvmlite")
    made = Products(compiled=request.param)
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("lead", [(1,), (3,), (1, 40), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_dense_matrix(monkeypatch, products, dtype, lead, biased):
    monkeypatch.setattr(host, "MIN_FLOPS", 1)
    monkeypatch.setattr(cpu_products, "MAX_DECODED", 50 * 192)  # numpy: seven blocks of rows
    monkeypatch.setattr(cpu_products, "MIN_WORK_TO_SHARE", 1)
    weight, x, bias = normal(320, 192).astype(dtype), normal(*lead, 192), normal(320) if biased else None
    wanted = np.asarray(x, np.float64) @ np.asarray(weight.astype(mx.float32), np.float64).T
    wanted = wanted + np.asarray(bias) if biased else wanted
    assert error(host.HostMatrix(stored(weight), products).matmul(x, bias), wanted) < 1e-6
    assert error(DenseMatrix(weight).matmul(x, bias), wanted) < 1e-6


def stored(weight):
    """A dense MLX array as load() holds it."""
    values = np.asarray(weight.view(mx.uint16)).view(codecs.BFLOAT16) if weight.dtype == mx.bfloat16 else weight
    return Stored(Dense(np.asarray(values)))


def test_inputs_that_are_not_contiguous(products):
    """A transposed x, and a matrix whose inputs no vector divides (an adapter of rank 8)."""
    for inputs in (192, 8, 100):
        weight, x = normal(640, inputs), normal(inputs, 33).T
        wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        assert error(host.HostMatrix(stored(weight), products).matmul(x), wanted) < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "mxfp4",
        "fp8-dynamic",
        "int4-autoround",
        "mlx-4bit",
        "mlx-8bit",
        "mlx-3bit",
        "mlx-mxfp8",
        "nvfp4",
        "mlx-nvfp4",
        "bf16",
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_experts(monkeypatch, products, name, parts):
    """With many rows, few and none. The 60 rows use 5 of 6 experts, in ascending order."""
    monkeypatch.setattr(cpu_products, "MAX_DECODED", 50 * 192)
    source = Synthetic(PRESETS["tiny"], name)
    weights = [source.read(expert) for expert in EXPERTS]
    groups = split_rows(weights, parts)
    plain = tuple(fuse(group) for group in groups)
    rows = np.array([1, 25, 0, 20, 13, 1])
    chosen = mx.array(np.repeat(np.arange(6), rows).astype(np.uint32))
    x = normal(len(chosen), 1, 192)
    decoded = np.concatenate([values(weight) for weight in weights], axis=1).astype(np.float64)
    wanted = np.einsum("pnd,pd->pn", decoded[np.asarray(chosen)], np.asarray(x)[:, 0])[:, None]
    experts = host.HostExperts(tuple(on_host(group, products) for group in groups), (), products)
    assert error(experts(x, chosen, None), wanted) < 1e-6
    if name != "bf16":
        assert error(ExpertLinear(plain)(x, chosen, None), wanted) < 2e-6
    assert error(experts(x[:19], chosen[:19], None), wanted[:19]) < 2e-6  # of two experts
    tokens, pairs = mx.array([[0], [1], [2]], dtype=mx.uint32), mx.array([[5, 1], [1, 4], [2, 1]], dtype=mx.uint32)
    each = normal(3, 1, 1, 192)
    unsorted = np.einsum("tand,td->tan", decoded[np.asarray(pairs)], np.asarray(each)[:, 0, 0])[:, :, None]
    assert error(experts(each, pairs, tokens), unsorted) < 2e-6


def on_host(weights, products):
    """The matrix as load() makes it."""
    copied = Stored(products.copied(weights))
    read = isinstance(copied.weight, Dense) or products.reads(copied)
    return host.HostMatrix(copied, products) if read else fuse(weights)


def test_the_rows_of_an_embedding(products):
    for name in ("mxfp4", "mlx-8bit"):
        weight = Synthetic(PRESETS["tiny"], name).read("embed.weight")
        ids = mx.array([[3, 0, 3], [7, 1, 2]])
        found = on_host([weight], products).rows(ids, mx.float32)
        np.testing.assert_array_equal(np.asarray(found), values(weight)[np.asarray(ids)])


def test_a_copy_is_upcast(products):
    """Parts with rows that are not adjacent, as OpenAI interleaves gate and up."""
    whole = RNG.standard_normal((3, 10, 64), np.float32).astype(codecs.BFLOAT16)
    found = products.copied([Dense(whole[:, 0::2]), Dense(whole[:, 1::2])], upcast=True)
    wanted = np.concatenate([whole[:, 0::2], whole[:, 1::2]], axis=1).astype(np.float32)
    np.testing.assert_array_equal(found.values, wanted)
    assert found.values.dtype == np.float32


def test_the_sampler_of_a_cpu_is_that_of_mlx():
    """The same random numbers; rows of temperature 0, and tokens that a mask excludes, stay as they are."""
    logits, temperature = normal(3, 500) * 4, mx.array([[0.0], [0.7], [1.5]])
    logits[1, :400] = -mx.inf
    keys = mx.array([[1, 2], [3, 4], [5, 6]], dtype=mx.uint32)
    wanted = np.logaddexp.reduce(np.asarray(logits, np.float64), axis=-1)
    assert error(host.ELEMENTWISE.logsumexp(logits), wanted) < 1e-6
    found, plain = (np.asarray(e.add_gumbel_noise(logits, temperature, keys)) for e in (host.ELEMENTWISE, UNCOMPILED))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(plain))
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)
    assert (found[0] == np.asarray(logits)[0]).all()


def test_the_memory_plan_of_compiled_products(products):
    """Scales in float16 are held, and planned, as they are stored."""
    if not products.compiled:
        pytest.skip("numpy's products have no float16 scales")
    for name in ("int4-autoround", "mxfp4"):
        source = Synthetic(PRESETS["tiny"], name)
        planned = memory_plan(source, mlx, device="cpu", available_bytes=10**12).weights_bytes
        before = products.held_bytes
        load_model(source, mx.float32, UNCOMPILED, on_cpu=True, products=products)
        vectors = sum(param.size for param in source.params if not param.is_matrix)
        assert products.held_bytes - before == pytest.approx(planned - 2 * vectors, rel=1e-3)


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
def test_attention(monkeypatch, products, slots, queries, keys, mask):
    """In blocks of a few queries, over keys that are views of a larger cache."""
    monkeypatch.setattr(host, "MIN_FLOPS", 1)
    monkeypatch.setattr(host, "MAX_SCORES", 3 * 2 * 50)
    q = normal(slots, queries, 4, 64).swapaxes(1, 2)
    k, v = (normal(slots, 2, 90, 64)[:, :, 20 : 20 + keys] for _ in range(2))
    if mask == "some":
        mask = mx.array(RNG.random((slots, 1, queries, keys)) < 0.3)
        mask[:, :, 0] = queries == 1  # otherwise the first query has no key, and the sink takes all probability
    sinks = normal(4)
    found = host.attention_on(products.pool)(q, k, v, 0.125, mask, sinks)
    assert error(found, exact(q, k, v, mask, sinks)) < 1e-6


@pytest.mark.parametrize("name", ["mxfp4", "mlx-8bit"])
@pytest.mark.parametrize("drafts", [0, 3])
def test_decoding_in_numpy_is_decoding_by_mlx(products, name, drafts):
    """Eight sequences of unequal lengths, some beyond the window of 128, then one alone: log-probabilities as of the
    model without `products`."""
    source, limits = Synthetic(PRESETS["tiny"], name), Limits(8, 300, 256, drafts=drafts)
    elsewhere = load_model(source, mx.float32, UNCOMPILED, on_cpu=True)
    ours = load_model(source, mx.float32, UNCOMPILED, on_cpu=True, products=products)
    assert not any(isinstance(block, HostBlock) for block in elsewhere.blocks)
    assert products.compiled == all(isinstance(block, HostBlock) for block in ours.blocks)
    runners = [MlxRunner(model, limits, mx.cpu) for model in (elsewhere, ours)]
    lengths = [1, 40, 130, 200, 127, 128, 5, 129]
    prompts = [tuple(RNG.integers(0, 300, length).tolist()) for length in lengths]
    for runner in runners:
        for slot, prompt in enumerate(prompts):
            runner.submit([Row(slot, 0, prompt)]).wait()
    for step in range(6):
        slots = range(8) if step < 4 else [3]
        tokens = RNG.integers(0, 300, 8).tolist()
        rows = [Row(s, lengths[s] + step, (tokens[s],), GREEDY, (1,) if step == 0 else None) for s in slots]
        found, wanted = (runner.submit(rows).wait() for runner in runners)
        for one, other in zip(found, wanted, strict=True):
            assert one.token == other.token
            assert one.logprob == pytest.approx(other.logprob, abs=2e-4)
    for runner in runners:
        runner.close()
