"""Run on every rank by the tests: compares logits and greedy tokens of a split model with those of one process.

usage: python logits.py mlx|cuda|kernels FOLDER...

Rank 0 prints a line of JSON per checkpoint. "kernels" is cuda with the Triton kernels, interpreted on a CPU.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.loading.plan import LoadRequest, open_source, plan_load
from mlx_gptoss.ranks import find_launch
from mlx_gptoss.sampling import Sampling

LIMITS = Limits(slots=2, max_context=200, chunk=32)
GREEDY = Sampling(temperature=0)
PROMPT = tuple(np.random.default_rng(1).integers(0, 300, 40).tolist())  # longer than the window of 8 and than a chunk
TOKENS = 6


def greedy(runner):
    """Tokens of two sequences, one prefilled in chunks and one that joins it, so that steps have rows of every kind."""
    runner.submit([Row(1, 0, PROMPT[:32], None)])
    first = [Row(1, 32, PROMPT[32:], GREEDY, PROMPT), Row(0, 0, PROMPT[:9], GREEDY, PROMPT[:9])]
    steps = [runner.submit(first)]
    steps += [
        runner.submit([Row(0, 9 + n, None, GREEDY), Row(1, 40 + n, None, GREEDY)][:: -1 if n % 2 else 1])
        for n in range(TOKENS)
    ]
    return [sorted(sampled.token for sampled in step.wait()) for step in steps]


def load(plan, backend):
    if backend != "kernels":
        return plan.load(LIMITS)
    load = plan.module.load
    return load(plan.weights, device="cpu", dtype="float32", limits=LIMITS, shard=plan.shard, kernels=True)


def main(backend: str, *folders: str) -> None:
    launch = find_launch()
    assert launch is not None
    for folder in folders:
        request = LoadRequest(
            model=folder, backend=launch.backend, device="cpu", dtype="float32", max_context=LIMITS.max_context
        )
        split = load(plan_load(request, open_source(request), launch.rank, launch.ranks), backend)
        logits, tokens = split.logits(PROMPT), greedy(split)
        if launch.rank == 0:
            alone = plan_load(request, open_source(request)).load(LIMITS)
            expected = alone.logits(PROMPT)
            error = float((np.abs(logits - expected).max(axis=-1) / np.abs(expected).max(axis=-1)).max())
            print(json.dumps({"folder": folder, "error": error, "same": tokens == greedy(alone)}), flush=True)
    split.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
