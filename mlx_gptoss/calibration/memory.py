"""The memory of a calibration, from the sizes of the model and the text. Activations on disk are not counted."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ModelConfig
from ..errors import DoesNotFit
from ..machine import cores, system_available
from .network import QUERIES

CHUNK = 2048  # tokens at once
HEAD_ROWS = 4096  # rows of lm_head at once
MAX_WORKERS = 8
_PROGRAM = 2**27
_KEPT = 2**28  # of freed buffers (backends/mlx/matmul.py)


@dataclass(frozen=True)
class Memory:
    """workers: the number of experts at a time, at most. experts_bytes: for all of them together. total_bytes: upper
    bound of everything."""

    workers: int
    experts_bytes: int
    total_bytes: int


def plan_memory(config: ModelConfig, tokens: int, window: int, measuring: int = 0, on_device: bool = False) -> Memory:
    """How many experts are quantized at a time, and in how much memory: that of a layer in float32 and of the layer's
    input in both models, or less where less is available.

    window: tokens of the longest window. measuring: bytes that are needed before, to measure what matrices cost.
    on_device: the factors of products are copied to a device, which may have the same memory. Raises DoesNotFit if not
    even one expert at a time fits.
    """
    layer = 4 * 3 * config.num_local_experts * config.hidden_size * config.intermediate_size
    usual = layer + 2 * 4 * tokens * config.hidden_size
    rest, one = max(measuring, _rest_bytes(config, tokens, window)), expert_bytes(config, tokens)
    program = _PROGRAM + (_device_bytes(config) if on_device else 0)
    available = system_available() - program
    if max(rest, one) > available:
        raise DoesNotFit(
            f"calibrating needs {(max(rest, one) + program) / 1e9:.1f} GB of memory, and "
            f"{(available + program) / 1e9:.1f} GB are available: close other programs, give a shorter text, or "
            "convert without --calibrate"
        )
    workers = min(MAX_WORKERS, cores())
    experts = max(one, min(usual, available, workers * one))
    return Memory(workers, experts, program + max(rest, experts))


def expert_bytes(config: ModelConfig, tokens: int) -> int:
    """Memory for one expert that gets these tokens: its matrices in both models and in the making, the moments of its
    inputs in float64, what is computed in chunks, and for every token the input and the output of `down`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    width = max(hidden, inner)
    matrices = 14 * 4 * hidden * inner + 8 * 8 * width**2
    return matrices + 10 * 4 * min(CHUNK, tokens) * width + 2 * 4 * tokens * (inner + hidden)


def _rest_bytes(config: ModelConfig, tokens: int, window: int) -> int:
    """Memory for attention or lm_head, whichever needs more, and for the routing of all tokens."""
    width = max(config.hidden_size, config.q_size)
    matrices = 14 * 4 * config.hidden_size * config.q_size + 8 * 8 * width**2
    scores = 3 * 4 * config.num_attention_heads * QUERIES * window
    inputs = 12 * 4 * max(window, min(CHUNK, tokens)) * config.q_size
    head = 14 * 4 * min(HEAD_ROWS, config.vocab_size) * config.hidden_size
    return max(matrices + scores + inputs, head) + 2 * 8 * tokens * config.num_experts_per_tok


def _device_bytes(config: ModelConfig) -> int:
    """Memory for the factors and the result of a product, and for freed buffers that the device's library keeps."""
    width = max(config.hidden_size, config.q_size, config.intermediate_size)
    return 3 * 4 * width * max(width, CHUNK, HEAD_ROWS) + _KEPT
