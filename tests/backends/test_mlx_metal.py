"""What the mlx backend builds for a Mac's GPU, checked on a CPU: shapes, primitives and places, without a kernel."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.api import NANO
from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.backends.mlx import layers, model, sample
from mlx_gptoss.backends.mlx.adapters import LowRank, add_experts
from mlx_gptoss.backends.mlx.cache import FullCache, Span
from mlx_gptoss.backends.mlx.elementwise import UNCOMPILED
from mlx_gptoss.backends.mlx.fuse import fuse
from mlx_gptoss.backends.mlx.launches import decode_step, launches_of, primitives, traced
from mlx_gptoss.backends.mlx.layers import DenseMatrix, QuantizedMatrix, global_scale
from mlx_gptoss.backends.mlx.load import load_model
from mlx_gptoss.backends.mlx.quantized_kv import QuantizedKV, empty, pack
from mlx_gptoss.config import TINY
from mlx_gptoss.loading.plan import memory_plan
from mlx_gptoss.loading.recommend import derived_bytes
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.synthetic import Synthetic
from mlx_gptoss.weights.tensor import NVFP4

GREEDY = Sampling(temperature=0)
VOCABULARY = 201_088


@pytest.fixture(autouse=True)
def on_a_cpu():
    with mx.stream(mx.Device(mx.cpu)):
        yield


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


# Scales


@pytest.mark.parametrize("exact", [True, False])
def test_float16_scales_are_not_cast_by_any_product(mini, exact):
    checkpoint = checkpoints.open(mini / "int4-autoround")
    names = [f"layers.0.experts.{part}.weight" for part in ("gate", "up")]
    weights = [checkpoint.read(name) for name in names]
    assert all(w.scale.dtype == np.float16 for w in weights)
    if not exact:
        weights = [replace(w, scale=w.scale * np.float16(1.001), bias=w.bias * np.float16(1.001)) for w in weights]
    matrix = fuse(weights, mx.bfloat16)
    assert matrix.scales.dtype == matrix.biases.dtype == (mx.bfloat16 if exact else mx.float32)
    stored = np.concatenate([w.scale for w in weights], axis=-2).astype(np.float32)
    assert np.array_equal(np.array(matrix.scales.astype(mx.float32)), stored)
    x, experts = random(1, 1, 1, weights[0].shape[-1]).astype(mx.bfloat16), mx.array([[1, 0]], dtype=mx.uint32)
    mx.eval(matrix.scales, matrix.biases, matrix.codes, x)
    product = matrix.gather(x, experts, mx.array([[0]], dtype=mx.uint32))
    # In float32 the activations are cast, which are small; the scales of all experts are not.
    assert primitives([product])["AsType"] == (0 if exact else 1)
    assert fuse(weights, mx.float16).scales.dtype == mx.float16
    assert fuse(weights, mx.float32).scales.dtype == mx.float32


def test_a_step_casts_no_scales():
    """One cast a layer, of the experts' input, and one of the logits; it was eight a layer."""
    found = decode_step(Synthetic(TINY, "int4-autoround"), [GREEDY])
    assert found["AsType"] <= TINY.num_hidden_layers + 1


def nbytes(part) -> int:
    """Of all arrays in a model, but for the rotary frequencies, which it has once."""
    if isinstance(part, mx.array):
        return part.nbytes
    if isinstance(part, tuple):
        return sum(nbytes(each) for each in part)
    return sum(nbytes(each) for each in vars(part).values()) if is_dataclass(part) and not isinstance(part, type) else 0


def test_scales_in_float32_are_in_the_memory_plan(mini):
    """What is loaded is no more than the plan says, and not much less: some scales may be exact in bfloat16."""
    for source in (
        Synthetic(TINY, "int4-autoround"),
        checkpoints.open(mini / "int4-autoround"),
        checkpoints.open(mini / "gguf" / "model-q8_0.gguf"),
    ):
        planned = memory_plan(source, backend, device="cpu", dtype="bfloat16", available_bytes=10**12).weights_bytes
        assert planned > source.size_bytes + derived_bytes(source)
        assert 0.9 < nbytes(load_model(source, mx.bfloat16, UNCOMPILED)) / planned <= 1.001


def test_adapters_of_experts_stay_in_their_dtype():
    """Where the experts' hidden states are float32, an adapter is not computed expert by expert."""
    low_rank = LowRank(*(DenseMatrix(random(2, *shape).astype(mx.bfloat16)) for shape in ((4, 32), (8, 4))))
    span = SimpleNamespace(adapters=((0, None),))
    experts, rows = mx.array([[1, 0]], dtype=mx.uint32), mx.array([[0, 1]], dtype=mx.uint32)
    hidden = random(1, 2, 1, 32)
    y = add_experts(mx.zeros((1, 2, 1, 8)), hidden, [low_rank], span, experts, rows, rows)
    assert primitives([y])["GatherMM"] == 2


