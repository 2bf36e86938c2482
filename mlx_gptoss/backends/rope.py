"""Rotary position embedding with YaRN, computed once in numpy for every backend.

Peng et al. 2023, "YaRN", section 3.2 ("NTK-by-parts") and 3.4 (concentration), as in openai/gpt-oss
gpt_oss/torch/model.py: RotaryEmbedding. The correction range stays fractional unless the config says `truncate`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..config import Yarn


def yarn_frequencies(yarn: Yarn, head_dim: int) -> NDArray[np.float64]:
    """Radians per position of each rotated pair, float64 [head_dim / 2]. Pairs are (i, i + head_dim / 2)."""
    base = yarn.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if yarn.factor == 1.0:
        return base
    low, high = _correction_range(yarn, head_dim)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return np.asarray(base / yarn.factor * ramp + base * (1.0 - ramp))


def _correction_range(yarn: Yarn, head_dim: int) -> tuple[float, float]:
    """The pairs between which frequencies go from kept (they turn beta_fast times within the original context)
    to divided by `factor` (beta_slow times)."""

    def pair(turns: float) -> float:
        return head_dim / 2 * math.log(yarn.original_context / (turns * 2 * math.pi)) / math.log(yarn.theta)

    low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    return low, high if high > low else low + 0.001
