"""The load plan: weights, backend, memory and limits, resolved before any weight is read. One per process or rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from importlib import metadata
from pathlib import Path

from ..backends import find_backend
from ..backends.base import Backend, Limits, Runner, run_as
from ..config import PRESETS, ModelConfig
from ..errors import InvalidRequest
from ..options import LoadOptions
from ..weights import checkpoint as checkpoints
from ..weights.adapters import Adapter, check_adapter, open_adapter
from ..weights.adapters.summary import AdapterSummary, summarize
from ..weights.checkpoint import Checkpoint, CheckpointLike
from ..weights.files import is_adapter_folder
from ..weights.requantize import Requantized
from ..weights.split import RankShard, RankWeights
from ..weights.synthetic import Synthetic, preset
from ..weights.tensor import Dense, Weight, Weights
from . import hub
from .hub import NANO as NANO
from .hub import NANO_ALIAS as NANO_ALIAS
from .memory import MemoryPlan, plan_memory
from .recommend import (
    derived_bytes,
    mappable_bytes,
    padding_bytes,
    units_by_format,
    upcastable_bytes,
    used_vocabulary,
)
from .step_reads import resident_bytes, step_reads

MAX_DRAFTS = 3  # plus the token before them: 4 queries, the maximum of Metal's attention kernel for decoding
LIBRARIES = {"mlx": "mlx", "cuda": "torch"}  # the library that computes; another version may round differently
Progress = Callable[[int, int], None]
ACTIVATION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class LoadRequest(LoadOptions):
    """What to load and how: everything that another rank needs to load its share, as plain JSON values.

    model: a folder or a hub id; None is the bundled model. synthetic: the preset, the number of layers (None for all)
    and the format of synthetic weights, which are generated while loading, instead of a model. available_bytes: what
    the model may take; None is what the device has.
    """

    model: str | None = None
    synthetic: tuple[str, int | None, str] | None = None
    available_bytes: int | None = None

    @staticmethod
    def of(model: str | None, options: LoadOptions) -> LoadRequest:
        """The request with these options, its folders as text."""
        named = {each.name: getattr(options, each.name) for each in fields(LoadOptions)}
        named["prompt_cache"] = options.prompt_cache and str(options.prompt_cache)
        named["adapters"] = options.adapters and {name: str(path) for name, path in options.adapters.items()}
        return LoadRequest(model=model, **named)

    @property
    def drafts(self) -> int:
        """Maximum drafts of a row."""
        return MAX_DRAFTS if self.speculate else 0

    @property
    def name(self) -> str:
        return f"synthetic {self.synthetic[0]}" if self.synthetic else self.model or "the bundled model"


class Counted:
    """Weights that report, whenever one is read, progress(bytes read so far, bytes in all)."""

    def __init__(self, weights: Weights, total: int, progress: Progress) -> None:
        self.config: ModelConfig = weights.config
        self._weights, self._total, self._progress = weights, total, progress
        self._done = 0

    def read(self, name: str) -> Weight:
        weight = self._weights.read(name)
        self._done += weight.nbytes
        self._progress(min(self._done, self._total), self._total)
        return weight

    def release(self) -> None:
        self._weights.release()


@dataclass(frozen=True)
class LoadPlan:
    """A load request, resolved on one rank.

    source: the whole checkpoint. part: this rank's part of it. weights: the weights to load: `part`, or `part`
    quantized while loading. module, backend: the backend and its name. shard: this rank's heads, experts and token ids;
    None for a single process. adapters: by name, this rank's parts.
    """

    request: LoadRequest
    source: CheckpointLike
    part: CheckpointLike
    weights: Weights
    module: Backend
    backend: str
    memory: MemoryPlan
    shard: RankShard | None
    adapters: Mapping[str, Adapter]

    def limits(self) -> Limits:
        """The limits of the runner."""
        resident = None
        if self.memory.mapped_bytes:
            assert isinstance(self.source, Checkpoint)
            resident = self.source.config.vocab_size if self.shard else used_vocabulary(self.source)
        return Limits(
            slots=self.request.slots,
            max_context=self.memory.context,
            chunk=self.memory.chunk,
            drafts=self.request.drafts,
            kv_bits=self.request.kv_bits,
            resident_vocab=resident,
            upcast=self.memory.upcast_bytes > 0,
            custom_kernels=self.request.custom_kernels,
        )

    def load(self, limits: Limits, progress: Progress | None = None) -> Runner:
        """Load the weights. Call it on the thread that will own the runner."""
        device, dtype = self.request.device, self.request.dtype
        weights = Counted(self.weights, self.memory.weights_bytes, progress) if progress else self.weights
        adapters = tuple(self.adapters.values())
        return self.module.load(weights, device=device, dtype=dtype, limits=limits, shard=self.shard, adapters=adapters)

    def versions(self) -> list[list[str]]:
        """Name and version of each program that the numbers depend on."""
        return [[name, metadata.version(name)] for name in ("mlx-gptoss", LIBRARIES[self.backend])]


def open_source(request: LoadRequest) -> CheckpointLike:
    """Open the checkpoint that the request names. Reads headers only."""
    if request.synthetic is None:
        return open_checkpoint(request.model)
    name, layers, format_name = request.synthetic
    return Synthetic(preset(name, layers), format_name)


def open_checkpoint(path_or_repo_id: str | Path | None) -> Checkpoint:
    """Open a checkpoint; None and "nano" are the bundled model. Reads headers only. Raises CheckpointError."""
    return checkpoints.open(NANO if path_or_repo_id is None else hub.resolve(path_or_repo_id))


def plan_load(
    request: LoadRequest, source: CheckpointLike, rank: int = 0, ranks: int = 1, ranks_on_host: int = 1
) -> LoadPlan:
    """The plan of one rank. source: from open_source(). ranks_on_host: ranks that share this machine's memory.

    Raises InvalidRequest for options that the backend or the model does not allow.
    """
    shard = None if ranks == 1 else RankShard.of(source.config, rank, ranks)
    part: CheckpointLike = source if shard is None else RankWeights(source, shard)
    weights: CheckpointLike | Requantized = part
    if request.quantize is not None:
        weights = Requantized(part, request.quantize)
    module, backend = find_backend(request.backend)
    if shard is None:  # the sums of several ranks end command buffers, too
        resident = resident_bytes(weights, request.max_context, request.slots)
        module.prepare(request.device, step_reads(weights, backend), resident)
    adapters = open_adapters(request.adapters or {}, source.config)
    if shard is not None:
        adapters = {name: adapter.part(source.params, shard) for name, adapter in adapters.items()}
    memory = memory_plan(
        part,
        module,
        _bytes_in_memory(weights, module, request.device) if isinstance(weights, Requantized) else None,
        device=request.device,
        dtype=request.dtype,
        max_context=request.max_context,
        slots=request.slots,
        kv_bits=request.kv_bits,
        drafts=request.drafts,
        as_stored=backend == "mlx" and request.quantize is None,
        prefix_bytes=request.prefix_cache,
        ranks_on_host=ranks_on_host,
        available_bytes=request.available_bytes,
        adapter_values=sum(adapter.nbytes(1) for adapter in adapters.values()),
    )
    return LoadPlan(request, source, part, weights, module, backend, memory, shard, adapters)


def open_adapters(paths: Mapping[str, str | Path], config: ModelConfig) -> dict[str, Adapter]:
    """The adapters in these folders or of these hub ids, by name. Raises CheckpointError."""
    return {name: open_adapter(hub.resolve_adapter(path), config, name) for name, path in paths.items()}


def adapter_folders(paths: Mapping[str, str | Path], config: ModelConfig) -> dict[str, Path]:
    """The absolute paths of the adapters, by name, for another process. Reads headers only.

    Raises CheckpointError for one that does not fit a model with this config.
    """
    folders = {name: hub.resolve_adapter(path).resolve() for name, path in paths.items()}
    for folder in folders.values():
        check_adapter(folder, config)
    return folders


def describe_adapter(path_or_repo_id: str | Path, models: Mapping[str, ModelConfig] | None = None) -> AdapterSummary:
    """What a LoRA adapter is, from its config and headers, and which models it fits.

    path_or_repo_id: a folder or a hub id. models: those to compare it with, by name; None is the published ones.
    Raises CheckpointError.
    """
    published = {f"gpt-oss-{size}": PRESETS[size] for size in ("20b", "120b")}
    return summarize(hub.resolve_adapter(path_or_repo_id), published if models is None else models)


def is_adapter(path_or_repo_id: str | Path) -> bool:
    """Whether a folder or a hub id is a LoRA adapter and no model. Raises as hub.resolve()."""
    return is_adapter_folder(hub.resolve(path_or_repo_id))


def _bytes_in_memory(weights: Requantized, backend: Backend, device: str | None) -> int:
    padding = padding_bytes(weights, backend.NAME, backend.device_name(device))
    return weights.size_bytes + weights.added_bytes(partial(run_as, backend.NAME)) + padding


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
    drafts: int = 0,
    as_stored: bool = False,
    prefix_bytes: int | None = 0,
    ranks_on_host: int = 1,
    available_bytes: int | None = None,
    adapter_values: int = 0,
) -> MemoryPlan:
    """The memory plan of a checkpoint on the backend's device.

    weights_bytes: the size of the weights, if they are quantized while loading; None is the checkpoint's size.
    as_stored: the backend (mlx) may leave the embeddings in the mapped file if memory is short and, on a CPU whose
        products are not compiled, upcast dense matrices if there is enough.
    prefix_bytes: as in plan_memory. ranks_on_host: processes that share the device's memory equally. available_bytes:
        that memory; None asks the device. adapter_values: of the factors of all adapters that are loaded with it.
    Raises InvalidRequest for a context or kv_bits that the model does not allow.
    """
    config = checkpoint.config
    if kv_bits is not None and config.head_dim % 64:
        raise InvalidRequest(f"kv_bits needs heads of 64, and this model's have {config.head_dim}; leave it out")
    if max_context is not None and not 1 <= max_context <= config.max_position_embeddings:
        raise InvalidRequest(f"max_context must be from 1 to {config.max_position_embeddings}, not {max_context}")
    activation_bytes = ACTIVATION_BYTES[backend.dtype_name(device, dtype)]
    name, compiled = backend.device_name(device), backend.cpu_products(device, dtype) == "compiled"
    may_upcast = as_stored and name == "cpu" and not compiled
    if weights_bytes is None:
        weights_bytes = checkpoint.size_bytes + derived_bytes(checkpoint, backend.NAME, compiled=compiled)
        weights_bytes += padding_bytes(checkpoint, backend.NAME, name)
    return plan_memory(
        config,
        weights_bytes,
        (backend.available_memory(device) if available_bytes is None else available_bytes) // ranks_on_host,
        activation_bytes=activation_bytes,
        context=max_context,
        slots=slots,
        chunk=backend.prefill_chunk(device),
        kv_bits=kv_bits,
        drafts=drafts,
        mappable_bytes=mappable(checkpoint) if as_stored else 0,
        upcastable_bytes=upcastable_bytes(checkpoint, activation_bytes) if may_upcast else 0,
        prefix_bytes=prefix_bytes,
        adapter_bytes=adapter_values * activation_bytes,
    )


def mappable(checkpoint: CheckpointLike) -> int:
    """Bytes of weights that may stay in the mapped file. For one rank's part, these are only the embeddings."""
    if isinstance(checkpoint, RankWeights):
        return checkpoint.matrix_bytes("embed") if isinstance(checkpoint.source, Checkpoint) else 0
    return mappable_bytes(checkpoint) if isinstance(checkpoint, Checkpoint) else 0


def sizes_in_other_formats(checkpoint: CheckpointLike) -> dict[str, int]:
    """Bytes of the same model in each format that can hold it, computed from its layout."""
    return {
        name: sum(info.nbytes for unit in units for info in unit.tensors) for name, units in units_by_format(checkpoint)
    }


def identity(source: CheckpointLike) -> str:
    """A digest of the headers and of the first row of every weight that all ranks read.

    Two copies of one checkpoint have the same digest; another fine-tune with the same layout has a different one."""
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