# NVFP4's factor


def nvfp4_experts(outer: np.ndarray | float) -> QuantizedMatrix:
    codes, scales = mx.quantize(random(4, 32, 64), group_size=16, bits=4, mode="nvfp4")
    mx.eval(codes, scales)
    return QuantizedMatrix(codes, scales, None, mx.array(outer), NVFP4)


@pytest.mark.parametrize("outer", [0.25, np.array([[0.5], [1.0], [3.0], [0.1]], np.float32)])
def test_the_global_scale_is_the_factor_of_each_expert(outer):
    """MLX divides it by 448 * 6, the largest number in NVFP4."""
    found = np.array(global_scale(nvfp4_experts(outer))) / (448 * 6)
    assert found.shape == (4,) and np.allclose(found, np.broadcast_to(np.ravel(outer), 4), rtol=1e-6)


def test_other_factors_are_multiplied_afterwards():
    by_row = nvfp4_experts(np.ones((4, 32), np.float32))
    assert global_scale(by_row) is None
    assert global_scale(replace(by_row, outer=None)) is None
    assert layers.takes_global_scale() is False  # a CPU


def test_a_global_scale_leaves_nothing_to_multiply():
    matrix = nvfp4_experts(0.25)
    scaled = replace(matrix, global_scale=mx.array([1.0, 2.0, 3.0, 4.0]))
    x, experts = random(1, 1, 1, 64), mx.array([[1, 0]], dtype=mx.uint32)
    tokens = mx.array([[0]], dtype=mx.uint32)
    with traced():
        fused = primitives([scaled.gather(x, experts, tokens)])
    assert launches_of(fused) == 1
    assert launches_of(primitives([matrix.gather(x, experts, tokens)])) == 2


# The cache


def test_an_empty_cache_in_8_bits_has_nothing_to_compute():
    shape = (2, 3, 2, 0, 64)
    found, wanted = empty(shape), pack(mx.zeros(shape))
    assert [(a.shape, a.dtype) for a in found] == [(a.shape, a.dtype) for a in wanted]
    assert primitives(FullCache((3, 2, 64), mx.bfloat16, 64, packed=True).arrays)["Quantize"] == 0


def test_values_in_8_bits_are_read_by_products_of_one_row(monkeypatch):
    cached = QuantizedKV(pack(random(2, 2, 40, 64)), pack(random(2, 2, 40, 64, seed=1)))
    p, shapes, product = random(2, 2, 8, 40, seed=2), [], mx.quantized_matmul

    def recorded(x, w, *rest, **options):
        shapes.append((x.shape, w.shape))
        return product(x, w, *rest, **options)

    monkeypatch.setattr(mx, "quantized_matmul", recorded)
    whole, rows = cached.weighted(p, by_row=False), cached.weighted(p, by_row=True)
    assert shapes[1] == ((2, 2, 8, 1, 40), (2, 2, 1, 40, 16))
    assert mx.abs(whole - rows).max().item() < 1e-5


def step_model(kv_bits: int | None = None, slots: int = 1, drafts: int = 0):
    """The bundled model as on a GPU, but in float32 and uncompiled."""
    checkpoint = checkpoints.open(NANO)
    loaded = load_model(checkpoint, mx.float32, UNCOMPILED, backend.MAX_SCORES_METAL)
    return backend.MlxRunner(loaded, Limits(slots, 300, 64, drafts, kv_bits), mx.Device(mx.cpu))


def test_a_gpu_decodes_an_8_bit_cache_as_a_cpu_does():
    """One token by products with the codes, four by decoding first: the same numbers as a CPU's one way for both."""
    prompt = tuple(range(40, 90))
    ours, cpu = (
        step_model(8, drafts=3),
        backend.load(checkpoints.open(NANO), device="cpu", dtype=None, limits=Limits(1, 300, 64, 3, 8)),
    )
    for runner in (ours, cpu):
        runner.submit([Row(0, 0, prompt, GREEDY, prompt)]).wait()
    for tokens, drafts in (((7,), ()), ((9,), (3, 4, 5)), ((3,), ())):
        row = Row(0, len(prompt), tokens, replace(GREEDY, logprobs=5), drafts=drafts)
        first, second = (runner.submit([row]).wait()[0] for runner in (ours, cpu))
        assert [t for t, _ in first.top] == [t for t, _ in second.top]
        assert np.allclose([p for _, p in first.top], [p for _, p in second.top], atol=1e-4)
        assert len(first.accepted) == len(second.accepted)
    for runner in (ours, cpu):
        runner.close()


