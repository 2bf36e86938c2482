"""Run on every rank by the tests: answers one prompt through the Python API and prints tokens and counts as JSON.

usage: python answer.py OPTIONS, a JSON object of load()'s keywords; "short": true gives rank 0 too little memory
"""

from __future__ import annotations

import json
import sys

import numpy as np

import mlx_gptoss
from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.loading.plan import LoadRequest, open_source, plan_load
from mlx_gptoss.ranks import find_launch
from mlx_gptoss.sampling import Sampling

PROMPT = 6 * tuple(
    np.random.default_rng(1).integers(0, 300, 60).tolist()
)  # several chunks, and repetitive, so drafts are found
ENDLESS = Sampling(temperature=0, logit_bias=dict.fromkeys((339, 340), -100.0))  # its stop ids


def leave_no_room(options):
    """Pretend that free memory is what the smallest plan needs, less the embeddings."""
    backend.available_memory = lambda device: 0
    launch = find_launch()
    request = LoadRequest(backend="mlx", max_context=options["max_context"], prefix_cache=0)
    plan = plan_load(request, open_source(request), launch.rank, launch.ranks)
    available = plan.memory.needed_bytes - plan.part.matrix_bytes("embed")
    backend.available_memory = lambda device: available * launch.ranks_on_host


def main(text: str) -> None:
    options = json.loads(text)
    if options.pop("short", False) and find_launch().rank == 0:
        leave_no_room(options)
    with mlx_gptoss.load(**options) as model:
        *_, finished = model.stream_raw(PROMPT, sampling=ENDLESS, max_tokens=24)
        counts = {"mapped": model.plan.mapped_bytes, "drafted": finished.drafted, "accepted": finished.accepted}
        numbers = {"ids": [token.id for token in finished.tokens], "logprobs": [t.logprob for t in finished.tokens]}
        print(json.dumps({**numbers, **counts, **vars(finished.usage)}))


if __name__ == "__main__":
    main(sys.argv[1])
