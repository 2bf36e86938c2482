"""Every backend computes transformers' float32 logits and greedy text, from checkpoints that the reference tools wrote.

The weights are random and sharp: any wrong convention shows as an error of tens of percent.
"""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

import mlx_gptoss
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints

OWN = ["mlx-4bit", "mlx-8bit", "mlx-mxfp8", "mlx-nvfp4", "mlx-mxfp4-all", "mlx-mxfp4-q4", "mlx-mxfp4-q8"]
OWN += ["fp8-attention-only", "fp8-dynamic", "int4-autoround", "nvfp4"]
REFERENCE = {  # folder or file -> the file that holds its logits
    **dict.fromkeys(("mxfp4", "mxfp4-original", "bf16", "mlx-mxfp4", "nvfp4-bf16", "gguf/model.gguf"), "reference"),
    **{name: f"{name}.reference" for name in OWN},
    "fp8-doubled-names": "fp8-dynamic.reference",
    "fp8-half-split": "fp8-dynamic.reference",
    "gguf/model-q8_0.gguf": "gguf-q8_0.reference",
}
GREEDY = Sampling(temperature=0)
MIN_MARGIN = 1e-3  # between the best and the second-best logit of a greedy token


@pytest.fixture(params=REFERENCE)
def case(request, mini, shared):
    """(checkpoint, reference tensors), from tests/data or else from the larger collection of fixtures."""
    for root in (mini, shared / "fixtures" / "mini"):
        if (root / request.param).exists():
            return root / request.param, load_file(root / f"{REFERENCE[request.param]}.safetensors")
    pytest.skip(f"the {request.param} fixture is not in tests/data, and there is no ../shared")


@pytest.fixture(params=BACKENDS)
def backend(request, backend_module):
    backend_module(request.param)
    return request.param


def count_certain(reference) -> int:
    """The number of greedy tokens before the first whose margin is too small to be certain."""
    close = np.flatnonzero(reference["margin"] < MIN_MARGIN)
    return int(close[0]) if close.size else len(reference["greedy"])


def test_logits_match_the_reference(case, backend, device_of, relative_error):
    folder, reference = case
    with mlx_gptoss.load(folder, backend=backend, device=device_of(backend), dtype="float32") as model:
        logits = model.logits(reference["prompt"].tolist())
    assert logits.dtype == np.float32
    assert relative_error(logits, reference["logits"]) < 1e-4


def test_greedy_generation_matches_the_reference(case, backend, device_of):
    folder, reference = case
    with mlx_gptoss.load(folder, backend=backend, device=device_of(backend), dtype="float32") as model:
        done = model.complete(reference["prompt"].tolist(), max_tokens=48, sampling=GREEDY)
    certain = min(count_certain(reference), len(done.ids))
    assert certain > 8
    assert list(done.ids[:certain]) == reference["greedy"][:certain].tolist()


@pytest.mark.parametrize("chunk", [1, 5, 7, 8, 9, 16, 17, 95, 96])
def test_chunked_prefill_matches_the_reference(mini, backend, backend_module, device_of, relative_error, chunk):
    reference = load_file(mini / "reference.safetensors")
    prompt = tuple(reference["prompt"].tolist())
    checkpoint = checkpoints.open(mini / "mxfp4")
    runner = backend_module(backend).load(
        checkpoint, device=device_of(backend), dtype="float32", limits=Limits(3, 200, chunk)
    )
    assert relative_error(runner.logits(prompt), reference["logits"]) < 1e-4
    for start in range(0, len(prompt), chunk):
        piece = prompt[start : start + chunk]
        last = start + len(piece) == len(prompt)
        row = Row(1, start, piece, GREEDY if last else None, prompt if last else None)
        pending = runner.submit([row])
    ids = [pending.wait()[0].token]
    ids += [runner.submit([Row(1, len(prompt) + i, None, GREEDY)]).wait()[0].token for i in range(47)]
    certain = count_certain(reference)
    assert ids[:certain] == reference["greedy"][:certain].tolist()
