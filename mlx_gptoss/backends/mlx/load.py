"""From a checkpoint to a model on the device: each weight is placed as it is stored, one at a time.

Nothing is held twice: a weight's bytes go from the mapped file into one MLX array, and the file's pages are
dropped before the next weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ...config import ModelConfig
from ...errors import CheckpointError
from ...rope import yarn_concentration, yarn_frequencies
from ...weights import codecs
from ...weights.tensor import (
    AFFINE4,
    AFFINE8,
    AFFINE8_G32,
    FP8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    Array,
    Dense,
    Quantized,
    Spec,
    Weight,
    Weights,
)
from .elementwise import Elementwise
from .layers import DenseMatrix, ExpertLinear, Linear, MappedRows, Matrix, QuantizedMatrix
from .model import Attention, Block, GptOss, MixtureOfExperts, Rotary

MODES: dict[Spec, str] = {
    MXFP4: "mxfp4",
    NVFP4: "nvfp4",
    MXFP8: "mxfp8",
    AFFINE4: "affine",
    AFFINE8: "affine",
    AFFINE8_G32: "affine",
}
UNIT_E8M0 = 127  # the e8m0 byte for 2^0


def load_model(
    checkpoint: Weights,
    dtype: mx.Dtype,
    elementwise: Elementwise,
    max_scores: int | None = None,
    resident_vocab: int | None = None,
) -> GptOss:
    """The whole model with activations of `dtype`. Peak memory: the checkpoint plus its largest weight once.
    elementwise, max_scores: as model.py has them. resident_vocab: as in Limits."""
    place = _Placer(checkpoint, dtype, elementwise)
    config = checkpoint.config
    # The two largest come first, while there is room to read one beside its copy.
    if resident_vocab is None:
        embed: Matrix | MappedRows = place.matrix("embed.weight")
        lm_head, rest = Linear((place.matrix("lm_head.weight"),)), None
    else:
        embed = MappedRows(checkpoint.read("embed.weight"), lambda weight: fuse([weight]))
        lm_head, rest = _cut(checkpoint.read("lm_head.weight"), resident_vocab)
        checkpoint.release()
    frequencies = mx.array((1.0 / yarn_frequencies(config.yarn, config.head_dim)).astype(np.float32))
    rotary = Rotary(frequencies, config.head_dim**-0.5 * yarn_concentration(config.yarn) ** 2)
    blocks = tuple(_block(place, config, layer, rotary, max_scores) for layer in range(config.num_hidden_layers))
    return GptOss(config, dtype, embed, blocks, place.vector("norm.weight"), lm_head, rest, elementwise)


def _cut(weight: Weight, resident: int) -> tuple[Linear, Callable[[], Linear] | None]:
    """lm_head's first rows, placed, and what places the others when they are wanted."""
    first = fuse([codecs.rows(weight, 0, resident)])
    mx.eval([array for array in vars(first).values() if isinstance(array, mx.array)])
    size = codecs.shape(weight)[0]
    if resident >= size:
        return Linear((first,)), None
    return Linear((first,)), lambda: Linear((fuse([codecs.rows(weight, resident, size)]),))


def _block(place: _Placer, config: ModelConfig, layer: int, rotary: Rotary, max_scores: int | None) -> Block:
    at = f"layers.{layer}"
    attention = Attention(
        config,
        qkv=place.linear([f"{at}.attention.{part}" for part in "qkv"]),
        out=place.linear([f"{at}.attention.o"]),
        sinks=place.vector(f"{at}.attention.sinks"),
        rotary=rotary,
        elementwise=place.elementwise,
        max_scores=max_scores,
    )
    mlp = MixtureOfExperts(
        config,
        router=place.linear([f"{at}.router"]),
        gate_up=place.experts([f"{at}.experts.gate", f"{at}.experts.up"]),
        down=place.experts([f"{at}.experts.down"]),
        bias=place.vectors([f"{at}.experts.{part}.bias" for part in ("gate", "up", "down")]),
        elementwise=place.elementwise,
    )
    return Block(
        config, place.vector(f"{at}.attention_norm.weight"), attention, place.vector(f"{at}.mlp_norm.weight"), mlp
    )


