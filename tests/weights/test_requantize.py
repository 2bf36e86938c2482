"""Quantizing while loading: which weights change, which stay as they are, and the size of all."""

from __future__ import annotations

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.api import open_checkpoint
from mlx_gptoss.config import PRESETS
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.requantize import REST_ROLES, REST_SPECS, Requantized
from mlx_gptoss.weights.synthetic import Synthetic
from mlx_gptoss.weights.tensor import Dense


def arrays(weight) -> list[np.ndarray]:
    parts = [weight.values] if isinstance(weight, Dense) else [weight.codes, weight.scale, weight.bias, weight.outer]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("name", REST_SPECS)
@pytest.mark.parametrize("source", ["nano", "mxfp4", "nvfp4", "int4-autoround", "mlx-mxfp4-all", "synthetic"])
def test_the_rest_is_quantized_and_the_experts_are_not(mini, source, name):
    if source == "synthetic":
        checkpoint = Synthetic(PRESETS["tiny"], "mxfp4")
    else:
        checkpoint = open_checkpoint(None if source == "nano" else mini / source)
    quantized, size = Requantized(checkpoint, name), 0
    for param in checkpoint.params:
        before, after = checkpoint.read(param.name), quantized.read(param.name)
        size += sum(part.nbytes for part in arrays(after))
        if param.is_matrix and param.role in REST_ROLES:
            assert after.spec == REST_SPECS[name]
            error = codecs.dequantize(after) - codecs.dequantize(before)
            assert (
                np.abs(error).max() < (0.01 if name == "rest-8bit" else 0.2) * np.abs(codecs.dequantize(before)).max()
            )
        else:
            assert [part.tobytes() for part in arrays(after)] == [part.tobytes() for part in arrays(before)]
    if source != "int4-autoround":  # its zero points take less space in the file than the biases they become
        assert quantized.size_bytes == pytest.approx(size, rel=1e-3)  # input scales and the like belong to no weight


def test_load_with_quantize():
    prompt = range(3, 60)
    with mlx_gptoss.load() as exact, mlx_gptoss.load(quantize="rest-8bit") as quantized:
        assert quantized.format == "rest-8bit"
        assert quantized.plan.weights_bytes < 0.8 * exact.plan.weights_bytes
        a, b = exact.logits(prompt), quantized.logits(prompt)
    assert (a.argmax(axis=-1) == b.argmax(axis=-1)).mean() > 0.9


def test_unknown_names_are_refused():
    with pytest.raises(InvalidRequest, match="rest-8bit"):
        Requantized(open_checkpoint(None), "rest-2bit")
