"""What a decoded token launches with the custom kernels, counted without a GPU."""

from __future__ import annotations

import pytest

import mlx_gptoss
from mlx_gptoss.api import NANO
from mlx_gptoss.backends.mlx.launches import decode_step, launches_of, launches_per_token
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints

LAYERS = 4
# Of a layer: two norms, rotation, attention, router, gate_up and down; products and cache are MLX's own operations.
KERNELS = {
    "qkv, out and router": 3,
    "rotation": 1,
    "keys and values written": 1,
    "attention": 1,
    "router's choice": 1,
    "experts": 2,
    "norms": 2,
}


def test_eleven_launches_a_layer():
    checkpoint = checkpoints.open(NANO)
    with_kernels = launches_per_token(checkpoint, custom_kernels=True)
    assert sum(KERNELS.values()) == 11
    assert with_kernels == 11 * LAYERS + 9  # embedding, the last norm, lm_head and the sampler
    assert with_kernels <= launches_per_token(checkpoint) - 3 * LAYERS


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_rows_and_8_bits_cost_no_more(tmp_path, kv_bits):
    """Quantized attention: the norm adds the output projection to the residual. An 8-bit cache writes three arrays in
    each of the two full layers, after one operation that makes them."""
    mlx_gptoss.convert(NANO, tmp_path / "model", to="mlx-4bit")
    checkpoint = checkpoints.open(tmp_path / "model")
    counts = [
        launches_of(
            decode_step(
                checkpoint, [Sampling(temperature=0)] * rows, unequal=True, kv_bits=kv_bits, custom_kernels=kernels
            )
        )
        for rows, kernels in ((1, True), (3, True), (3, False))
    ]
    assert counts[1] <= counts[0] + 1 and counts[1] < counts[2] - 4 * LAYERS
