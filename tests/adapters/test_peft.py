"""PEFT's adapters on both backends: logits as PEFT's own, rows of several adapters in one batch."""

from __future__ import annotations

from dataclasses import replace

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


def drive(runner, prompts, tokens=5):
    """Greedy ids of sequences (prompt, adapter) that decode together, one row each."""
    rows = [Row(slot, 0, prompt, GREEDY, prompt, adapter=adapter) for slot, (prompt, adapter) in enumerate(prompts)]
    steps = [[runner.submit([row]).wait()[0] for row in rows]]
    for n in range(tokens - 1):
        rows = [
            Row(slot, len(prompt) + n, None, GREEDY, adapter=adapter) for slot, (prompt, adapter) in enumerate(prompts)
        ]
        steps.append(runner.submit(rows[:: -1 if n % 2 else 1]).wait()[:: -1 if n % 2 else 1])
    return [[(sampled.token, sampled.logprob) for sampled in step] for step in zip(*steps, strict=True)]


def mixed_batch(runner, ids, *, exact):
    """Three adapters and the base in one batch: each row as alone; exact: the base's bit for bit."""
    cases = [None, list(CASES).index("both"), list(CASES).index("experts"), list(CASES).index("attention")]
    prompts = [(tuple(ids[:n]), adapter) for n, adapter in zip((13, 9, 13, 3), cases, strict=True)]
    together = drive(runner, prompts)
    base = drive(runner, [(prompt, None) for prompt, _ in prompts])
    if exact:
        assert together[0] == base[0]
    for (prompt, adapter), got in zip(prompts, together, strict=True):
        tokens = [token for token, _ in got]
        logits = runner.logits([*prompt, *tokens[:-1]], adapter)[len(prompt) - 1 :]
        assert tokens == logits.argmax(axis=-1).tolist()
        expected = [
            row[token] - np.log(np.exp(row - row.max()).sum()) - row.max()
            for row, token in zip(logits, tokens, strict=True)
        ]
        assert np.allclose([logprob for _, logprob in got], expected, atol=1e-4)


def test_a_batch_of_several_adapters(runner_of, ids):
    """A CPU multiplies all tokens of an expert at once, and its rounding depends on their number."""
    mixed_batch(runner_of, ids, exact=False)


def test_rows_without_an_adapter_are_as_before(runner_of, backend_module, device_of, tiny, ids):
    name = "mlx" if "backends.mlx" in type(runner_of).__module__ else "cuda"
    checkpoint = checkpoints.open(tiny)
    plain = backend_module(name).load(checkpoint, device=device_of(name), dtype="float32", limits=LIMITS)
    assert np.array_equal(plain.logits(ids), runner_of.logits(ids))
    prompts = [(tuple(ids[:n]), None) for n in (13, 9, 3)]
    for before, after in zip(drive(plain, prompts), drive(runner_of, prompts), strict=True):
        assert [token for token, _ in before] == [token for token, _ in after]
        # A CPU's decoding step without adapters is computed in numpy, with the same products (host_step.py).
        assert np.allclose([logprob for _, logprob in before], [logprob for _, logprob in after], atol=2e-6)


def test_a_chunk_in_stages(runner_of, ids):
    """Layer by layer, as a prompt is computed while others decode."""
    adapter = list(CASES).index("both")
    prompt = tuple(ids[:12])
    whole = runner_of.submit([Row(0, 0, prompt, GREEDY, prompt, adapter=adapter)]).wait()[0]
    for first in range(0, 6, 2):
        last = first == 4
        row = Row(0, 0, prompt, GREEDY if last else None, prompt if last else None, stages=(first, first + 2))
        got = runner_of.submit([replace(row, adapter=adapter)]).wait()[0]
    assert got == whole


def test_narrow_activations_on_a_cpu(backend_module, tiny, made_by_peft, ids):
    """bfloat16, with dense experts and those of an adapter: a CPU's products of MLX take only float32 for them."""
    checkpoint, (folder, expected) = checkpoints.open(tiny), made_by_peft("both")
    adapters = [open_adapter(folder, checkpoint.config)]
    runner = backend_module("mlx").load(checkpoint, device="cpu", dtype="bfloat16", limits=LIMITS, adapters=adapters)
    got = runner.logits(ids, 0)
    error = np.abs(got - expected).max(axis=-1) / np.abs(expected).max(axis=-1)
    assert np.median(error) < 0.05 < np.median(np.abs(runner.logits(ids) - got).max(axis=-1))
