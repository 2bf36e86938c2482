"""The load plan: weights, backend, memory and limits, resolved before any weight is read. One per process or rank."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..backends import find_backend
from ..backends.base import Backend, Limits, Runner
from ..errors import CheckpointError, InvalidRequest
from ..weights import checkpoint as checkpoints
from ..weights.checkpoint import Checkpoint, CheckpointLike
from ..weights.formats import WRITERS
from ..weights.requantize import Requantized
from ..weights.split import RankShard, RankWeights
from ..weights.synthetic import Synthetic, preset
from ..weights.tensor import Dense, Weights
from . import hub
from .memory import MemoryPlan, plan_memory
from .recommend import derived_bytes, mappable_bytes, upcastable_bytes, used_vocabulary

NANO = Path(__file__).parents[1] / "nano"  # the bundled model
DRAFTS = 3  # with the token before them 4, the most queries that Metal's attention for a single one takes
LIBRARY = {"mlx": "mlx", "cuda": "torch"}  # what computes: another version may round otherwise
ACTIVATION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class LoadOptions:
    """What to load, and how: the options of api.load() that every rank has to know. JSON can hold it.

    synthetic: preset, layers (None for all) and format of weights that lie nowhere, in place of a model's.
    """

    model: str | None = None
    synthetic: tuple[str, int | None, str] | None = None
    backend: str = "auto"
    device: str | None = None
    dtype: str | None = None
    max_context: int | None = None
    slots: int = 1
    quantize: str | None = None
    kv_bits: int | None = None
    speculate: bool = False
    prefix_cache: int | None = 0

    @property
    def name(self) -> str:
        return f"synthetic {self.synthetic[0]}" if self.synthetic else self.model or "the bundled model"


@dataclass(frozen=True)
class LoadPlan:
    """What LoadOptions resolve to on one rank. source: the whole checkpoint. part: the rank's. weights: what is loaded.
    shard: the rank's; None for one that is alone."""

    options: LoadOptions
    source: CheckpointLike
    part: CheckpointLike
    weights: Weights
    module: Backend
    backend: str
    plan: MemoryPlan
    shard: RankShard | None

    def limits(self) -> Limits:
        """Of the runner."""
        resident = None
        if self.plan.mapped_bytes:
            assert isinstance(self.source, Checkpoint)
            resident = self.source.config.vocab_size if self.shard else used_vocabulary(self.source)
        return Limits(
            slots=self.options.slots,
            max_context=self.plan.context,
            chunk=self.plan.chunk,
            drafts=DRAFTS if self.options.speculate else 0,
            kv_bits=self.options.kv_bits,
            resident_vocab=resident,
            upcast=self.plan.upcast_bytes > 0,
        )

    def load(self, limits: Limits) -> Runner:
        options = self.options
        return self.module.load(
            self.weights, device=options.device, dtype=options.dtype, limits=limits, shard=self.shard
        )

    def programs(self) -> list[list[str]]:
        """What computes, with versions."""
        return [[name, metadata.version(name)] for name in ("mlx-gptoss", LIBRARY[self.backend])]


def open_source(options: LoadOptions) -> CheckpointLike:
    """The checkpoint that the options name; reads headers only."""
    if options.synthetic is None:
        return open_checkpoint(options.model)
    name, layers, form = options.synthetic
    return Synthetic(preset(name, layers), form)


def plan_load(
    options: LoadOptions, source: CheckpointLike, rank: int = 0, ranks: int = 1, ranks_on_host: int = 1
) -> LoadPlan:
    """The plan of one rank. source: from open_source(). ranks_on_host: ranks that share this machine's memory."""
    if options.slots < 1:
        raise InvalidRequest(f"slots must be at least 1, not {options.slots}")
    shard = None if ranks == 1 else RankShard.of(source.config, rank, ranks)
    part: CheckpointLike = source if shard is None else RankWeights(source, shard)
    weights = part if options.quantize is None else Requantized(part, options.quantize)
    module, backend = find_backend(options.backend)
    _check_options(backend, options.kv_bits, options.speculate)
    plan = memory_plan(
        part,
        module,
        None if options.quantize is None else weights.size_bytes,
        device=options.device,
        dtype=options.dtype,
        max_context=options.max_context,
        slots=options.slots,
        kv_bits=options.kv_bits,
        as_stored=backend == "mlx" and options.quantize is None,
        prefix_bytes=options.prefix_cache,
        ranks_on_host=ranks_on_host,
    )
    return LoadPlan(options, source, part, weights, module, backend, plan, shard)


