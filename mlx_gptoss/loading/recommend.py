"""The rule that recommends a format for a checkpoint on this machine.

The candidates, in order of preference: first the least loss, then the fewest bytes.

- MXFP4 experts are kept bit for bit, also if they were only decoded to bfloat16. The other weights are quantized to
  8 bits (`mlx-mxfp4-q8`: on the bundled model under a tenth of the KL divergence of any 4-bit format), or to 4 bits if
  memory is short (`mlx-mxfp4-q4`).
- Weights trained in bfloat16 are quantized to 8 bits (`mlx-8bit`), or to 4 (`mlx-4bit`).
- A checkpoint that is quantized in another way runs as it is, or is quantized to 4 bits (`mlx-4bit`).
- If a format is no smaller than the checkpoint, the checkpoint runs as it is.

The rule recommends the first candidate that fits with PREFERRED_CONTEXT tokens, else the first with MIN_CONTEXT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..backends.base import padded_groups, run_as
from ..errors import CheckpointError
from ..weights import codecs, quantization
from ..weights.checkpoint import Checkpoint, CheckpointLike
from ..weights.formats import WRITERS
from ..weights.formats.base import Unit
from ..weights.params import MATRIX_ROLES, Role
from ..weights.requantize import Requantized
from ..weights.tensor import MXFP4, Dense, Spec
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
    """A recommended format. as_is: run the checkpoint as it is; `format` and `size_bytes` are then its own. context:
    the tokens with which it fits."""

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

    plan: the memory plan of the checkpoint as it is. sizes: bytes in each format that it can be written in. context:
    tokens that must fit; None tries PREFERRED_CONTEXT, then MIN_CONTEXT. mappable: bytes that may stay in the file, by
    format. Reads some rows of bfloat16 experts.
    """
    mappable = mappable or {}
    longest = checkpoint.config.max_position_embeddings
    for wanted in [context] if context else [min(PREFERRED_CONTEXT, longest), min(MIN_CONTEXT, longest)]:
        for name, size in _candidates(checkpoint, sizes):
            as_is = size == checkpoint.size_bytes
            in_memory = plan.weights_bytes if as_is else size
            if replace(plan, weights_bytes=in_memory, context=wanted, mapped_bytes=mappable.get(name, 0)).fits:
                return Recommendation(name, size, wanted, as_is)
    return None


