"""What measure/selftest.py calls: the functions of model.py, decode.py and sample.py, with numpy arrays in and out.

Nothing is computed here in another way than the model does: weights go through load.py, attention and the experts are
the model's own objects or launches, with projections whose output is given.

Legend: T tokens, D in, N out, E experts, I intermediate, B rows, L tokens a row, P past tokens, H query heads, K KV
heads, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...config import ModelConfig
from ...sampling import Sampling
from ...weights.split import RankShard
from ...weights.tensor import (
    AFFINE4,
    AFFINE8,
    AFFINE8_G32,
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
from . import DTYPES, _fused, dtype_name, pick_device
from .cache import FullCache, RingCache, Span
from .layers import Experts, Linear, Operations
from .load import _WeightLoader
from .model import Attention, Norm, Rotary
from .plain import TorchOperations
from .ranks import Ranks
from .runner import MAX_ROWS
from .sample import SamplerState, noise_keys, sample_tokens

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Given(Linear):
    """A layer whose output is given, as its bias."""

    def __call__(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return self.bias


@dataclass(frozen=True)
class Identity(Linear):
    """A layer that returns its input."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


class Kernels:
    """The kernels of this backend on one device.

    dtype: of the activations. specs: what matrices may be stored as; None is bfloat16. ways: through the experts, each
    with the most rows that it is given; None is any number. counts_memory: whether peak_memory() sees what a step
    allocates.
    """

    specs: tuple[Spec | None, ...] = (MXFP4, AFFINE4, NVFP4, MXFP8, AFFINE8, AFFINE8_G32, FP8_ROW, None)
    masks: tuple[str, ...] = ()  # of fused_attention, which is none of this backend's
    has_custom_kernels = False  # that depend on a check

    def __init__(self, config: ModelConfig, device: str | None, dtype: str | None, kernels: bool | None = None) -> None:
        """kernels: as in load()."""
        self.config = config
        self.dtype = dtype_name(device, dtype)
        self._device = pick_device(device)
        self.on_gpu: bool = self._device.type == "cuda"
        self.counts_memory: bool = self.on_gpu
        self.fused: bool = self.on_gpu if kernels is None else kernels
        self._dtype = DTYPES[self.dtype]
        if self.on_gpu:
            torch.cuda.set_device(self._device)
        threads = torch.get_num_threads() if not self.on_gpu else 1
        self._ops: Operations = _fused(NamedWeights(config, {})) if self.fused else TorchOperations(threads)
        self._ranks = Ranks(RankShard.of(config, 0, 1))
        frequencies = torch.from_numpy(yarn_frequencies(config.yarn, config.head_dim)).to(self._device)
        self._rotary = Rotary(frequencies, config.head_dim**-0.5 * config.yarn.concentration**2)
        self.ways: dict[str, int | None] = {"decode": MAX_ROWS, "prefill": None} if self.fused else {"grouped": None}

    def facts(self) -> dict[str, Any]:
        """What torch says of the device."""
        if not self.on_gpu:
            return {"device": "cpu", "threads": torch.get_num_threads(), "torch CUDA": torch.version.cuda}
        found = torch.cuda.get_device_properties(self._device)
        return {
            "device": found.name,
            "compute capability": f"{found.major}.{found.minor}",
            "memory_size": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "torch CUDA": torch.version.cuda,
        }

    @torch.inference_mode()
    def linear(self, weight: Weight) -> Callable[[Floats], Floats]:
        """The product with a stored matrix [N, D]: x [T, D] -> [T, N]"""
        layer = self._loader({"matrix.weight": weight}).linear(["matrix"], biased=False)
        return lambda x: self._run(lambda: layer(self._tensor(x)))

    @torch.inference_mode()
    def experts(self, gate: Weight, up: Weight, down: Weight, bias: Floats) -> Callable[[Floats, Floats, str], Floats]:
        """A layer's experts; bias [E, 2 I + D]. The function takes x [T, D], the router's scores [T, E] and one of
        `ways`, and returns [T, D]."""
        width = 2 * gate.shape[1]
        loader = self._loader(
            {
                "gate.weight": gate,
                "up.weight": up,
                "down.weight": down,
                "gate.bias": Dense(bias[:, : width // 2]),
                "up.bias": Dense(bias[:, width // 2 : width]),
                "down.bias": Dense(bias[:, width:]),
            }
        )
        c = self.config
        layer = Experts(
            loader.experts(["gate", "up"]),
            loader.experts(["down"]),
            c.num_experts_per_tok,
            c.swiglu_limit,
            c.swiglu_alpha,
            range(gate.shape[0]),
        )

        def run(x: Floats, scores: Floats, way: str) -> Floats:
            rows, given = self._tensor(x), torch.from_numpy(scores).to(self._device)
            return self._run(
                lambda: (
                    self._decode_experts(rows, given, layer)
                    if way == "decode"
                    else self._ops.mixture(rows, given, layer)
                )
            )

        return run

    @torch.inference_mode()
    def rows(self, weight: Weight, ids: Sequence[int]) -> Floats:
        """Rows of an embedding matrix [V, D] -> [T, D]"""
        matrix = self._loader({"matrix": weight}).matrix("matrix")
        return self._run(lambda: matrix.at(torch.tensor(list(ids), device=self._device)).decode(self._dtype))

    def norm(self, x: Floats, weight: Floats) -> Floats:
        """RMSNorm of x [T, D], weight [D]"""
        return self._run(lambda: Norm(self._tensor(weight), self.config.rms_norm_eps)(self._tensor(x)))

    def rotate(self, x: Floats, start: int) -> Floats:
        """x [heads, L, 64], rotated from position `start` on"""
        positions = torch.arange(start, start + x.shape[1], device=self._device)[None]
        rows = np.ascontiguousarray(x.swapaxes(0, 1)).reshape(1, x.shape[1], -1)
        return self._run(lambda: self._ops.rotate(self._tensor(rows), self._rotary.rotation(positions))[0])

    @torch.inference_mode()
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
        keys (rotated) and values [B, K, P, 64], in a cache -> [B, L, H * 64]. kv_bits: 8 for a cache in 8 bits."""
        B, L, _ = qkv.shape
        shape, capacity = (B, self.config.num_key_value_heads, self.config.head_dim), max(starts) + L
        cache: FullCache | RingCache
        if window is None:
            allocated, pack = capacity if self.on_gpu else 0, None if kv_bits is None else self._ops.pack
            cache = FullCache(shape, capacity, allocated, self._dtype, self._device, pack)
        else:
            cache = RingCache(shape, window, 0, self._dtype, self._device)
        for row, start in enumerate(starts):
            if start:
                keys, values = (self._tensor(a[row : row + 1, :, :start]) for a in (past_keys, past_values))
                cache.extend(keys, values, Span.of([row], [0], start, self._device))
        span = Span.of(range(B), starts, L, self._device)
        given = Given((), self._tensor(qkv), self._ops)
        scale, sink = self._rotary.score_scale, torch.from_numpy(sinks).to(self._device)
        if L == 1 and self.fused:
            return self._run(lambda: self._decode_attention(given.bias, cache, span, sink, scale))
        same = Identity((), None, self._ops)
        layer = Attention(self.config, self._ops, self._ranks, given, same, sink, scale)
        return self._run(lambda: layer(self._tensor(qkv), cache, span, self._rotary.rotation(span.positions)))

    def fused_attention(
        self, q: Floats, keys: Floats, values: Floats, sinks: Floats, scale: float, mask: str
    ) -> Floats:
        raise ValueError(f"the attention kernels of this backend take no mask, so there is none called {mask!r}")

    def layers_in_flight(self) -> int:
        """Layers of a model for the check of what overlapping steps allocate."""
        return 2

    @torch.inference_mode()
    def sample(
        self,
        logits: Floats,
        samplings: Sequence[Sampling],
        prompts: Sequence[Sequence[int]],
        positions: Sequence[int],
        masks: Sequence[bytes | None] = (),
    ) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities [B] drawn from logits [B, V], by each Sampling's seed."""
        given = torch.from_numpy(logits).to(self._device)
        plain = not any(masks) and all(s == Sampling(temperature=s.temperature, seed=s.seed) for s in samplings)
        if self.fused and plain and len(samplings) <= MAX_ROWS:
            return self._decode_sample(given, samplings, positions)
        states = [
            SamplerState.begin(sampling, prompt, sampling.seed or 0, logits.shape[1], self._device)
            for sampling, prompt in zip(samplings, prompts, strict=True)
        ]
        found = sample_tokens(given, samplings, states, positions, masks)
        return found.tokens.tolist(), found.logprobs.tolist()

    @torch.inference_mode()
    def custom_kernels(self) -> Iterator[tuple[str, float, float]]:
        """None."""
        return iter(())

    def launch_seconds(self, count: int) -> float:
        """Seconds of one of `count` small operations, each of which depends on the one before it."""
        x = torch.zeros(1024, device=self._device)
        self._synchronize()
        started = time.perf_counter()
        for _ in range(count):
            x = x + 1
        self._synchronize()
        return (time.perf_counter() - started) / count

    def reset_peak_memory(self) -> int:
        """Bytes in use now; peak_memory() counts from here."""
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak_memory(self) -> int:
        """Most bytes in use at once since reset_peak_memory()."""
        return torch.cuda.max_memory_allocated(self._device)

    def close(self) -> None:
        self._ops.close()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _decode_attention(
        self, qkv: Tensor | None, cache: FullCache | RingCache, span: Span, sinks: Tensor, scale: float
    ) -> Tensor:
        """As decode.py: one new token a row."""
        from .kernels import attention

        assert qkv is not None
        c, B = self.config, len(span.slots)
        rotation = self._rotary.rotation(span.offsets[None])  # the rows as positions of one sequence
        rotated = self._ops.rotate(qkv[:, 0, : c.q_size + c.kv_size][None], rotation)[0].transpose(0, 1)
        q, k = rotated[:, : c.num_attention_heads].contiguous(), rotated[:, c.num_attention_heads :, None]
        cache.append(k, qkv[:, 0, c.q_size + c.kv_size :].view(B, -1, 1, c.head_dim), span)
        window, out = cache.window if isinstance(cache, RingCache) else None, q.new_empty((B, c.q_size))
        heads, capacity = (c.num_attention_heads, c.num_key_value_heads), cache.arrays[0].shape[3]
        scratch = None if window else attention.decode_scratch(B, *heads, capacity, self._dtype, self._device)
        slots, positions = (torch.tensor(a, dtype=torch.int32, device=self._device) for a in (span.slots, span.starts))
        attention.decode_attention(
            q, cache.keys, cache.values, slots, positions, sinks, scale, out, scratch, window=window
        )
        return out[:, None]

    def _decode_experts(self, x: Tensor, scores: Tensor, experts: Experts) -> Tensor:
        """As decode.py: a step of T rows."""
        from .kernels import moe, routing

        (T, D), pairs = x.shape, len(x) * experts.active
        hidden, out = x.new_empty((pairs, experts.down.matrices[0].shape[-1])), torch.zeros_like(x)
        if T == 1:
            ones = torch.ones(D, dtype=self._dtype, device=self._device)
            # The kernel normalizes its input, whatever its size, and adds its result to it.
            small = x / 64
            out.copy_(small)
            moe.forward_one_token(out, scores, experts, hidden, ones, 0.0)
            return out.float() - small.float()
        places = torch.arange(T, dtype=torch.int32, device=self._device)
        groups = routing.Groups(
            torch.empty(pairs, dtype=torch.int32, device=self._device),
            torch.empty(scores.shape[1] + 1, dtype=torch.int32, device=self._device),
            torch.empty(pairs, dtype=torch.float32, device=self._device),
        )
        routing.sort_pairs(scores, places, experts.active, groups)
        moe.forward_grouped(out, x, groups, experts, hidden, x.new_empty((pairs, D)), out, places)
        return out

    def _decode_sample(
        self, logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """As decode.py, which draws in the step itself."""
        from .kernels import sample

        B, V = logits.shape
        keys = noise_keys([sampling.seed or 0 for sampling in samplings], positions)
        tokens = torch.empty(B, dtype=torch.int64, device=self._device)
        logprobs = torch.empty(B, dtype=torch.float32, device=self._device)
        slots = torch.arange(B, dtype=torch.int32, device=self._device)
        sample.draw(
            logits,
            torch.tensor([s.temperature for s in samplings], dtype=torch.float32, device=self._device),
            torch.tensor(keys, dtype=torch.int64, device=self._device),
            slots,
            slots,
            tokens,
            logprobs,
            torch.zeros(B, dtype=torch.int64, device=self._device),
            sample.scratch(B, V, self._device),
        )
        return tokens.tolist(), logprobs.tolist()

    def _loader(self, weights: Mapping[str, Weight]) -> _WeightLoader:
        return _WeightLoader(NamedWeights(self.config, weights), self._dtype, self._device, self._ops, self._ranks, ())

    def _tensor(self, values: Floats) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, self._dtype)

    def _run(self, compute: Callable[[], Tensor]) -> Floats:
        with torch.inference_mode():
            found: Floats = compute().float().cpu().numpy()
            return found

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self._device)
