"""A whole model with every custom kernel writes what it writes without them."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlx_gptoss
from mlx_gptoss.api import NANO
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.backends.mlx.elementwise import UNCOMPILED
from mlx_gptoss.backends.mlx.kernels.choose import Chooser, score_factor
from mlx_gptoss.backends.mlx.kernels.verdicts import Verdicts
from mlx_gptoss.backends.mlx.load import load_model
from mlx_gptoss.backends.mlx.runner import MlxRunner
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints


def texts(runner: MlxRunner, steps: int) -> list[list[int]]:
    """Three sequences of unequal length side by side, with a likeliest token each step, and then one of them alone."""
    sampling = Sampling(temperature=0, logprobs=2)
    prompts = [tuple(range(20, 20 + n)) for n in (1, 5, 140)]  # across the window's end
    found = [[s.token for s in runner.submit([Row(i, 0, p, sampling, p)]).wait()] for i, p in enumerate(prompts)]
    for step in range(steps):
        rows = [Row(i, len(p) + step, None, sampling) for i, p in enumerate(prompts)]
        found.append([s.token for s in runner.submit(rows).wait()])
    alone = runner.submit([Row(2, 140 + steps, None, sampling)]).wait()[0]
    return [*found, [alone.token, *(round(logprob, 4) for _, logprob in alone.top)]]


@pytest.mark.parametrize(
    ("name", "kv_bits", "used"),
    [
        ("mxfp4", None, {"router", "swiglu", "down", "attention"}),
        ("mlx-4bit", 8, {"router", "swiglu", "down", "attention", "norm"}),
    ],
)
def test_the_same_text(tmp_path, metal, name, kv_bits, used):
    folder = NANO
    if name != "mxfp4":
        mlx_gptoss.convert(NANO, folder := tmp_path / "model", to=name)
    checkpoint = checkpoints.open(folder)
    config = checkpoint.config
    chooser = Chooser(config, mx.float32, score_factor(config), kv_bits, Verdicts(tmp_path, "here"))
    found = []
    for choice in (None, chooser):
        with mx.stream(mx.default_device()):
            model = load_model(checkpoint, mx.float32, UNCOMPILED, chooser=choice)
        if metal is not None:
            metal.launches.clear()
        runner = MlxRunner(model, Limits(3, 400, 200, kv_bits=kv_bits), mx.default_device())
        found.append(texts(runner, 4))
        runner.close()
    assert not chooser.reasons and all(case.error <= case.limit for _, case in chooser.cases)
    assert metal is None or set(metal.launches) == used
    assert found[0] == found[1]
