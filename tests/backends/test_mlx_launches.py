"""A decoded token costs few launches: counted beside mlx-lm's, on the same checkpoint, without running either."""

from __future__ import annotations

import shutil
from dataclasses import fields

import mlx.core as mx
import pytest

import mlx_gptoss
from mlx_gptoss.api import NANO
from mlx_gptoss.backends.mlx.elementwise import PLAIN, compiled
from mlx_gptoss.backends.mlx.launches import count, launches_per_token, mlx_lm_launches_per_token, traced
from mlx_gptoss.weights import checkpoint as checkpoints


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
    assert count([mx.fast.rms_norm(x, weight, 1e-5)]) > 1  # as the CPU really does it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [field.name for field in fields(PLAIN)])
def test_compiled_chains_are_one_launch_and_the_same_numbers(name, dtype):
    if mx.default_device().type == mx.cpu and shutil.which("g++") is None:
        pytest.skip("MLX compiles for a CPU with g++, which is not here")
    dtype = getattr(mx, dtype)

    def random(*shape):
        return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype) * 4

    outputs = [random(3, 8 * i)[:, :8] for i in range(1, 9)]
    arguments = {
        "add": (random(3, 8), random(8), random(3, 8)),
        "swiglu": (random(3, 4, 1, 8), random(3, 4, 1, 8), random(3, 4, 1, 8), random(3, 4, 1, 8), 7.0, 1.702),
        "combine": (random(3, 8), outputs[:4], outputs[4:], [random(3, 1) for _ in range(4)]),
        "noisy": (mx.random.normal((2, 50)), mx.array([[0.0], [0.7]]), mx.array([[1, 2], [3, 4]], dtype=mx.uint32)),
    }[name]  # fmt: skip
    mx.eval(arguments)
    plain, fused = getattr(PLAIN, name)(*arguments), getattr(compiled(), name)(*arguments)
    launches = count([fused])
    assert launches == (3 if name == "noisy" else 1)  # the random bits come from a kernel of their own
    assert plain.dtype == fused.dtype
    assert mx.abs(plain - fused).max().item() <= (1e-5 if dtype == mx.float32 else 2**-7) * mx.abs(plain).max().item()