def _candidates(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Formats with their sizes, the best first."""
    kind, own = _kind(checkpoint), (checkpoint.format, checkpoint.size_bytes)
    smaller = [name for name in _PREFERRED[kind] if name in sizes and sizes[name] < checkpoint.size_bytes]
    first = [] if kind != "other" and _PREFERRED[kind][0] in smaller else [own]
    return first + [(name, sizes[name]) for name in smaller]


def _kind(checkpoint: Checkpoint) -> str:
    """How the first layer's experts are stored: a key of _PREFERRED."""
    weight = checkpoint.read("layers.0.experts.down.weight")
    if not isinstance(weight, Dense):
        return "mxfp4" if weight.spec == MXFP4 else "other"
    sample = Dense(codecs.contiguous_rows(weight.values[0, :32]))
    if sample.values.shape[-1] % MXFP4.group:
        return "dense"
    decoded = codecs.dequantize(quantization.to_spec(sample, MXFP4))
    return "mxfp4" if np.array_equal(decoded, codecs.dequantize(sample)) else "dense"


def used_vocabulary(checkpoint: Checkpoint) -> int:
    """Number of ids that the tokenizer has, or the size of the vocabulary if there is no tokenizer."""
    tokenizer = checkpoint.tokenizer()
    return (
        checkpoint.config.vocab_size if tokenizer is None else min(tokenizer.vocab_size, checkpoint.config.vocab_size)
    )


def mappable_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that may stay in the mapped file: the embeddings, and the rows of lm_head for ids that the tokenizer does
    not have."""
    config, roles = checkpoint.config, checkpoint.summary().roles
    row_bytes = {role: float(roles[role]["bits"]) * config.hidden_size / 8 for role in ("embed", "lm_head")}
    unused = config.vocab_size - used_vocabulary(checkpoint)
    return int(config.vocab_size * row_bytes["embed"] + unused * row_bytes["lm_head"])


def units_by_format(checkpoint: CheckpointLike) -> Iterator[tuple[str, list[Unit]]]:
    """Each format that can hold the model, with the units of its checkpoint."""
    dtypes = {param.name: "BF16" for param in checkpoint.params}
    for name, writer in WRITERS.items():
        try:
            units = writer.units(name, checkpoint.params, dtypes)
        except CheckpointError:  # the format's groups do not divide this model's rows
            continue
        yield name, units


def mappable_by_format(checkpoint: Checkpoint) -> dict[str, int]:
    """mappable_bytes() for each format that can hold the model, and for the checkpoint's own format."""
    unused = 1 - used_vocabulary(checkpoint) / checkpoint.config.vocab_size
    share = {"embed.weight": 1.0, "lm_head.weight": unused}
    found = {}
    for name, units in units_by_format(checkpoint):
        parts = [share.get(u.params[0].name, 0.0) * sum(info.nbytes for info in u.tensors) for u in units]
        found[name] = int(sum(parts))
    return found | {checkpoint.format: mappable_bytes(checkpoint)}


def upcastable_bytes(weights: CheckpointLike, activation_bytes: int) -> int:
    """Additional bytes if the dense matrices that every token reads were upcast to activations of this size."""
    extra = 0
    for role in DENSE_ROLES:
        matrices = [param for param in weights.params if param.role == role and param.is_matrix]
        if all(weights.stored_as(param.name)[0] is None for param in matrices):
            wide = activation_bytes * sum(param.size for param in matrices)
            extra += max(0, wide - weights.matrix_bytes(role))
    return extra


def run_otherwise(weights: CheckpointLike, backend: str) -> dict[Spec, Spec]:
    """The storages for which the backend has no kernel, each with the one in which it computes."""
    stored = {weights.stored_as(param.name)[0] for param in weights.params if param.is_matrix}
    return {spec: ran for spec in stored if spec is not None and (ran := run_as(backend, spec)) != spec}


def _widening_bytes(weights: CheckpointLike, backend: str) -> int:
    found = 0
    for param in weights.params:
        spec, _ = weights.stored_as(param.name)
        if spec is not None and param.is_matrix:
            found += param.size * (run_as(backend, spec).bits - spec.bits) // 8
    return found


def _wider_scale_bytes(weights: CheckpointLike) -> int:
    """Two bytes of each float16 scale and of each bias in its group, and of the experts' biases if it is theirs."""
    matrices = [param for param in weights.params if param.is_matrix and weights.scale_dtype(param.name) == "F16"]
    specs = [(param.size, spec) for param in matrices if (spec := weights.stored_as(param.name)[0]) is not None]
    vectors = [param for param in weights.params if param.role == "experts" and not param.is_matrix]
    of_experts = sum(param.size for param in vectors) if any(param.role == "experts" for param in matrices) else 0
    return 2 * (sum(2 * size // spec.group for size, spec in specs) + of_experts)


def padding_bytes(weights: CheckpointLike | Requantized, backend: str, device_name: str) -> int:
    """Bytes that the kernels of the cuda backend add on a GPU, where rows of scales and of biases are padded."""
    if backend != "cuda" or device_name == "cpu":
        return 0
    found = 0
    for param in weights.params:
        spec, dtype = weights.stored_as(param.name)
        if spec is not None and spec.group and param.is_matrix:
            itemsize = (4 if dtype == "F32" else 2) if spec.scale == "float" else 1
            groups = param.shape[-1] // spec.group
            padding = (padded_groups(groups, itemsize) - groups) * itemsize * (2 if spec.scale == "float" else 1)
            found += param.size // param.shape[-1] * padding
    return found


def derived_bytes(weights: CheckpointLike, backend: str | None = None, *, compiled: bool = False) -> int:
    """Bytes that loading adds to those stored: biases that int4-autoround and GGUF imply, values that GGUF's types are
    decoded to, and wider codes where the backend has no kernel for the stored ones (None: it has all). On mlx, which
    multiplies by float16 scales only in float16, at most the bytes that they take more in float32, unless `compiled`
    products of a CPU (Backend.cpu_products) read them as they are."""
    extra = 0 if backend is None else _widening_bytes(weights, backend)
    extra += _wider_scale_bytes(weights) if backend == "mlx" and not compiled else 0
    for role in MATRIX_ROLES:
        matrices = [param for param in weights.params if param.role == role and param.is_matrix]
        unpacked = sum(weights.unpacked_bytes(param.name) for param in matrices)
        in_memory = 0
        for param in matrices if not unpacked else ():
            spec, dtype = weights.stored_as(param.name)
            if spec is None or spec.scale != "float":
                break  # only float scales have biases, and all matrices of a role are stored the same way
            in_memory += param.size * spec.bits // 8 + 2 * param.size // spec.group * (4 if dtype == "F32" else 2)
        else:
            extra += unpacked or max(0, in_memory - weights.matrix_bytes(role))
    return extra
