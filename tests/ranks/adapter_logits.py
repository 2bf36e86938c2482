"""Run on every rank by test_adapters.py: the logits of a split model with an adapter, against those of one process.

usage: python adapter_logits.py MODEL ADAPTER. Rank 0 prints a line of JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from logits import LIMITS, PROMPT

from mlx_gptoss.backends.base import Row
from mlx_gptoss.loading.plan import LoadRequest, open_source, plan_load
from mlx_gptoss.ranks import find_launch
from mlx_gptoss.sampling import Sampling

GREEDY = Sampling(temperature=0)


def tokens(runner):
    """Two sequences in one batch, one with the adapter."""
    prompt = PROMPT[:20]
    found = []
    for slot, adapter in ((0, 0), (1, None)):
        found.append([runner.submit([Row(slot, 0, prompt, GREEDY, prompt, adapter=adapter)]).wait()[0].token])
    for n in range(5):
        rows = [Row(0, 20 + n, None, GREEDY, adapter=0), Row(1, 20 + n, None, GREEDY)]
        for each, sampled in zip(found, runner.submit(rows).wait(), strict=True):
            each.append(sampled.token)
    return found


def main(folder: str, adapter: str) -> None:
    launch = find_launch()
    assert launch is not None
    request = LoadRequest(
        model=folder,
        backend=launch.backend,
        device="cpu",
        dtype="float32",
        max_context=LIMITS.max_context,
        adapters={"a": adapter},
    )
    plan = plan_load(request, open_source(request), launch.rank, launch.ranks)
    split = plan.load(LIMITS)
    logits, base, found = split.logits(PROMPT, 0), split.logits(PROMPT), tokens(split)
    if launch.rank == 0:
        whole = plan_load(request, open_source(request))
        alone = whole.load(LIMITS)
        expected = alone.logits(PROMPT, 0)
        scale = np.abs(expected).max()
        result = {
            "error": float(np.abs(logits - expected).max() / scale),
            "effect": float(np.abs(expected - base).max() / scale),
            "same": found == tokens(alone),
            "bytes": [plan.memory.adapter_bytes, whole.memory.adapter_bytes],
        }
        print(json.dumps(result), flush=True)
    split.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
