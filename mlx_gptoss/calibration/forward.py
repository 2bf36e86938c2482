"""A checkpoint's network in numpy, layer by layer, with single matrices replaced if asked. One expert at a time.

Legend: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..config import ModelConfig
from ..weights import codecs
from ..weights.tensor import Weight, Weights
from .network import Floats, attend, rms_norm, route, swiglu

ROWS = 4096  # of the vocabulary's matrix at once


class Forward:
    """replaced: weights by name, in place of the checkpoint's."""

    def __init__(self, source: Weights, replaced: Mapping[str, Weight] | None = None) -> None:
        self._source, self._replaced = source, replaced or {}
        self.config: ModelConfig = source.config

    def with_replaced(self, replaced: Mapping[str, Weight]) -> Forward:
        """The same network with other weights under these names."""
        return Forward(self._source, replaced)

    def weight(self, name: str) -> Weight:
        """A weight as the network uses it."""
        return self._replaced[name] if name in self._replaced else self._source.read(name)

    def embed(self, ids: Sequence[int]) -> Floats:
        """The embeddings of tokens [T] -> [T, D]"""
        return codecs.dequantize(self.weight("embed.weight")[np.asarray(ids)])

    def layer(self, index: int, x: Floats, lengths: Sequence[int]) -> Floats:
        """x [T, D] after a layer. lengths: tokens of each window of text."""
        return self.experts(index, self.attention(index, x, lengths))

    def attention(self, index: int, x: Floats, lengths: Sequence[int]) -> Floats:
        """x [T, D] after a layer's attention."""
        config, at = self.config, f"layers.{index}."
        h = rms_norm(x, self._values(f"{at}attention_norm.weight"), config.rms_norm_eps)
        q, k, v = (self._linear(f"{at}attention.{name}", h) for name in "qkv")
        mixed: Floats = attend(q, k, v, self._values(f"{at}attention.sinks"), lengths, config, config.windows[index])
        return np.asarray(x + self._linear(f"{at}attention.o", mixed))

    def experts(self, index: int, x: Floats) -> Floats:
        """x [T, D] after a layer's experts."""
        config, at = self.config, f"layers.{index}."
        out: Floats = x.copy()
        h = rms_norm(x, self._values(f"{at}mlp_norm.weight"), config.rms_norm_eps)
        chosen, share = route(self._linear(f"{at}router", h), config.num_experts_per_tok)
        parts = {name: self._layer(f"{at}experts.{name}") for name in ("gate", "up", "down")}
        for expert in np.unique(chosen).tolist():
            tokens, place = np.nonzero(chosen == expert)
            gate, up = (_apply(*parts[name], h[tokens], expert) for name in ("gate", "up"))
            inner = swiglu(gate, up, config.swiglu_limit, config.swiglu_alpha)
            out[tokens] += _apply(*parts["down"], inner, expert) * share[tokens, place, None]
        return out

    def logits(self, x: Floats) -> Floats:
        """The logits [T, V] of x [T, D] after the last layer."""
        h = rms_norm(x, self._values("norm.weight"), self.config.rms_norm_eps)
        out = np.empty((len(x), self.config.vocab_size), np.float32)
        head = self.weight("lm_head.weight")
        for start in range(0, self.config.vocab_size, ROWS):
            out[:, start : start + ROWS] = h @ codecs.dequantize(head[start : start + ROWS]).T
        return out

    def streams(self, ids: Sequence[int], lengths: Sequence[int]) -> Iterator[Floats]:
        """[T, D] after the embedding table and after each layer."""
        x = self.embed(ids)
        yield x
        for index in range(self.config.num_hidden_layers):
            x = self.layer(index, x, lengths)
            yield x

    def _linear(self, name: str, x: Floats) -> Floats:
        return _apply(*self._layer(name), x, slice(None))

    def _layer(self, name: str) -> tuple[Weight, Weight]:
        return self.weight(f"{name}.weight"), self.weight(f"{name}.bias")

    def _values(self, name: str) -> Floats:
        return codecs.dequantize(self.weight(name))


def _apply(weight: Weight, bias: Weight, x: Floats, expert: int | slice) -> Floats:
    """x [T, K] times an expert's weights [N, K], or all of a matrix without experts, plus the bias -> [T, N]"""
    y: Floats = x @ codecs.dequantize(weight[expert]).T
    y += codecs.dequantize(bias[expert])
    return y
