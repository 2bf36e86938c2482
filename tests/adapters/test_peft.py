"""PEFT's adapters on both backends: logits as PEFT's own, rows of several adapters in one batch."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_peft import CASES

from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.adapters import open_adapter

GREEDY = Sampling(temperature=0)
LIMITS = Limits(4, 128, 16)


@pytest.fixture(scope="module", params=BACKENDS)
def runner_of(request, backend_module, device_of, tiny, made_by_peft):
    """One runner with the adapters of all cases, in their order."""
    checkpoint = checkpoints.open(tiny)
    adapters = [open_adapter(made_by_peft(case)[0], checkpoint.config) for case in CASES]
    return backend_module(request.param).load(
        checkpoint, device=device_of(request.param), dtype="float32", limits=LIMITS, adapters=adapters
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(runner_of, made_by_peft, ids, relative_error, case):
    expected = made_by_peft(case)[1]
    got = runner_of.logits(ids, list(CASES).index(case))
    assert relative_error(got, expected) < 1e-5
    assert relative_error(got, runner_of.logits(ids)) > 1e-2  # it has an effect
