"""Adapters through the Triton kernels: prefill and decoding steps as plain torch computes them. Interpreted without a
GPU."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from test_peft import mixed_batch
from tiny_peft import CASES

torch = pytest.importorskip("torch")

from mlx_gptoss.backends.base import Limits  # noqa: E402
from mlx_gptoss.weights import checkpoint as checkpoints  # noqa: E402
from mlx_gptoss.weights.adapters import open_adapter  # noqa: E402

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def runner(tiny, made_by_peft):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = checkpoints.open(tiny)
    adapters = [open_adapter(made_by_peft(case)[0], checkpoint.config) for case in CASES]
    return import_module("mlx_gptoss.backends.cuda").load(
        checkpoint, device=device, dtype="float32", limits=Limits(4, 64, 16), adapters=adapters, kernels=True
    )


@pytest.mark.parametrize(
    "case", ["both", *(pytest.param(case, marks=pytest.mark.slow) for case in ("rank_pattern", "router"))]
)
def test_prefill(runner, made_by_peft, ids, relative_error, case):
    expected = made_by_peft(case)[1][:10]
    assert relative_error(runner.logits(ids[:10], list(CASES).index(case)), expected) < 1e-5


@pytest.mark.slow
def test_decoding_a_batch_of_several_adapters(runner, ids):
    """Steps of one row and of four, with one adapter, with several and with none."""
    mixed_batch(runner, ids, exact=True)


def test_one_row(runner, ids):
    """Its norm is folded into the products only without an adapter."""
    from test_peft import drive

    for adapter in (None, list(CASES).index("both")):
        prompt = tuple(ids[:4])
        (got,) = drive(runner, [(prompt, adapter)], tokens=2)
        logits = runner.logits([*prompt, *(token for token, _ in got[:-1])], adapter)[len(prompt) - 1 :]
        assert [token for token, _ in got] == logits.argmax(axis=-1).tolist()
        assert np.isfinite([logprob for _, logprob in got]).all()