def test_several_rows_are_written_by_one_scatter_a_layer():
    samplings = [GREEDY] * 4
    for unequal in (False, True):
        found = decode_step(checkpoints.open(NANO), samplings, unequal=unequal)
        assert found["Scatter"] == 4 and found["SliceUpdate"] == 0
        assert found["Arange"] == unequal  # of the one mask
        assert found["AsType"] == 1  # of the logits


def test_rows_of_any_slots_are_written_where_they_belong():
    runner, alone = step_model(slots=4), step_model()
    prompts = [tuple(range(20 + n, 50 + 3 * n)) for n in range(4)]
    for slot, prompt in enumerate(prompts):
        runner.submit([Row(slot, 0, prompt, GREEDY, prompt)]).wait()
    found = {}
    for step in range(3):
        rows = [Row(slot, len(prompts[slot]) + step, None, GREEDY) for slot in (0, 2, 3)]
        found[step] = [(s.token, s.logprob) for s in runner.submit(rows).wait()]
    for index, slot in enumerate((0, 2, 3)):
        alone.submit([Row(0, 0, prompts[slot], GREEDY, prompts[slot])]).wait()
        for step in range(3):
            (got,) = alone.submit([Row(0, len(prompts[slot]) + step, None, GREEDY)]).wait()
            token, logprob = found[step][index]
            assert token == got.token and logprob == pytest.approx(got.logprob, abs=1e-5)


def test_several_rows_are_written_in_place():
    """Pipelined steps copy no layer's cache: nothing holds the arrays that the next step overwrites."""
    config = replace(TINY, num_attention_heads=32, num_key_value_heads=32)
    runner = backend.load(Synthetic(config, "mlx-4bit"), device="cpu", dtype=None, limits=Limits(2, 1024, 64))
    prompts = [tuple(range(1, 20 + n)) for n in range(2)]
    for slot, prompt in enumerate(prompts):
        runner.submit([Row(slot, 0, prompt, GREEDY, prompt)]).wait()
    ahead, layer = None, max(array.nbytes for array in runner._cache.arrays)
    for step in range(16):
        pending, ahead = ahead, runner.submit([Row(i, len(p) + step, None, GREEDY) for i, p in enumerate(prompts)])
        if pending is not None:
            pending.wait()
        if step == 3:
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
    ahead.wait()
    assert layer >= 8 << 20
    assert mx.get_peak_memory() - before < layer // 2
    runner.close()


def test_masks_of_several_rows_have_all_heads():
    """MLX would copy a mask of one head to all of them in every layer."""
    span = Span.of(TINY, [0, 1], [200, 3], 1, mask_heads=TINY.num_attention_heads)
    shapes = [span.seen.shape, *(ring.seen.shape for ring in span.rings.values())]
    assert shapes == [(2, TINY.num_attention_heads, 1, 201), (2, TINY.num_attention_heads, 1, TINY.sliding_window)]
    one = Span.of(TINY, [0, 1], [200, 3], 1)
    assert mx.array_equal(span.seen[:, :1], one.seen) and one.seen.shape == (2, 1, 1, 201)
    for ring, narrow in zip(span.rings.values(), one.rings.values(), strict=True):
        assert mx.array_equal(ring.seen[:, 1:2], narrow.seen)


# Attention


def attention(max_scores: int | None, heads: int = 64, kv_heads: int = 8):
    """An Attention that records what it attends to at once."""
    calls = []

    def attend(q, k, v, scale, mask, sinks):
        calls.append((q.shape[2], k.shape[2]))
        return mx.zeros(q.shape)

    config = replace(TINY, num_attention_heads=heads, num_key_value_heads=kv_heads)
    rotary = SimpleNamespace(score_scale=1.0)
    return model.Attention(config, None, None, mx.zeros(heads), rotary, None, attend, max_scores), calls


