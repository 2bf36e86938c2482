"""Load a checkpoint into a model on the device, one weight at a time, each with the codes that are stored.

No weight is in memory twice: its bytes go from the mapped file to the device, where the kernels' form of it takes their
place (matrices.py), and the file's pages are released before the next weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...config import ModelConfig
from ...errors import CheckpointError
from ...weights.adapters import Adapter
from ...weights.codecs import contiguous_rows, widen
from ...weights.split import RankShard
from ...weights.tensor import Array, Dense, Quantized, Weight, Weights, same_storage
from ..base import run_as
from ..rope import yarn_frequencies
from .adapters import LowRank
from .layers import ExpertLinear, Experts, Linear, Operations
from .matrices import DenseMatrix, Matrix, QuantizedMatrix
from .model import Attention, Block, GptOss, MixtureOfExperts, Norm, Rotary
from .ranks import Ranks


def load_model(
    checkpoint: Weights,
    dtype: torch.dtype,
    device: torch.device,
    ops: Operations,
    ranks: Ranks | None = None,
    adapters: Sequence[Adapter] = (),
) -> GptOss:
    """Load the whole model with activations of `dtype`. Peak memory: the checkpoint plus its largest weight.

    ranks: the ranks that share the model, if the checkpoint is one rank's part of it. adapters: as of Backend.load."""
    ranks = ranks or Ranks(RankShard.of(checkpoint.config, 0, 1))
    loader = _WeightLoader(checkpoint, dtype, device, ops, ranks, adapters)
    config = checkpoint.config
    # The two largest weights come first, while there is memory for a weight and its copy.
    embed = loader.matrix("embed.weight")
    lm_head = Linear((loader.matrix("lm_head.weight"),), None, ops, wide=True)
    frequencies = torch.from_numpy(yarn_frequencies(config.yarn, config.head_dim)).to(device)
    rotary = Rotary(frequencies, config.head_dim**-0.5 * config.yarn.concentration**2)
    blocks = tuple(_block(loader, config, layer, rotary.score_scale) for layer in range(config.num_hidden_layers))
    return GptOss(config, dtype, embed, rotary, blocks, loader.norm("norm.weight", config), lm_head, loader.ranks)


def _block(loader: _WeightLoader, config: ModelConfig, layer: int, scale: float) -> Block:
    prefix = f"layers.{layer}"
    attention = Attention(
        config,
        loader.ops,
        loader.ranks,
        qkv=loader.linear([f"{prefix}.attention.{part}" for part in "qkv"]),
        out=loader.linear([f"{prefix}.attention.o"], biased=loader.ranks.first),
        sinks=loader.vector(f"{prefix}.attention.sinks").float(),
        scale=scale,
        qkv_adapters=loader.low_rank([f"{prefix}.attention.{part}" for part in "qkv"]),
        out_adapters=loader.low_rank([f"{prefix}.attention.o"]),
    )
    experts = Experts(
        gate_up=loader.experts([f"{prefix}.experts.gate", f"{prefix}.experts.up"]),
        down=loader.experts([f"{prefix}.experts.down"]),
        active=config.num_experts_per_tok,
        limit=config.swiglu_limit,
        alpha=config.swiglu_alpha,
        local_experts=loader.ranks.shard.of_experts(config.experts[layer]),
    )
    mlp = MixtureOfExperts(
        loader.ops,
        loader.ranks,
        loader.linear([f"{prefix}.router"], wide=True),
        experts,
        router_adapters=loader.low_rank([f"{prefix}.router"]),
        gate_up_adapters=loader.low_rank([f"{prefix}.experts.gate", f"{prefix}.experts.up"]),
        down_adapters=loader.low_rank([f"{prefix}.experts.down"]),
    )
    attention_norm = loader.norm(f"{prefix}.attention_norm.weight", config)
    return Block(attention_norm, attention, loader.norm(f"{prefix}.mlp_norm.weight", config), mlp)


class _WeightLoader:
    """Reads weights by their canonical names and copies them to the device."""

    def __init__(
        self,
        checkpoint: Weights,
        dtype: torch.dtype,
        device: torch.device,
        ops: Operations,
        ranks: Ranks,
        adapters: Sequence[Adapter],
    ) -> None:
        self._adapters = adapters
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

    def linear(self, names: Sequence[str], *, biased: bool = True, wide: bool = False) -> Linear:
        bias = self._vectors([f"{n}.bias" for n in names]) if biased else None
        return Linear(self._matrices([f"{n}.weight" for n in names]), bias, self.ops, wide)

    def experts(self, names: Sequence[str]) -> ExpertLinear:
        bias = self._vectors([f"{n}.bias" for n in names])
        return ExpertLinear(self._matrices([f"{n}.weight" for n in names]), bias)

    def low_rank(self, names: Sequence[str]) -> tuple[LowRank | None, ...]:
        """What each adapter adds to the fused matrix of these parameters."""
        return tuple(self._low_rank(adapter, names) for adapter in self._adapters)

    def _low_rank(self, adapter: Adapter, names: Sequence[str]) -> LowRank | None:
        factors = adapter.stacked(names)
        if factors is None:
            return None
        return LowRank(*(_tensor([values], -1, self._device).to(self._dtype) for values in (factors.a, factors.b)))

    def _vectors(self, names: Sequence[str]) -> Tensor:
        return _tensor([self._dense(name) for name in names], -1, self._device).to(self._dtype)

    def _dense(self, name: str) -> Array:
        weight = self._checkpoint.read(name)
        if not isinstance(weight, Dense):
            raise CheckpointError(f"{name} is quantized; gpt-oss keeps it dense")
        return weight.values

    def _matrices(self, names: Sequence[str]) -> tuple[Matrix, ...]:
        weights = [_runnable(self._checkpoint.read(name)) for name in names]
        groups = [weights] if same_storage(weights) else [[weight] for weight in weights]
        matrices = tuple(self.ops.stored(fuse(group, self._device)) for group in groups)
        self._checkpoint.release()
        return matrices


def _runnable(weight: Weight) -> Weight:
    """The weight in a storage that the kernels read."""
    return weight if isinstance(weight, Dense) else widen(weight, run_as("cuda", weight.spec))


def fuse(weights: Sequence[Weight], device: torch.device) -> Matrix:
    """One matrix with the rows of all weights, in order. It is exact, because all are stored the same way and only
    their codes are concatenated."""
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


def _outer(parts: Sequence[Quantized], device: torch.device) -> Tensor | None:
    """The factors of the output rows, float32: [] if all rows have the same, else [N, 1] or [E, N, 1]."""
    if all(part.outer is None for part in parts):
        return None
    factors = [np.float32(1.0) if part.outer is None else np.asarray(part.outer, dtype=np.float32) for part in parts]
    if all(np.ndim(f) == 0 for f in factors) and len({float(f) for f in factors}) == 1:
        return torch.tensor(float(factors[0]), device=device)
    rows = [np.broadcast_to(f, (*p.codes.shape[:-1], 1)) for f, p in zip(factors, parts, strict=True)]
    return _tensor(rows, -2, device)


def _tensor(arrays: Sequence[Array], axis: int, device: torch.device) -> Tensor:
    """Copy mapped numpy arrays into one tensor, concatenated along `axis`. Copies bfloat16 by its bits, because torch
    does not take it from numpy."""
    values = np.ascontiguousarray(np.concatenate([contiguous_rows(array) for array in arrays], axis=axis))
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(values).to(device)
