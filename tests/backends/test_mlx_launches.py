"""A decoded token needs few kernel launches. Ours and mlx-lm's are counted on the same checkpoint, without a GPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.api import NANO
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.backends.mlx.elementwise import UNCOMPILED, compiled
from mlx_gptoss.backends.mlx.launches import (
    count,
    decode_step,
    launches_of,
    launches_per_token,
    mlx_lm_decode_step,
    mlx_lm_launches_per_token,
    traced,
)
from mlx_gptoss.backends.mlx.load import load_model
from mlx_gptoss.backends.mlx.runner import MlxRunner
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints

SAMPLINGS = (Sampling(temperature=0), Sampling(seed=1, top_p=0.9), Sampling(seed=2, temperature=0.5))


@pytest.mark.parametrize("name", ["mxfp4", "mlx-4bit", "mlx-mxfp4-q8"])
def test_at_most_60_percent_of_mlx_lm(tmp_path, name):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'mlx-gptoss[test]')")
    folder = NANO
    if name != "mxfp4":
        mlx_gptoss.convert(NANO, folder := tmp_path / "out", to=name)
    for temperature in (0.0, 1.0):
        ours = launches_per_token(checkpoints.open(folder), temperature)
        theirs = mlx_lm_launches_per_token(folder, temperature)
        assert 0 < ours <= 0.6 * theirs, f"{ours} of {theirs}"


def test_the_bundled_model_launches_at_most_68_kernels_a_token():
    checkpoint = checkpoints.open(NANO)
    assert launches_per_token(checkpoint) <= 68
    assert launches_per_token(checkpoint, 1.0) <= 71


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The bundled model's four layers six times: as many as gpt-oss-20b has."""
    folder = tmp_path_factory.mktemp("deep")
    tensors = {}
    for name, array in mx.load(str(NANO / "model.safetensors")).items():
        head, _, rest = name.partition("model.layers.")
        number, _, tail = rest.partition(".")
        copies = range(int(number), 24, 4) if rest and not head else ()
        tensors |= {f"model.layers.{copy}.{tail}": array for copy in copies} or {name: array}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    config = json.loads((NANO / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": 24, "layer_types": config["layer_types"] * 6}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(NANO / "tokenizer.json", folder)
    return folder


def test_24_layers(deep):
    """One row and several, of which each layer costs as much as one row's."""
    checkpoint = checkpoints.open(deep)
    one, *several = (
        launches_of(decode_step(checkpoint, [SAMPLINGS[0]] * rows, unequal=unequal))
        for rows, unequal in ((1, False), (4, False), (4, True))
    )
    assert one <= 368
    assert max(several) <= one + 3


def test_the_host_builds_fewer_objects_than_mlx_lm(deep):
    """Primitives, views included: they are what a step costs the host."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'mlx-gptoss[test]')")
    ours = sum(decode_step(checkpoints.open(deep), [SAMPLINGS[0]]).values())
    theirs = sum(mlx_lm_decode_step(deep).values())
    assert 0 < ours <= 0.6 * theirs, f"{ours} of {theirs}"


def test_the_count_leaves_views_out_and_takes_a_fast_operation_as_one():
    x, weight = mx.ones((2, 8)), mx.ones((8,))
    mx.eval(x, weight)
    with traced():
        normed = mx.fast.rms_norm(x, weight, 1e-5)
        assert count([normed]) == 1
        assert count([normed.reshape(4, 4).swapaxes(0, 1)[1:]]) == 1
        assert count([normed + 1, normed * 2]) == 3
    assert count([mx.fast.rms_norm(x, weight, 1e-5)]) > 1  # as the CPU runs it


@pytest.fixture
def compiler():
    if mx.default_device().type == mx.cpu and shutil.which("g++") is None:
        pytest.skip("MLX compiles for a CPU with g++, which is not here")


def test_a_model_of_compiled_chains_computes_the_same(mini, compiler):
    """Prompts and batches of many shapes through one set of compiled functions."""
    cpu = mx.Device(mx.cpu)
    texts = []
    for chains in (UNCOMPILED, compiled()):
        with mx.stream(cpu):
            model = load_model(checkpoints.open(mini / "mlx-4bit"), mx.float32, chains)
        runner = MlxRunner(model, Limits(3, 100, 64), cpu)
        prompts = [tuple(range(20, 20 + n)) for n in (1, 5, 40)]
        steps = [[Row(i, 0, p, SAMPLINGS[i], p)] for i, p in enumerate(prompts)]
        steps += [[Row(i, len(p) + n, None, SAMPLINGS[i]) for i, p in enumerate(prompts)] for n in range(12)]
        texts.append([[s.token for s in runner.submit(rows).wait()] for rows in steps])
    assert texts[0] == texts[1]


def numbers(array):
    return np.array(array.astype(mx.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [field.name for field in fields(UNCOMPILED)])
def test_compiled_chains_are_one_launch_and_the_same_numbers(name, dtype, compiler):
    dtype = getattr(mx, dtype)

    def random(*shape):
        return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype) * 4

    outputs = [random(3, 1, 1, 8 * i)[..., :8] for i in range(1, 9)]
    b, n = 2, 40
    ranked = mx.array(-np.sort(-np.random.default_rng(0).normal(size=(b, n)) * 3).astype(np.float32))
    ranks, top_k = mx.arange(n), mx.array([[5], [n]])
    weights = UNCOMPILED.weights(ranked, ranked[:, :1], mx.array([[0.5], [1.0]]), ranks, top_k)
    arguments = {
        "finish": (random(3, 8), random(8), random(3, 8), str(dtype).removeprefix("mlx.core.")),
        "weights": (ranked, ranked[:, :1], mx.array([[0.5], [1.0]]), ranks, top_k),
        "nucleus": (ranked, weights, mx.cumsum(weights, axis=-1), ranks, top_k, mx.array([[0.6], [0.9]])),
        "combine_chosen": (random(3, 1, 1, 8), random(3, 4, 1, 8), random(3, 4, 1, 8), random(3, 4), random(8)),
        "swiglu": (random(3, 4, 1, 8), random(3, 4, 1, 8), random(3, 4, 1, 8), random(3, 4, 1, 8), 7.0, 1.702),
        "combine": (random(3, 1, 1, 8), outputs[:4], outputs[4:], [random(3, 1, 1, 1) for _ in range(4)]),
        "logsumexp": (random(3, 50),),
        "add_gumbel_noise": (
            mx.random.normal((2, 50)), mx.array([[0.0], [0.7]]), mx.array([[1, 2], [3, 4]], dtype=mx.uint32),
        ),
    }[name]  # fmt: skip
    mx.eval(arguments)
    plain, fused = getattr(UNCOMPILED, name)(*arguments), getattr(compiled(), name)(*arguments)
    plain, fused = ((found if isinstance(found, tuple) else (found,)) for found in (plain, fused))
    launches = count(fused)
    assert launches == (3 if name == "add_gumbel_noise" else 1)  # a separate kernel makes the random bits
    for one, other in zip(plain, fused, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(np.isinf(numbers(one)), np.isinf(numbers(other)))
        one, other = (numbers(array)[np.isfinite(numbers(array))] for array in (one, other))
        assert np.abs(one - other).max() <= (1e-5 if dtype == mx.float32 else 2**-7) * np.abs(one).max()