def test_no_call_of_attention_has_more_scores_than_a_second_allows():
    layer, calls = attention(backend.MAX_SCORES_METAL)
    q, kv = mx.zeros((1, 64, 2048, 64)), mx.zeros((1, 8, 131_072, 64))
    assert layer._causal(q, kv, kv).shape == q.shape
    assert [rows for rows, _ in calls] == [512] * 4
    assert [keys for _, keys in calls] == [131_072 - 512 * n for n in (3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("tokens", "wanted"), [(1, [1]), (4, [4]), (5, [4, 1]), (7, [4, 3]), (8, [4, 4]), (9, [9]), (2048, [2048])]
)
def test_few_tokens_attend_in_numbers_that_mlx_fuses(tokens, wanted):
    layer, calls = attention(backend.MAX_SCORES_METAL)
    q, kv = mx.zeros((1, 64, tokens, 64)), mx.zeros((1, 8, 5000, 64))
    layer._causal(q, kv, kv)
    assert [rows for rows, _ in calls] == wanted
    layer._within_window(q, kv, kv, 8192)
    assert [rows for rows, _ in calls] == wanted * 2
    cpu, calls = attention(None)
    cpu._causal(q, kv, kv)
    assert [rows for rows, _ in calls] == [tokens]  # numpy bounds them itself


@pytest.mark.parametrize("tokens", [5, 8])
def test_tokens_in_two_calls_are_the_same_tokens(tokens):
    layer, _ = attention(backend.MAX_SCORES_METAL)
    layer = replace(layer, attend=layers.fused)
    q, k, v = random(1, 64, tokens, 64), random(1, 8, 70, 64, seed=1), random(1, 8, 70, 64, seed=2)
    wanted = layers.fused(q, k, v, 1.0, "causal", layer.sinks)
    assert mx.abs(layer._causal(q, k, v) - wanted).max().item() < 1e-5


def test_pairs_are_sorted_from_four_an_expert(mini):
    checkpoint = checkpoints.open(NANO)
    sorts = lambda **where: {  # noqa: E731
        block.mlp.min_pairs_to_sort for block in load_model(checkpoint, mx.float32, UNCOMPILED, **where).blocks
    }
    assert sorts() == {4 * checkpoint.config.experts[0]} == {32}
    assert sorts(on_cpu=True) == {64}


# The sampler


def test_a_request_begins_without_waiting_for_the_step_in_progress(monkeypatch):
    """The pair of keys comes from the CPU whole: an index would be computed on the device, behind the step."""
    split, streams = mx.random.split, []

    class Pair:
        def __init__(self, key, stream):
            streams.append(stream)
            self.array = split(key, stream=stream)

        def __array__(self, dtype=None, copy=None):
            return np.array(self.array)

    wanted = np.array(split(mx.random.key(3)))[0].tolist()
    monkeypatch.setattr(mx.random, "split", Pair)
    assert list(sample.SamplerState.begin(Sampling(seed=3), (1,), 3, 10).key) == wanted
    assert streams == [mx.cpu]


@pytest.mark.parametrize("size", [VOCABULARY, 200_019, 2048, 50])
@pytest.mark.parametrize("count", [1, 5, 20, 64])
def test_the_largest_are_exact_and_the_first_of_equal_ones(size, count):
    values = np.random.default_rng(size).integers(0, size // 8, (2, size)).astype(np.float32)
    values[1, size // 2 :] = -np.inf
    found = np.array(sample.largest(mx.array(values), count))
    wanted = np.argsort(-values, axis=-1, kind="stable")[:, :count]
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("options", [{"top_k": 40}, {"top_k": 50, "top_p": 0.9}, {"temperature": 0.0, "logprobs": 20}])
def test_nothing_larger_is_sorted_than_one_threadgroup_sorts(monkeypatch, options):
    sizes, argsort = [], mx.argsort
    monkeypatch.setattr(mx, "argsort", lambda x, axis: sizes.append(x.shape[axis]) or argsort(x, axis=axis))
    monkeypatch.setattr(mx, "argpartition", None)
    samplings = [Sampling(seed=1, **options), Sampling(seed=2, temperature=0.5)]
    states = [sample.SamplerState.begin(s, (1,), s.seed, VOCABULARY) for s in samplings]
    logits = random(2, VOCABULARY) * 3
    output = sample.sample_tokens(logits, samplings, states, [0, 0])
    mx.eval(output.tokens)
    assert sizes and max(sizes) <= sample.SORT_BLOCK


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [1, 7, 64])
def test_candidates_and_a_whole_sort_keep_the_same_tokens(top_k, top_p):
    logits = mx.round(random(3, 5000) * 4)  # with ties
    few = [Sampling(top_k=top_k, top_p=top_p), Sampling(), Sampling(temperature=0.3, top_k=3, top_p=0.5)]
    # A row with top_p alone makes all rows sort the whole vocabulary.
    whole = [few[0], replace(few[1], top_p=0.8), few[2]]
    first, second = (np.array(sample._top(logits, s, UNCOMPILED)) for s in (few, whole))
    assert np.array_equal(first[[0, 2]], second[[0, 2]])
    assert np.array_equal(first[1], np.array(logits)[1]) and np.isinf(second[1]).any()
    kept = np.isfinite(first).sum(axis=-1)
    assert 1 <= kept[0] <= top_k and kept[2] <= 3
