"""Keys and values in 8 bits: what --kv-bits 8 keeps of full-attention layers, with the meaning of mlx/quantized_kv.py.

Legend: K kv heads, C positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOP = 255  # the largest code
LEAST_SCALE = 1e-7


@dataclass(frozen=True)
class Packed:
    """Keys or values in 8 bits, with a scale and a bias per vector of 64: codes uint8 [..., K, C, 64], and those two
    float32 [..., K, C, 2], so that a kernel reads both at once. A value is code * scale + bias. 72 bytes a vector
    instead of 128 in bfloat16."""

    codes: Tensor
    scale_bias: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.codes.shape

    def __getitem__(self, index: Any) -> Packed:
        """Some of the vectors, by an index of all axes but the last."""
        return Packed(self.codes[index], self.scale_bias[index])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """All values, [..., K, C, 64]"""
        scale, bias = self.scale_bias[..., :1], self.scale_bias[..., 1:]
        return (self.codes * scale).add_(bias).to(dtype)


KeysOrValues = Tensor | Packed  # keys or values: as they are computed, or in 8 bits


def as_computed(kv: KeysOrValues, dtype: torch.dtype) -> Tensor:
    """Keys or values [..., K, C, 64] as they are, or decoded from 8 bits."""
    return kv.dequantized(dtype) if isinstance(kv, Packed) else kv


def pack(x: Tensor) -> Packed:
    """x [..., 64] quantized as in Packed, by MLX's recipe: the end of larger magnitude is made a multiple of the scale,
    so that zero is exact."""
    x = x.float()
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    low_is_larger = low.abs() > high.abs()
    scale = ((high - low) / TOP).clamp(min=LEAST_SCALE)
    scale = torch.where(low_is_larger, scale, -scale)
    edge = torch.where(low_is_larger, low, high)
    steps = (edge / scale).round()
    scale = torch.where(steps != 0, edge / steps, scale)
    bias = torch.where(steps != 0, edge, 0)
    codes = ((x - bias) / scale).round().clamp(0, TOP).to(torch.uint8)
    return Packed(codes, torch.cat([scale, bias], dim=-1))
