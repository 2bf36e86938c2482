"""Load a checkpoint into a model on the device, one weight at a time, each as it is stored.

No weight is in memory twice: its bytes go from the mapped file into one MLX array, and the file's pages are released
before the next weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property

import mlx.core as mx
import numpy as np

from ...config import ModelConfig
from ...errors import CheckpointError
from ...machine import cores
from ...weights.adapters import Adapter
from ...weights.split import RankShard
from ...weights.tensor import (
    Array,
    Dense,
    Weight,
    Weights,
    same_storage,
)
from ..rope import yarn_frequencies
from . import host
from .adapters import LowRank
from .cpu.products import Products, Stored
from .cpu.storages import Heads
from .elementwise import Elementwise
from .fuse import concatenate, fuse, split_rows, storage_groups
from .host_step import HostBlock, Rotations, all_on_host
from .kernels.choose import PLAIN, Chooser, score_factor
from .kernels.experts import ExpertLayer
from .layers import (
    DenseMatrix,
    ExpertLinear,
    Linear,
    MappedRows,
    Matrix,
    QuantizedMatrix,
    fused,
    global_scale,
)
from .model import Attention, Block, GptOss, MixtureOfExperts, Rotary
from .ranks import Ranks
from .streams import CpuStreams

# Token-expert pairs from which sorting by expert is faster, because each expert is then read once: on a CPU, and for
# each expert of the layer on a GPU. With fewer for an expert, MLX reads it for every pair, sorted or not.
MIN_PAIRS_TO_SORT, MIN_PAIRS_PER_EXPERT = 64, 4
MIN_BYTES_TO_SPLIT = 4 << 20  # bytes of a matrix from which several streams are faster than one


def load_model(
    checkpoint: Weights,
    dtype: mx.Dtype,
    elementwise: Elementwise,
    max_scores: int | None = None,
    resident_vocab: int | None = None,
    *,
    upcast: bool = False,
    on_cpu: bool = False,
    ranks: Ranks | None = None,
    streams: CpuStreams | None = None,
    adapters: Sequence[Adapter] = (),
    global_scales: Callable[[], bool] = lambda: False,
    chooser: Chooser | None = None,
    products: Products | None = None,
) -> GptOss:
    """Load the whole model with activations of `dtype`. Peak memory: the checkpoint plus its largest weight.

    elementwise, max_scores: as in model.py. resident_vocab, upcast: as in Limits. on_cpu: split large matrices over
    one of the `streams` per core. ranks: the ranks that share the model, if the checkpoint is one rank's part of it.
    adapters: as of Backend.load. global_scales: whether MLX takes them (takes_global_scale). chooser: of custom
    kernels, for a model that is not shared. products: that a CPU computes with, if host.enabled."""
    config = checkpoint.config
    ranks = ranks or Ranks(RankShard.of(config, 0, 1), None)
    loader = _WeightLoader(
        checkpoint,
        dtype,
        elementwise,
        max_scores,
        ranks,
        upcast,
        on_cpu,
        streams or CpuStreams(),
        adapters,
        global_scales,
        products,
    )
    assert chooser is None or ranks.alone
    # The two largest weights come first, while there is memory for a weight and its copy.
    if resident_vocab is None:
        embed: Matrix | MappedRows = loader.matrix("embed.weight")
        lm_head, rest = loader.linear(["lm_head"], biased=False), None
    else:
        embed = MappedRows(checkpoint.read("embed.weight"), lambda weight: fuse([weight]))
        lm_head, rest = _split_lm_head(checkpoint.read("lm_head.weight"), resident_vocab, loader.on_device)
        checkpoint.release()
    frequencies = mx.array((1.0 / yarn_frequencies(config.yarn, config.head_dim)).astype(np.float32))
    rotary = Rotary(frequencies, score_factor(config))
    rotations = Rotations(yarn_frequencies(config.yarn, config.head_dim))
    blocks = tuple(
        _block(loader, config, layer, rotary, rotations, chooser) for layer in range(config.num_hidden_layers)
    )
    mask_heads = 1 if on_cpu else config.num_attention_heads
    norm = loader.vector("norm.weight")
    return GptOss(config, dtype, embed, blocks, norm, lm_head, rest, mask_heads, elementwise, loader.ranks)


def _split_lm_head(
    weight: Weight, resident: int, to_device: Callable[[Sequence[Weight]], Matrix]
) -> tuple[Linear, Callable[[], Linear] | None]:
    """The first rows of lm_head on the device, and a function that loads the others."""
    first = to_device([weight[0:resident]])
    size = weight.shape[0]
    if resident >= size:
        return Linear((first,)), None
    return Linear((first,)), lambda: Linear((to_device([weight[resident:size]]),))


def _block(
    loader: _WeightLoader,
    config: ModelConfig,
    layer: int,
    rotary: Rotary,
    rotations: Rotations,
    chooser: Chooser | None,
) -> Block:
    prefix = f"layers.{layer}"
    out = loader.linear([f"{prefix}.attention.o"])
    gate_up = loader.experts([f"{prefix}.experts.gate", f"{prefix}.experts.up"])
    down = loader.experts([f"{prefix}.experts.down"])
    wide = any(m.scales.dtype == mx.float32 for m in gate_up.matrices + down.matrices if isinstance(m, QuantizedMatrix))
    bias = loader.vectors([f"{prefix}.experts.{part}.bias" for part in ("gate", "up", "down")], wide=wide)
    kernels = PLAIN
    if chooser is not None:
        readable = ExpertLayer.of(gate_up, down, bias, config.swiglu_limit, config.swiglu_alpha)
        # A dense output projection adds to the residual itself.
        norm_apart = not all(isinstance(matrix, DenseMatrix) for matrix in out.matrices)
        kernels = chooser.layer(layer, None if loader.adapted else readable, norm_apart=norm_apart)
    attention = Attention(
        config,
        qkv=loader.linear([f"{prefix}.attention.{part}" for part in "qkv"]),
        out=out,
        sinks=loader.vector(f"{prefix}.attention.sinks"),
        rotary=rotary,
        ranks=loader.ranks,
        attend=loader.attend,
        max_scores=loader.max_scores,
        packed_by_row=not loader.on_cpu,
        kernels=kernels,
        qkv_adapters=loader.low_rank([f"{prefix}.attention.{part}" for part in "qkv"]),
        out_adapters=loader.low_rank([f"{prefix}.attention.o"]),
    )
    mlp = MixtureOfExperts(
        config,
        router=loader.linear([f"{prefix}.router"]),
        gate_up=gate_up,
        down=down,
        bias=bias,
        own=loader.ranks.shard.of_experts(config.experts[layer]),
        elementwise=loader.elementwise,
        ranks=loader.ranks,
        min_pairs_to_sort=loader.min_pairs_to_sort(config.experts[layer]),
        kernels=kernels,
        router_adapters=loader.low_rank([f"{prefix}.router"]),
        gate_up_adapters=loader.low_rank([f"{prefix}.experts.gate", f"{prefix}.experts.up"]),
        down_adapters=loader.low_rank([f"{prefix}.experts.down"]),
    )
    norms = (loader.vector(f"{prefix}.{norm}_norm.weight") for norm in ("attention", "mlp"))
    block = Block(config, next(norms), attention, next(norms), mlp)
    return block if loader.products is None else loader.host_block(block, loader.products, rotations)


class _WeightLoader:
    """Reads weights by their canonical names and copies them to the device."""

    def __init__(
        self,
        checkpoint: Weights,
        dtype: mx.Dtype,
        elementwise: Elementwise,
        max_scores: int | None,
        ranks: Ranks,
        upcast: bool,
        on_cpu: bool,
        streams: CpuStreams,
        adapters: Sequence[Adapter],
        global_scales: Callable[[], bool] = lambda: False,
        products: Products | None = None,
    ) -> None:
        self._adapters = adapters
        self._global_scales = global_scales
        self.elementwise = elementwise
        self.ranks = ranks
        self._upcast = upcast
        self._cpu_streams = streams
        self.on_cpu = on_cpu
        self.products = products
        self._dense_kind = host.dense_kind(on_cpu=on_cpu, dtype=dtype)
        self.attend = fused if products is None else host.attention_on(products.pool)
        self.max_scores = max_scores if products is None else None
        self._checkpoint = checkpoint
        self._dtype = dtype

    @property
    def adapted(self) -> bool:
        """Whether there are adapters."""
        return bool(self._adapters)

    def min_pairs_to_sort(self, experts: int) -> int:
        """As of MixtureOfExperts, for a layer with so many experts on all ranks."""
        if not self.on_cpu:
            return MIN_PAIRS_PER_EXPERT * experts
        # A rank always sorts: waiting for the router costs nothing here, computing other ranks' pairs does.
        return MIN_PAIRS_TO_SORT if self.ranks.alone else 1

    def vector(self, name: str) -> mx.array:
        """Norms and sinks, in the activation dtype."""
        return self.vectors([name])

    def vectors(self, names: Sequence[str], *, wide: bool = False) -> mx.array:
        """Several biases concatenated, in the activation dtype, or in float32 for products that are."""
        dtype = mx.float32 if wide else self._dtype
        array = concatenate([self._dense(name) for name in names], axis=-1).astype(dtype)
        mx.eval(array)
        return array

    def matrix(self, name: str) -> Matrix:
        return self.on_device([self._checkpoint.read(name)])

    def linear(self, names: Sequence[str], *, biased: bool = True) -> Linear:
        matrices, streams = self._split_matrices([f"{n}.weight" for n in names], upcast=self._upcast)
        if self._upcast:
            matrices = upcast_matrices(matrices, streams, self._dtype)
        return Linear(matrices, self.vectors([f"{n}.bias" for n in names]) if biased else None, streams)

    def experts(self, names: Sequence[str]) -> ExpertLinear:
        parts = self._split_matrices([f"{n}.weight" for n in names])
        return ExpertLinear(*parts) if self.products is None else host.HostExperts(*parts, self.products)

    def host_block(self, block: Block, products: Products, rotations: Rotations) -> Block:
        """The block that decodes in numpy, if its matrices are there."""
        attention, mlp = block.attention, block.mlp
        linear = (attention.qkv, attention.out, mlp.router, mlp.gate_up, mlp.down)
        if self.adapted or not self.ranks.alone or not all_on_host(*(m for part in linear for m in part.matrices)):
            return block
        config = block.config
        products.prepare_attention(Heads(config.num_attention_heads // config.num_key_value_heads, config.head_dim))
        return HostBlock(**vars(block), products=products, rotations=rotations)

    def low_rank(self, names: Sequence[str]) -> tuple[LowRank | None, ...]:
        """What each adapter adds to the fused matrix of these parameters."""
        return tuple(self._low_rank(adapter, names) for adapter in self._adapters)

    def _low_rank(self, adapter: Adapter, names: Sequence[str]) -> LowRank | None:
        factors = adapter.stacked(names)
        if factors is None:
            return None
        if self.products is not None:
            return LowRank(*(self._on_host([Dense(values)], upcast=True) for values in (factors.a, factors.b)))
        a, b = (mx.array(values).astype(self._dtype) for values in (factors.a, factors.b))
        mx.eval(a, b)
        return LowRank(self._dense_kind(a), self._dense_kind(b))

    def _split_matrices(
        self, names: Sequence[str], *, upcast: bool = False
    ) -> tuple[tuple[Matrix, ...], tuple[mx.Stream, ...]]:
        """The matrices and their streams. A large matrix is split by rows into one part per stream, unless `products`
        computes with it; upcast: those hold dense matrices in float32."""
        weights = [self._checkpoint.read(name) for name in names]
        size = sum(weight.nbytes for weight in weights)
        if self._by_products(weights):
            return tuple(self._on_host(group, upcast=upcast) for group in storage_groups(weights)), ()
        if not self.on_cpu or size < MIN_BYTES_TO_SPLIT or not same_storage(weights):
            return tuple(map(self.on_device, storage_groups(weights))), ()
        return tuple(map(self.on_device, split_rows(weights, len(self._streams)))), self._streams

    def _by_products(self, weights: Sequence[Weight]) -> bool:
        """Whether `products` multiplies by weights like these whole."""
        return self.products is not None and all(
            isinstance(w, Dense) or self.products.reads(Stored(w)) for w in weights
        )

    def _on_host(self, weights: Sequence[Weight], *, upcast: bool = False) -> host.HostMatrix:
        assert self.products is not None
        found = host.HostMatrix(Stored(self.products.copied(weights, upcast=upcast)), self.products)
        self.products.prepare(found.stored)
        self._checkpoint.release()
        return found

    @property
    def _streams(self) -> tuple[mx.Stream, ...]:
        return self._cpu_streams.first(cores())

    def _dense(self, name: str) -> Array:
        weight = self._checkpoint.read(name)
        if not isinstance(weight, Dense):
            raise CheckpointError(f"{name} is quantized; gpt-oss keeps it dense")
        return weight.values

    def on_device(self, weights: Sequence[Weight]) -> Matrix:
        """One matrix with the rows of all weights, in memory."""
        if self._by_products(weights):
            return self._on_host(weights)
        matrix = self._fuse(weights)
        mx.eval([array for array in vars(matrix).values() if isinstance(array, mx.array)])
        self._checkpoint.release()
        return matrix

    def _fuse(self, weights: Sequence[Weight]) -> DenseMatrix | QuantizedMatrix:
        """As fuse, as the activations' dtype and the device need it."""
        matrix = fuse(weights, self._dtype)
        if isinstance(matrix, DenseMatrix):
            return self._dense_kind(matrix.weight)
        scale = global_scale(matrix)
        scale = scale if scale is not None and self._takes_global_scale else None
        return replace(matrix, global_scale=scale, finish=self.elementwise.finish)

    @cached_property
    def _takes_global_scale(self) -> bool:
        return self._global_scales()


def upcast_matrices(matrices: Sequence[Matrix], streams: Sequence[mx.Stream], dtype: mx.Dtype) -> tuple[Matrix, ...]:
    """Dense matrices in `dtype`, each upcast on its own stream if there are any, while the next weights are read.
    Quantized matrices are unchanged."""
    found: list[Matrix] = []
    for i, matrix in enumerate(matrices):
        with mx.stream(streams[i]) if streams else nullcontext():
            found.append(
                replace(matrix, weight=matrix.weight.astype(dtype)) if isinstance(matrix, DenseMatrix) else matrix
            )
    dense = [matrix.weight for matrix in found if isinstance(matrix, DenseMatrix)]
    mx.async_eval(dense)  # type: ignore[no-untyped-call]
    return tuple(found)
