"""The Operations of layers.py in Triton, with which a GPU computes a prefill. Decoding has its own path, decode.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ....config import ModelConfig
from ....errors import CheckpointError
from ..adapters import ExpertAdapter
from ..layers import Experts, Rotation
from ..matrices import Matrix, QuantizedMatrix, pack
from ..plain import TorchOperations
from ..quantized_kv import KeysOrValues, Packed
from . import attention, linear, moe, qkv, quantized_kv, routing

_log: logging.Logger = logging.getLogger(__name__)
SPLIT_QUERIES, SPLIT_KEYS = 64, 4096  # up to so many queries over more than so many keys, keys are split among programs


class Fused(TorchOperations):
    """Triton for every operation but `single`, which only prompts of one token need: it is TorchOperations's."""

    def __init__(self) -> None:
        super().__init__(threads=1)
        self._said = False

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raise CheckpointError for a model that the kernels do not support. They support every gpt-oss."""
        A = config.num_experts_per_tok
        for matrix, size in (("attention.q", config.hidden_size), ("experts.down", config.intermediate_size)):
            if size % 32:
                raise CheckpointError(
                    f"layers.0.{matrix}.weight has rows of {size} columns, and the CUDA kernels read multiples of 32; "
                    "use --device cpu"
                )
        if config.head_dim != 64 or A & (A - 1) or config.num_attention_heads % config.num_key_value_heads:
            raise CheckpointError(
                "the CUDA kernels need heads of 64 dimensions and a power of two of experts per token, and this model "
                f"has {config.head_dim} and {A}; use --device cpu"
            )

    def stored(self, matrix: Matrix) -> Matrix:
        """The matrix as the kernels read it. Logs once if scales are so large that weights are scaled in two steps."""
        if not isinstance(matrix, QuantizedMatrix):
            return matrix
        packed, scale = pack(matrix), matrix.scale
        foldable = matrix.spec.scale == "e8m0" or (scale is not None and scale.dtype == torch.bfloat16)
        if matrix.spec.bits == 4 and foldable and not packed.small_scales and not self._said:
            self._said = True
            _log.warning("some scales of this checkpoint are large; its 4-bit weights are decoded in two steps, slower")
        return packed

    def product(self, x: Tensor, matrix: Matrix, *, wide: bool = False) -> Tensor:
        """x [T, D] @ matrix [N, D]^T -> [T, N] of x's dtype, or float32 if `wide`"""
        return linear.product(x, matrix, wide=wide)

    def rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x [1, L, heads * 64], rotated -> [1, heads, L, 64], a view of [L, heads, 64]"""
        return qkv.rope(x[0], rotation.cos[0, 0], rotation.sin[0, 0]).transpose(0, 1)[None]

    def pack(self, x: Tensor) -> Packed:
        """Keys or values [B, KV, L, 64] in 8 bits"""
        return quantized_kv.pack(x)

    def attend_causal(self, q: Tensor, keys: KeysOrValues, values: KeysOrValues, sinks: Tensor, scale: float) -> Tensor:
        """q [1, H, L, 64] over keys and values [1, KV, C, 64] -> [1, L, H * 64].

        A short message after a long context has too few queries to fill a GPU. Its queries are computed as rows of a
        decoding step, which splits the keys among programs. For other prompts, keys and values in 8 bits are decoded
        first: once, instead of for each block of queries.
        """
        L, C = q.shape[2], keys.shape[2]
        if L <= SPLIT_QUERIES and C > SPLIT_KEYS:
            return _attend_split(q, keys, values, sinks, scale)
        if isinstance(keys, Packed) and isinstance(values, Packed):
            keys, values = (quantized_kv.dequantize(part, q.dtype) for part in (keys, values))
        assert isinstance(keys, Tensor) and isinstance(values, Tensor)
        return _attend(q, keys, values, sinks, scale, window=None, first=0)

    def attend_sliding(self, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, scale: float, past: int) -> Tensor:
        """q [1, H, L, 64] over keys and values [1, KV, W + L, 64], in a window of W -> [1, L, H * 64]. The first
        W - past keys do not exist."""
        W = keys.shape[2] - q.shape[2]
        return _attend(q, keys, values, sinks, scale, window=W, first=W - past)

    def mixture(self, x: Tensor, scores: Tensor, experts: Experts, adapters: Sequence[ExpertAdapter] = ()) -> Tensor:
        """x [T, D] through each token's best experts by scores, float32 [T, E] -> [T, D], as a sum over the experts
        that this rank has."""
        (T, D), A = x.shape, experts.active
        I = experts.down.matrices[0].shape[-1]
        hidden, parts, out = x.new_empty((T * A, I)), x.new_empty((T * A, D)), x.new_empty((T, D))
        groups = routing.sort_many_pairs(scores, A)
        if len(experts.local_experts) < scores.shape[1]:
            parts.zero_()  # the other ranks' experts add nothing
            groups = groups.of_experts(experts.local_experts)
        moe.forward_grouped(None, x, groups, experts, hidden, parts, out, adapters=adapters)
        return out


def _attend_split(q: Tensor, keys: KeysOrValues, values: KeysOrValues, sinks: Tensor, scale: float) -> Tensor:
    """Causal attention with every query as a row of a decoding step over the same slot -> [1, L, H * 64]"""
    (_, H, L, dim), (_, KV, C, _) = q.shape, keys.shape
    positions = torch.arange(C - L, C, dtype=torch.int32, device=q.device)
    out = q.new_empty((L, H * dim))
    scratch = attention.decode_scratch(L, H, KV, attention.entries(keys), q.dtype, q.device)
    rows = q[0].transpose(0, 1).contiguous()
    slots = torch.zeros_like(positions)  # keys and values are one slot's
    attention.decode_attention(rows, keys, values, slots, positions, sinks, scale, out, scratch, window=None)
    return out[None]


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, scale: float, *, window: int | None, first: int
) -> Tensor:
    """`attention.prefill_attention` of a batch of one -> [1, L, H * 64]"""
    _, H, L, dim = q.shape
    out = q.new_empty((L, H, dim))
    attention.prefill_attention(q[0].transpose(0, 1), keys[0], values[0], sinks, scale, out, window=window, first=first)
    return out.view(1, L, H * dim)
