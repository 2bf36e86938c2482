"""On a CPU, large matrices are shared between streams, one for each core: the numbers stay the reference's."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from safetensors.numpy import load_file

import mlx_gptoss
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.tensor import FP8_ROW, NVFP4, Dense, Quantized

load = import_module("mlx_gptoss.backends.mlx.load")  # the package's `load` is a function
FIXTURES = {"mxfp4": "reference", "mxfp4-original": "reference", "gguf/model-q8_0.gguf": "gguf-q8_0.reference"}
FIXTURES |= {name: f"{name}.reference" for name in ("nvfp4", "fp8-dynamic", "int4-autoround", "mlx-4bit")}


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("count", [2, 3])
def test_shared_matrices_compute_the_same(mini, monkeypatch, relative_error, name, count):
    monkeypatch.setattr(load, "MIN_BYTES_TO_SPLIT", 0)
    monkeypatch.setattr(load, "cores", lambda: count)
    reference = load_file(mini / f"{FIXTURES[name]}.safetensors")
    with mlx_gptoss.load(mini / name, backend="mlx", device="cpu") as model:
        assert relative_error(model.logits(reference["prompt"].tolist()), reference["logits"]) < 1e-4
        done = model.complete(reference["prompt"].tolist(), max_tokens=8, sampling=Sampling(temperature=0))
    close = np.flatnonzero(reference["margin"] < 1e-3)
    sure = min(8, len(done.ids), int(close[0]) if close.size else 8)
    assert list(done.ids[:sure]) == reference["greedy"][:sure].tolist()


def test_parts_are_all_rows_in_order():
    """For fused weights with one factor per row, per expert, or for all rows."""
    rng = np.random.default_rng(0)
    row = Quantized(FP8_ROW, rng.integers(0, 120, (7, 16), dtype=np.uint8), outer=rng.random((7, 1), np.float32))
    scale = rng.integers(1, 100, (2, 5, 2), dtype=np.uint8)
    bank = Quantized(
        NVFP4, rng.integers(0, 256, (2, 5, 16), dtype=np.uint8), scale, outer=rng.random((2, 1, 1), np.float32)
    )
    for weights in ([row], [row, row], [bank], [bank, bank, bank], [Dense(rng.random((9, 4), np.float32))]):
        whole = np.concatenate([codecs.dequantize(weight) for weight in weights], axis=-2)
        for count in (1, 2, 4):
            parts = load.split_rows(weights, count)
            assert len(parts) == count
            pieces = [codecs.dequantize(weight) for part in parts for weight in part]
            assert np.array_equal(np.concatenate(pieces, axis=-2), whole)
