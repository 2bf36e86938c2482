"""How much one model's predictions differ from another's, from their logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def log_softmax(logits: NDArray[np.floating[Any]]) -> Doubles:
    """Natural log-probabilities over the last axis, in float64. Logits must be finite."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def kl_divergence(log_p: Doubles, log_q: Doubles) -> Doubles:
    """KL(P || Q) in nats over the last axis, from natural log-probabilities. Clipped at 0, because rounding may make it
    negative."""
    divergence: Doubles = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return np.maximum(divergence, 0.0)
