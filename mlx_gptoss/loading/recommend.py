"""Which format to run a checkpoint in on this machine: the rule, in one place.

Preferred is what loses least, read with as few bytes as that allows:

- MXFP4 experts, also those that were only decoded to bfloat16, are kept bit for bit; the rest is taken to 8 bits
  (`mlx-mxfp4-q8`: on the bundled model under a tenth of the KL divergence of any 4-bit format), or to 4 if memory is
  short (`mlx-mxfp4-q4`).
- Weights trained in bfloat16 are taken to 8 bits (`mlx-8bit`), or to 4 (`mlx-4bit`).
- What is quantized otherwise runs as it is, or is taken to 4 bits (`mlx-4bit`).
- What is no smaller than the checkpoint gains nothing: it runs as it is.

The first of these that fits with a comfortable context is recommended, else the first that fits at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import CheckpointError
from ..weights import codecs, quantization
from ..weights.checkpoint import Checkpoint, CheckpointLike
from ..weights.formats import WRITERS
from ..weights.params import MATRIX_ROLES, Role
from ..weights.tensor import MXFP4, Dense
from .memory import MIN_CONTEXT, PREFERRED_CONTEXT, MemoryPlan

_PREFERRED: Mapping[str, Sequence[str]] = {
    "mxfp4": ("mlx-mxfp4-q8", "mlx-mxfp4-q4"),
    "dense": ("mlx-8bit", "mlx-4bit"),
    "other": ("mlx-4bit",),
}
DENSE_ROLES: Sequence[Role] = ("attention", "router", "lm_head")
DESCRIPTIONS: Mapping[str, str] = {
    "mlx-mxfp4-q8": "experts bit for bit, the rest in 8 bits",
    "mlx-mxfp4-q4": "experts bit for bit, the rest in 4 bits",
    "mlx-8bit": "8 bits a weight",
    "mlx-4bit": "4 bits a weight",
}


@dataclass(frozen=True)
class Recommendation:
    """as_is: the checkpoint should run as it is; `format` and `size_bytes` are then its own. context: tokens for which
    that fits."""

    format: str
    size_bytes: int
    context: int
    as_is: bool


def recommend(
    checkpoint: Checkpoint,
    plan: MemoryPlan,
    sizes: Mapping[str, int],
    context: int | None = None,
    mappable: Mapping[str, int] | None = None,
) -> Recommendation | None:
    """The format to run the checkpoint in, or None if none fits.

    plan: of the checkpoint as it is. sizes: bytes in the formats that it can be written in. context: tokens that must
    fit; None asks for PREFERRED_CONTEXT or, failing that, MIN_CONTEXT. mappable: bytes that may stay in the
    file, by format. Reads some rows of bfloat16 experts.
    """
    mappable = mappable or {}
    most = checkpoint.config.max_position_embeddings
    for wanted in [context] if context else [min(PREFERRED_CONTEXT, most), min(MIN_CONTEXT, most)]:
        for name, size in _candidates(checkpoint, sizes):
            as_is = size == checkpoint.size_bytes
            held = size + derived_bytes(checkpoint) if as_is else size
            if replace(plan, weights_bytes=held, context=wanted, mapped_bytes=mappable.get(name, 0)).fits:
                return Recommendation(name, size, wanted, as_is)
    return None


def _candidates(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Formats with their sizes, the best first."""
    kind, own = _kind(checkpoint), (checkpoint.format, checkpoint.size_bytes)
    smaller = [name for name in _PREFERRED[kind] if name in sizes and sizes[name] < checkpoint.size_bytes]
    first = [] if kind != "other" and _PREFERRED[kind][0] in smaller else [own]
    return first + [(name, sizes[name]) for name in smaller]


def _kind(checkpoint: Checkpoint) -> str:
    """How the experts are stored, judged by those of the first layer: a key of _PREFERRED."""
    weight = checkpoint.read("layers.0.experts.down.weight")
    if not isinstance(weight, Dense):
        return "mxfp4" if weight.spec == MXFP4 else "other"
    some = Dense(codecs.contiguous_rows(weight.values[0, :32]))
    if some.values.shape[-1] % MXFP4.group:
        return "dense"
    decoded = codecs.dequantize(quantization.to_spec(some, MXFP4))
    return "mxfp4" if np.array_equal(decoded, codecs.dequantize(some)) else "dense"


def used_vocabulary(checkpoint: Checkpoint) -> int:
    """Ids that the tokenizer has; all there are without one."""
    tokenizer = checkpoint.tokenizer()
    return (
        checkpoint.config.vocab_size if tokenizer is None else min(tokenizer.vocab_size, checkpoint.config.vocab_size)
    )


def mappable_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that may stay in the file: the embeddings, and lm_head's rows of ids that no token has."""
    config, roles = checkpoint.config, checkpoint.summary().roles
    row_bytes = {role: float(roles[role]["bits"]) * config.hidden_size / 8 for role in ("embed", "lm_head")}
    unused = config.vocab_size - used_vocabulary(checkpoint)
    return int(config.vocab_size * row_bytes["embed"] + unused * row_bytes["lm_head"])


def mappable_by_format(checkpoint: Checkpoint) -> dict[str, int]:
    """The same in each format that can hold the model, and in its own."""
    unused = 1 - used_vocabulary(checkpoint) / checkpoint.config.vocab_size
    share = {"embed.weight": 1.0, "lm_head.weight": unused}
    dtypes = {param.name: "BF16" for param in checkpoint.params}
    found = {}
    for name, form in WRITERS.items():
        with contextlib.suppress(CheckpointError):
            units = form.units(name, checkpoint.params, dtypes)
            parts = [share.get(u.params[0].name, 0.0) * sum(info.nbytes for info in u.tensors) for u in units]
            found[name] = int(sum(parts))
    return found | {checkpoint.format: mappable_bytes(checkpoint)}


def upcastable_bytes(weights: CheckpointLike, activation_bytes: int) -> int:
    """Bytes that the dense matrices which every token reads would take more in activations of this size."""
    extra = 0
    for role in DENSE_ROLES:
        matrices = [param for param in weights.params if param.role == role and param.is_matrix]
        if all(weights.stored_as(param.name)[0] is None for param in matrices):
            wide = activation_bytes * sum(param.size for param in matrices)
            extra += max(0, wide - weights.matrix_bytes(role))
    return extra


def derived_bytes(weights: CheckpointLike) -> int:
    """Bytes of biases that are not stored but made while reading, since codes and scales tell them: of int4-autoround
    and of GGUF's Q8_0."""
    extra = 0
    for role in MATRIX_ROLES:
        matrices = [param for param in weights.params if param.role == role and param.is_matrix]
        held = 0
        for param in matrices:
            spec, dtype = weights.stored_as(param.name)
            if spec is None or spec.scale != "float":
                break  # a bias goes with float scales alone, and a role's matrices are stored alike
            held += param.size * spec.bits // 8 + 2 * param.size // spec.group * (4 if dtype == "F32" else 2)
        else:
            extra += max(0, held - weights.matrix_bytes(role))
    return extra
