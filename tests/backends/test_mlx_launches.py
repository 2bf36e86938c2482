"""A decoded token needs few kernel launches. Ours and mlx-lm's are counted on the same checkpoint, without a GPU."""

from __future__ import annotations

import shutil
from dataclasses import fields

import mlx.core as mx
import pytest

import mlx_gptoss
from mlx_gptoss.api import NANO
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.backends.mlx.elementwise import UNCOMPILED, compiled
from mlx_gptoss.backends.mlx.launches import count, launches_per_token, mlx_lm_launches_per_token, traced
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [field.name for field in fields(UNCOMPILED)])
def test_compiled_chains_are_one_launch_and_the_same_numbers(name, dtype, compiler):
    dtype = getattr(mx, dtype)

    def random(*shape):
        return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype) * 4

    outputs = [random(3, 8 * i)[:, :8] for i in range(1, 9)]
    arguments = {
        "add": (random(3, 8), random(8), random(3, 8)),
        "swiglu": (random(3, 4, 1, 8), random(3, 4, 1, 8), random(3, 4, 1, 8), random(3, 4, 1, 8), 7.0, 1.702),
        "combine": (random(3, 8), outputs[:4], outputs[4:], [random(3, 1) for _ in range(4)]),
        "add_gumbel_noise": (
            mx.random.normal((2, 50)), mx.array([[0.0], [0.7]]), mx.array([[1, 2], [3, 4]], dtype=mx.uint32),
        ),
    }[name]  # fmt: skip
    mx.eval(arguments)
    plain, fused = getattr(UNCOMPILED, name)(*arguments), getattr(compiled(), name)(*arguments)
    launches = count([fused])
    assert launches == (3 if name == "add_gumbel_noise" else 1)  # a separate kernel makes the random bits
    assert plain.dtype == fused.dtype
    assert mx.abs(plain - fused).max().item() <= (1e-5 if dtype == mx.float32 else 2**-7) * mx.abs(plain).max().item()
