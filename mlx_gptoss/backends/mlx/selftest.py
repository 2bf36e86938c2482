"""What measure/selftest.py calls: the functions of model.py, cache.py and sample.py, with numpy arrays in and out.

Nothing is computed here in another way than the model does: weights go through load.py, and attention and the experts
are the model's own objects, with projections whose output is given.

Legend: T tokens, D in, N out, E experts, I intermediate, B rows, L tokens a row, P past tokens, H query heads, K KV
heads, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ...config import ModelConfig
from ...sampling import Sampling
from ...weights.split import RankShard
from ...weights.tensor import (
    AFFINE,
    AFFINE8_G32,
    AFFINE_BITS,
    FP8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    Dense,
    NamedWeights,
    Spec,
    Weight,
)
from ..rope import yarn_frequencies
from . import DTYPES, dtype_name, host, max_scores, pick_device
from .cache import FullCache, RingCache, Span
from .command_buffers import BufferLimits, current_setting, describe, layers_for, limits_in_force
from .cpu.products import Products
from .elementwise import UNCOMPILED, compiled
from .kernels.selftest import checked_cases
from .layers import Linear, fused
from .load import MIN_PAIRS_TO_SORT, _WeightLoader
from .model import Attention, MixtureOfExperts, Rotary
from .ranks import Ranks
from .sample import SamplerState, sample_tokens
from .streams import CpuStreams, check_process

# Groups of 128 do not divide rows of 2880.
SPECS = (*(AFFINE[bits, 64] for bits in AFFINE_BITS), AFFINE[4, 32], AFFINE8_G32, MXFP4, NVFP4, MXFP8, FP8_ROW, None)

Floats = NDArray[np.float32]
NEVER = 1 << 30


class Given(Linear):
    """A layer whose output is given, as its bias."""

    def __call__(self, x: mx.array) -> mx.array:
        assert self.bias is not None
        return self.bias


class Identity(Linear):
    """A layer that returns its input."""

    def plus(self, base: mx.array | None, x: mx.array) -> mx.array:
        return x if base is None else x + base


class Kernels:
    """The kernels of this backend on one device.

    dtype: of the activations. specs: what matrices may be stored as; None is bfloat16. ways: through the experts, each
    with the most rows that it is given; None is any number. counts_memory: whether peak_memory() sees what a step
    allocates. has_custom_kernels: whether load() checks some here.
    """

    specs: tuple[Spec | None, ...] = SPECS
    masks: tuple[str, ...] = ("causal", "bool")  # of fused_attention
    counts_memory = True

    def __init__(self, config: ModelConfig, device: str | None, dtype: str | None) -> None:
        check_process()
        self.config = config
        self.dtype = dtype_name(device, dtype)
        where = pick_device(device)
        self.on_gpu = bool(where.type == mx.gpu)
        # On a CPU unsorted pairs are decoded one by one, and the model sorts so many.
        most = None if self.on_gpu else (MIN_PAIRS_TO_SORT - 1) // config.num_experts_per_tok
        self.ways: dict[str, int | None] = {"unsorted": most, "sorted": None}
        self._dtype = DTYPES[self.dtype]
        self.has_custom_kernels = self.on_gpu and mx.metal.is_available()
        self._streams = CpuStreams()
        self._device = where
        self._where = where if self.on_gpu else self._streams.make_default()
        self._products = Products() if host.enabled(on_cpu=not self.on_gpu, dtype=self._dtype) else None
        self._elementwise = compiled() if self.on_gpu else UNCOMPILED
        self._max_scores = max_scores(gpu=self.on_gpu)
        self._ranks = Ranks(RankShard.of(config, 0, 1), None)
        self._rotary = Rotary(
            mx.array((1.0 / yarn_frequencies(config.yarn, config.head_dim)).astype(np.float32)),
            config.head_dim**-0.5 * config.yarn.concentration**2,
        )

    def facts(self) -> dict[str, Any]:
        """What MLX says of the device, and on a Mac's GPU the limits on command buffers and who set them."""
        found = {"metal": mx.metal.is_available(), "device": str(self._device), **mx.device_info(self._device)}
        if not (self.on_gpu and mx.metal.is_available()):
            return found
        return found | {"command_buffers": describe(current_setting(), self._buffer_limits())}

    def linear(self, weight: Weight) -> Callable[[Floats], Floats]:
        """The product with a stored matrix [N, D]: x [T, D] -> [T, N]"""
        layer = self._loader({"matrix.weight": weight}).linear(["matrix"], biased=False)
        return lambda x: self._run(lambda: layer(self._array(x)))

    def experts(self, gate: Weight, up: Weight, down: Weight, bias: Floats) -> Callable[[Floats, Floats, str], Floats]:
        """A layer's experts; bias [E, 2 I + D]. The function takes x [T, D], the router's scores [T, E] and one of
        `ways`, and returns [T, D]."""
        loader = self._loader({"gate.weight": gate, "up.weight": up, "down.weight": down, "bias": Dense(bias)})
        gate_up, down_ = loader.experts(["gate", "up"]), loader.experts(["down"])
        vectors = loader.vector("bias")

        def run(x: Floats, scores: Floats, way: str) -> Floats:
            layer = MixtureOfExperts(
                self.config,
                Given((), self._array(scores)),
                gate_up,
                down_,
                vectors,
                range(scores.shape[1]),
                self._elementwise,
                self._ranks,
                min_pairs_to_sort=1 if way == "sorted" else NEVER,
            )
            span = Span.of(self.config, [0], [0], len(x))
            tokens = self._array(x)[None]
            return self._run(lambda: layer(tokens, mx.zeros_like(tokens), span, None)[0][0])

        return run

    def rows(self, weight: Weight, ids: Sequence[int]) -> Floats:
        """Rows of an embedding matrix [V, D] -> [T, D]"""
        matrix = self._loader({"matrix": weight}).matrix("matrix")
        return self._run(lambda: matrix.rows(mx.array(list(ids)), self._dtype))

    def norm(self, x: Floats, weight: Floats) -> Floats:
        """RMSNorm of x [T, D], weight [D]"""
        return self._run(lambda: mx.fast.rms_norm(self._array(x), self._array(weight), self.config.rms_norm_eps))

    def rotate(self, x: Floats, start: int) -> Floats:
        """x [heads, L, 64], rotated from position `start` on"""
        return self._run(lambda: self._rotary(self._array(x)[None], mx.array([start]))[0])

    def attention(
        self,
        starts: Sequence[int],
        past_keys: Floats,
        past_values: Floats,
        qkv: Floats,
        sinks: Floats,
        window: int | None,
        kv_bits: int | None,
    ) -> Floats:
        """One step of B rows with L new tokens, qkv [B, L, (H + 2 K) * 64], each after its own number of past ones,
        keys (rotated) and values [B, K, P, 64], in a cache -> [B, L, H * 64]"""
        B, L, _ = qkv.shape
        shape = (B, self.config.num_key_value_heads, self.config.head_dim)
        capacity = max(starts) + L
        with mx.stream(self._where):
            cache: FullCache | RingCache
            if window is None:
                cache = FullCache(shape, self._dtype, capacity, packed=kv_bits == 8)
            else:
                cache = RingCache(shape, self._dtype, window, slack=0)
            for row, start in enumerate(starts):
                if start:
                    past = [a[row : row + 1, :, :start] for a in (past_keys, past_values)]
                    kv = self._array(np.stack(past))
                    span = Span.of(self.config, [row], [0], start)
                    if isinstance(cache, RingCache) and start > 1:
                        cache.extend(kv, span)
                    else:
                        cache.update(kv, span)
            loader = self._loader({})
            layer = Attention(
                self.config,
                Given((), self._array(qkv)),
                Identity((), mx.zeros(self.config.q_size, dtype=self._dtype)),
                self._array(sinks),
                self._rotary,
                self._ranks,
                loader.attend,
                loader.max_scores,
                packed_by_row=self.on_gpu,
            )
            residual = mx.zeros((B, L, self.config.q_size), dtype=self._dtype)
            span = Span.of(self.config, range(B), starts, L)
        return self._run(lambda: layer(residual, residual, cache, span))

    def fused_attention(
        self, q: Floats, keys: Floats, values: Floats, sinks: Floats, scale: float, mask: str
    ) -> Floats:
        """MLX's own attention: q [B, H, L, 64], keys and values [B, K, S, 64], sinks [H] -> [B, H, L, 64]. mask: one of
        `masks`, both of which let the last L of S positions see what is not after them."""
        L, S = q.shape[2], keys.shape[2]

        def run() -> mx.array:
            seen = "causal" if mask == "causal" else (mx.arange(S) <= mx.arange(S - L, S)[:, None])[None, None]
            return fused(self._array(q), self._array(keys), self._array(values), scale, seen, self._array(sinks))

        return self._run(run)

    def layers_in_flight(self) -> int:
        """Layers, however small, of a model whose steps overlap as those of gpt-oss do. On a CPU any number."""
        return layers_for(self._buffer_limits()) if self.on_gpu and mx.metal.is_available() else 2

    def _buffer_limits(self) -> BufferLimits:
        return limits_in_force(str(mx.device_info(self._device)["architecture"]))

    def sample(
        self,
        logits: Floats,
        samplings: Sequence[Sampling],
        prompts: Sequence[Sequence[int]],
        positions: Sequence[int],
        masks: Sequence[bytes | None] = (),
    ) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities [B] drawn from logits [B, V], by each Sampling's seed."""
        with mx.stream(self._where):
            states = [
                SamplerState.begin(sampling, prompt, sampling.seed or 0, logits.shape[1])
                for sampling, prompt in zip(samplings, prompts, strict=True)
            ]
            found = sample_tokens(mx.array(logits), samplings, states, positions, masks, self._elementwise).on_host()
            return found.tokens.tolist(), found.logprobs.tolist()

    def custom_kernels(self) -> Iterator[tuple[str, float, float]]:
        """Every custom kernel at the sizes of gpt-oss against its twin: case, error and limit. Empty where there are
        none. load() remembers what is found."""
        return checked_cases(self.config, self._dtype, self._device)

    def launch_seconds(self, count: int) -> float:
        """Seconds of one of `count` small operations, each of which depends on the one before it."""
        with mx.stream(self._where):
            x = mx.zeros(1024)
            mx.eval(x)
            started = time.perf_counter()
            for _ in range(count):
                x = x + 1
            mx.eval(x)
        return (time.perf_counter() - started) / count

    def reset_peak_memory(self) -> int:
        """Bytes in use now; peak_memory() counts from here."""
        mx.clear_cache()
        mx.reset_peak_memory()
        return int(mx.get_active_memory())

    def peak_memory(self) -> int:
        """Most bytes in use at once since reset_peak_memory()."""
        return int(mx.get_peak_memory())

    def close(self) -> None:
        self._streams.close()
        if self._products is not None:
            self._products.close()
        mx.clear_cache()

    def _loader(self, weights: Mapping[str, Weight]) -> _WeightLoader:
        return _WeightLoader(
            NamedWeights(self.config, weights),
            self._dtype,
            self._elementwise,
            self._max_scores,
            self._ranks,
            upcast=False,
            on_cpu=not self.on_gpu,
            streams=self._streams,
            adapters=(),
            products=self._products,
        )

    def _array(self, values: Floats) -> mx.array:
        return mx.array(values).astype(self._dtype)

    def _run(self, compute: Callable[[], mx.array]) -> Floats:
        with mx.stream(self._where):
            return np.array(compute().astype(mx.float32))
