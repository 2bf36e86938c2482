"""Run by the tests on every rank: one prompt answered through the Python API, and what is known of it, as JSON.

usage: python answer.py OPTIONS, which is a JSON object: load()'s keywords; "short": rank 0 has no room for embeddings.
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

PROMPT = 6 * tuple(np.random.default_rng(1).integers(0, 300, 60).tolist())  # over a cut, and drafts are found
ENDLESS = Sampling(temperature=0, logit_bias=dict.fromkeys((339, 340), -100.0))  # the ids that it stops at


def leave_no_room(options):
    """Free memory that is short of the smallest plan by as much as the embeddings take."""
    backend.available_memory = lambda device: 0
    launch = find_launch()
    request = LoadRequest(backend="mlx", max_context=options["max_context"], prefix_cache=0)
    plan = plan_load(request, open_source(request), launch.rank, launch.ranks)
    room = plan.memory.needed_bytes - plan.part.matrix_bytes("embed")
    backend.available_memory = lambda device: room * launch.ranks_on_host


def main(text: str) -> None:
    options = json.loads(text)
    if options.pop("short", False) and find_launch().rank == 0:
        leave_no_room(options)
    with mlx_gptoss.load(**options) as model:
        *_, finished = model.stream_raw(PROMPT, sampling=ENDLESS, max_tokens=24)
        more = {"mapped": model.plan.mapped_bytes, "drafted": finished.drafted, "accepted": finished.accepted}
        numbers = {"ids": [token.id for token in finished.tokens], "logprobs": [t.logprob for t in finished.tokens]}
        print(json.dumps({**numbers, **more, **vars(finished.usage)}))


if __name__ == "__main__":
    main(sys.argv[1])
