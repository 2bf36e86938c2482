"""From a checkpoint to a model on the device: each weight is placed as it is stored, one at a time.

Nothing is held twice: a weight's bytes go from the mapped file to the device, and the file's pages are dropped before
the next weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...config import ModelConfig
from ...errors import CheckpointError
from ...weights.codecs import contiguous_rows
from ...weights.split import RankShard
from ...weights.tensor import Array, Dense, Quantized, Weight, Weights
from ..rope import yarn_concentration, yarn_frequencies
from .layers import DenseMatrix, ExpertLinear, Experts, Linear, Matrix, Operations, QuantizedMatrix
from .model import Attention, Block, GptOss, MixtureOfExperts, Norm, Rotary
from .ranks import Ranks


def load_model(
    checkpoint: Weights, dtype: torch.dtype, device: torch.device, ops: Operations, ranks: Ranks | None = None
) -> GptOss:
    """The whole model with activations of `dtype`. Peak memory: the checkpoint plus its largest weight once.
    ranks: those that share the model, if the checkpoint is a part of it."""
    place = _Placer(checkpoint, dtype, device, ops, ranks or Ranks(RankShard.of(checkpoint.config, 0, 1)))
    config = checkpoint.config
    # The two largest come first, while there is room to read one beside its copy.
    embed = place.matrix("embed.weight")
    lm_head = Linear((place.matrix("lm_head.weight"),), None, ops)
    frequencies = torch.from_numpy(yarn_frequencies(config.yarn, config.head_dim)).to(device)
    rotary = Rotary(frequencies, config.head_dim**-0.5 * yarn_concentration(config.yarn) ** 2)
    blocks = tuple(_block(place, config, layer, rotary.score_scale) for layer in range(config.num_hidden_layers))
    return GptOss(config, dtype, embed, rotary, blocks, place.norm("norm.weight", config), lm_head, place.ranks)


def _block(place: _Placer, config: ModelConfig, layer: int, scale: float) -> Block:
    at = f"layers.{layer}"
    attention = Attention(
        config,
        place.ops,
        place.ranks,
        qkv=place.linear([f"{at}.attention.{part}" for part in "qkv"]),
        out=place.linear([f"{at}.attention.o"], biased=place.ranks.first),
        sinks=place.vector(f"{at}.attention.sinks").float(),
        scale=scale,
    )
    experts = Experts(
        gate_up=place.experts([f"{at}.experts.gate", f"{at}.experts.up"]),
        down=place.experts([f"{at}.experts.down"]),
        active=config.num_experts_per_tok,
        limit=config.swiglu_limit,
        alpha=config.swiglu_alpha,
        held=place.ranks.shard.experts,
    )
    mlp = MixtureOfExperts(place.ops, place.ranks, place.linear([f"{at}.router"]), experts)
    attention_norm = place.norm(f"{at}.attention_norm.weight", config)
    return Block(attention_norm, attention, place.norm(f"{at}.mlp_norm.weight", config), mlp)


class _Placer:
    """Reads weights by canonical name and puts them on the device."""

    def __init__(
        self, checkpoint: Weights, dtype: torch.dtype, device: torch.device, ops: Operations, ranks: Ranks
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self.ops = ops
        self.ranks = ranks

    def vector(self, name: str) -> Tensor:
        """Norms, sinks and biases, in the activation dtype."""
        return self._vectors([name])

    def norm(self, name: str, config: ModelConfig) -> Norm:
        return Norm(self.vector(name), config.rms_norm_eps)

    def matrix(self, name: str) -> Matrix:
        return self._matrices([name])[0]

    def linear(self, names: Sequence[str], *, biased: bool = True) -> Linear:
        bias = self._vectors([f"{n}.bias" for n in names]) if biased else None
        return Linear(self._matrices([f"{n}.weight" for n in names]), bias, self.ops)

    def experts(self, names: Sequence[str]) -> ExpertLinear:
        bias = self._vectors([f"{n}.bias" for n in names])
        return ExpertLinear(self._matrices([f"{n}.weight" for n in names]), bias)

    def _vectors(self, names: Sequence[str]) -> Tensor:
        return _tensor([self._dense(name) for name in names], -1, self._device).to(self._dtype)

    def _dense(self, name: str) -> Array:
        weight = self._checkpoint.read(name)
        if not isinstance(weight, Dense):
            raise CheckpointError(f"{name} is quantized; gpt-oss keeps it dense")
        return weight.values

    def _matrices(self, names: Sequence[str]) -> tuple[Matrix, ...]:
        weights = [self._checkpoint.read(name) for name in names]
        groups = [weights] if _same_storage(weights) else [[weight] for weight in weights]
        matrices = tuple(fuse(group, self._device) for group in groups)
        self._checkpoint.release()
        return matrices


def fuse(weights: Sequence[Weight], device: torch.device) -> Matrix:
    """One matrix of all rows, in order. The weights are stored alike, so joining their codes is exact."""
    first = weights[0]
    if isinstance(first, Dense):
        return DenseMatrix(_tensor([w.values for w in weights if isinstance(w, Dense)], -2, device))
    parts = [w for w in weights if isinstance(w, Quantized)]
    return QuantizedMatrix(
        first.spec,
        codes=_tensor([w.codes for w in parts], -2, device),
        scale=None if first.scale is None else _tensor([w.scale for w in parts if w.scale is not None], -2, device),
        bias=None if first.bias is None else _tensor([w.bias for w in parts if w.bias is not None], -2, device),
        outer=_outer(parts, device),
    )


def _same_storage(weights: Sequence[Weight]) -> bool:
    """Whether one product can run over all of them side by side."""

    def storage(weight: Weight) -> object:
        if isinstance(weight, Dense):
            return weight.values.dtype
        return weight.spec, None if weight.scale is None else weight.scale.dtype, weight.bias is None

    return len({storage(weight) for weight in weights}) == 1


def _outer(parts: Sequence[Quantized], device: torch.device) -> Tensor | None:
    """The factors on the output rows, float32: [] when one serves all rows, else [N, 1] or [E, N, 1]."""
    if all(part.outer is None for part in parts):
        return None
    factors = [np.float32(1.0) if part.outer is None else np.asarray(part.outer, dtype=np.float32) for part in parts]
    if all(np.ndim(f) == 0 for f in factors) and len({float(f) for f in factors}) == 1:
        return torch.tensor(float(factors[0]), device=device)
    rows = [np.broadcast_to(f, (*p.codes.shape[:-1], 1)) for f, p in zip(factors, parts, strict=True)]
    return _tensor(rows, -2, device)


def _tensor(arrays: Sequence[Array], axis: int, device: torch.device) -> Tensor:
    """Mapped numpy arrays, one behind the other, as one tensor of its own memory (bfloat16 by its bits, which torch
    does not take from numpy)."""
    values = np.ascontiguousarray(np.concatenate([contiguous_rows(array) for array in arrays], axis=axis))
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(values).to(device)