def identity(source: CheckpointLike) -> str:
    """A digest of what two copies of a checkpoint have in common: headers, and the first row of every weight that each
    rank reads. Another fine-tune of the same layout has another one."""
    digest = hashlib.sha256()
    for name, size, *rest in source.fingerprint():
        digest.update(repr((name, size, rest[-1])).encode())  # without the time of the last change
    for param in source.params:
        if param.role not in ("experts", "lm_head", "embed"):
            row = source.read(param.name, range(1))
            arrays = [row.values] if isinstance(row, Dense) else [row.codes, row.scale, row.bias, row.outer]
            for array in arrays:
                digest.update(b"" if array is None else array.tobytes())
    source.release()
    return digest.hexdigest()


def _check_options(backend: str, kv_bits: int | None, speculate: bool) -> None:
    """What the mlx backend alone can do."""
    if kv_bits is not None and (kv_bits != 8 or backend != "mlx"):
        raise InvalidRequest(f"kv_bits must be 8, and the backend mlx, not {kv_bits!r} and {backend}; or leave it out")
    if speculate and backend != "mlx":
        raise InvalidRequest(f"the {backend} backend cannot speculate; leave it out, or take the mlx backend")


def open_checkpoint(path_or_repo_id: str | Path | None) -> Checkpoint:
    """The checkpoint with its headers read and checked, and no weight touched. None is the bundled model."""
    return checkpoints.open(NANO if path_or_repo_id is None else hub.resolve(path_or_repo_id))


def memory_plan(
    checkpoint: CheckpointLike,
    backend: Backend,
    weights_bytes: int | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    max_context: int | None = None,
    slots: int = 1,
    kv_bits: int | None = None,
    as_stored: bool = False,
    prefix_bytes: int | None = 0,
    ranks_on_host: int = 1,
) -> MemoryPlan:
    """What the checkpoint will take on this backend's device, and what the device has. weights_bytes: where that is
    not the checkpoint's own size, for it is quantized on the way. as_stored: whether the backend (mlx) may leave
    embeddings in the mapped file where memory is short, and on a CPU widen what is dense where there is enough.
    prefix_bytes: as in plan_memory. ranks_on_host: processes that share the device's memory equally."""
    config = checkpoint.config
    if kv_bits is not None and config.head_dim % 64:
        raise InvalidRequest(f"kv_bits needs heads of 64, and this model's have {config.head_dim}; leave it out")
    if max_context is not None and not 1 <= max_context <= config.max_position_embeddings:
        raise InvalidRequest(f"max_context must be from 1 to {config.max_position_embeddings}, not {max_context}")
    activation_bytes = ACTIVATION_BYTES[backend.dtype_name(device, dtype)]
    may_widen = as_stored and backend.device_name(device) == "cpu"
    return plan_memory(
        config,
        checkpoint.size_bytes + derived_bytes(checkpoint) if weights_bytes is None else weights_bytes,
        backend.available_memory(device) // ranks_on_host,
        activation_bytes=activation_bytes,
        context=max_context,
        slots=slots,
        chunk=backend.prefill_chunk(device),
        kv_bits=kv_bits,
        mappable_bytes=mappable(checkpoint) if as_stored else 0,
        upcastable_bytes=upcastable_bytes(checkpoint, activation_bytes) if may_widen else 0,
        prefix_bytes=prefix_bytes,
    )


def mappable(checkpoint: CheckpointLike) -> int:
    """Bytes that may stay in the mapped file; a rank's are its embeddings alone."""
    if isinstance(checkpoint, RankWeights):
        return checkpoint.matrix_bytes("embed") if isinstance(checkpoint.source, Checkpoint) else 0
    return mappable_bytes(checkpoint) if isinstance(checkpoint, Checkpoint) else 0


def sizes_in_other_formats(checkpoint: CheckpointLike) -> dict[str, int]:
    """Bytes of the same model in each format that can hold it, from its layout alone."""
    dtypes = {param.name: "BF16" for param in checkpoint.params}
    sizes = {}
    for name, form in WRITERS.items():
        with contextlib.suppress(CheckpointError):  # groups that do not divide this model's rows
            units = form.units(name, checkpoint.params, dtypes)
            sizes[name] = sum(info.nbytes for unit in units for info in unit.tensors)
    return sizes