class _Placer:
    """Reads weights by canonical name and puts them on the device."""

    def __init__(self, checkpoint: Weights, dtype: mx.Dtype, elementwise: Elementwise) -> None:
        self.elementwise = elementwise
        self._checkpoint = checkpoint
        self._dtype = dtype

    def vector(self, name: str) -> mx.array:
        """Norms and sinks, in the activation dtype."""
        return self.vectors([name])

    def vectors(self, names: Sequence[str]) -> mx.array:
        """Biases side by side, in the activation dtype."""
        array = _joined([self._dense(name) for name in names], axis=-1).astype(self._dtype)
        mx.eval(array)
        return array

    def matrix(self, name: str) -> Matrix:
        return self._matrices([name])[0]

    def linear(self, names: Sequence[str]) -> Linear:
        return Linear(self._matrices([f"{n}.weight" for n in names]), self.vectors([f"{n}.bias" for n in names]))

    def experts(self, names: Sequence[str]) -> ExpertLinear:
        return ExpertLinear(self._matrices([f"{n}.weight" for n in names]))

    def _dense(self, name: str) -> Array:
        weight = self._checkpoint.read(name)
        if not isinstance(weight, Dense):
            raise CheckpointError(f"{name} is quantized; gpt-oss keeps it dense")
        return weight.values

    def _matrices(self, names: Sequence[str]) -> tuple[Matrix, ...]:
        weights = [self._checkpoint.read(name) for name in names]
        matrices = (fuse(weights),) if _alike(weights) else tuple(fuse([weight]) for weight in weights)
        for matrix in matrices:
            mx.eval([array for array in vars(matrix).values() if isinstance(array, mx.array)])
        self._checkpoint.release()
        return matrices


def fuse(weights: Sequence[Weight]) -> Matrix:
    """One matrix of all rows, in order. The weights are stored alike, so joining their codes is exact."""
    first = weights[0]
    if isinstance(first, Dense):
        return DenseMatrix(_joined([w.values for w in weights if isinstance(w, Dense)], axis=-2))
    parts = [w for w in weights if isinstance(w, Quantized)]
    codes = _joined([w.codes for w in parts], axis=-2).view(mx.uint32)
    if first.spec == FP8_ROW:
        scales = mx.full((*codes.shape[:-1], codes.shape[-1] // 8), UNIT_E8M0, dtype=mx.uint8)
        return QuantizedMatrix(codes, scales, None, _outer(parts), "mxfp8", 32, 8)
    if first.spec not in MODES:
        raise CheckpointError(f"MLX has no kernel for {first.spec}; convert the checkpoint with --to mlx-4bit")
    scales = _joined([w.scale for w in parts if w.scale is not None], axis=-2)
    biases = None if first.bias is None else _joined([w.bias for w in parts if w.bias is not None], axis=-2)
    return QuantizedMatrix(codes, scales, biases, _outer(parts), MODES[first.spec], first.spec.group, first.spec.bits)


def _alike(weights: Sequence[Weight]) -> bool:
    """Whether one kernel can run over all of them side by side."""

    def storage(weight: Weight) -> object:
        if isinstance(weight, Dense):
            return weight.values.dtype
        return weight.spec, None if weight.scale is None else weight.scale.dtype, weight.bias is None

    return len({storage(weight) for weight in weights}) == 1


def _outer(parts: Sequence[Quantized]) -> mx.array | None:
    """The factors on the output rows, float32: [] when one serves all rows, else [N], [E, 1] or [E, N]."""
    if all(part.outer is None for part in parts):
        return None
    factors = [np.float32(1.0) if part.outer is None else np.asarray(part.outer, dtype=np.float32) for part in parts]
    if all(np.ndim(f) == 0 for f in factors) and len({float(f) for f in factors}) == 1:
        return mx.array(float(factors[0]))
    rows = [np.broadcast_to(f, (*p.codes.shape[:-1], 1))[..., 0] for f, p in zip(factors, parts, strict=True)]
    return mx.array(np.concatenate(rows, axis=-1))


def _joined(arrays: Sequence[Array], axis: int) -> mx.array:
    """Mapped numpy arrays, one behind the other, as one MLX array."""
    return _array(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis))


def _array(values: Array) -> mx.array:
    """numpy (bfloat16 by its bits, which numpy itself does not know) to MLX."""
    values = np.ascontiguousarray(values)
    if values.dtype.name == "bfloat16":
        return mx.array(values.view(np.uint16)).view(mx.bfloat16)
    return mx.array(values)
