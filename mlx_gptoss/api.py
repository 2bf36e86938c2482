"""The Python API's functions: load() a checkpoint onto a backend, describe() it, convert() it."""

from __future__ import annotations

import contextlib
import time
from importlib import metadata
from pathlib import Path

from . import hub
from .backends import find_backend
from .backends.base import Backend, Limits
from .engine import Engine, PrefixFiles
from .errors import CheckpointError, InvalidRequest
from .memory import MemoryPlan, plan_memory, require_fit
from .model import Model
from .recommend import mappable, mappable_bytes, recommend, used_vocabulary, widenable_bytes
from .weights import checkpoint as checkpoints
from .weights import convert as conversion
from .weights.formats import WRITERS
from .weights.requantize import Requantized

NANO = Path(__file__).parent / "nano"  # the bundled model
DRAFTS = 3  # with the token before them 4, the most queries that Metal's attention for a single one takes
LIBRARY = {"mlx": "mlx", "cuda": "torch"}  # what computes: another version may round otherwise
ACTIVATION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def load(
    path_or_repo_id: str | Path | None = None,
    *,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    max_context: int | None = None,
    slots: int = 1,
    quantize: str | None = None,
    kv_bits: int | None = None,
    speculate: bool = False,
    max_waiting: int | None = None,
    prefix_cache: int | None = None,
    prompt_cache: str | Path | None = None,
) -> Model:
    """Open a checkpoint and load it onto a device.

    path_or_repo_id: a folder in any format of the README's table, a hub id such as "openai/gpt-oss-20b" (downloaded
        once), or None for the bundled nano model.
    backend: "mlx"; "cuda", which is torch, on a CPU too; or "auto": mlx on a Mac; elsewhere cuda where torch is
        installed and finds a GPU or the model is not small; else mlx.
    device: "cpu", "gpu" or, for cuda, "cuda:1"; None is the backend's best.
    dtype: of activations and KV cache, "float32", "bfloat16" or "float16"; None is bfloat16 on a GPU, float32 on a CPU.
    max_context: tokens a sequence may have; None is the model's longest, or what fits into memory of it.
    slots: sequences that are generated at once; more wait.
    quantize: the name of an MLX format ("mlx-4bit", "mlx-mxfp4-q8", ...) to quantize to while loading; or "rest-8bit"
        or "rest-4bit", which leave experts and router as they are; None, the default, all weights.
    kv_bits: 8 keeps keys and values of the full layers in 8 bits (mlx alone), 9/16 of their memory in bfloat16; None as
        they are computed.
    speculate: guess up to DRAFTS tokens ahead from what the text has said before, and verify them in one step (mlx
        alone). The text is the same, up to the rounding of a product's order; where it repeats itself it comes faster.
    max_waiting: requests that may wait for a slot; more are refused with Busy. None sets no bound.
    prefix_cache: bytes on the device for what was computed of prompts, from which prompts that begin alike go on; 0
        keeps none; None takes half of what is left, 2 GB at most.
    prompt_cache: a folder where that is kept for other processes, too.
    Raises CheckpointError, DoesNotFit (before anything is loaded), BackendUnavailable or InvalidRequest.
    """
    started = time.perf_counter()
    if slots < 1:
        raise InvalidRequest(f"slots must be at least 1, not {slots}")
    name = "the bundled model" if path_or_repo_id is None else str(path_or_repo_id)
    checkpoint = open_checkpoint(path_or_repo_id)
    weights: checkpoints.Checkpoint | Requantized = (
        checkpoint if quantize is None else Requantized(checkpoint, quantize)
    )
    tokenizer = checkpoint.tokenizer()
    sizes = sizes_in_other_formats(checkpoint)
    size = weights.size_bytes
    module, backend = find_backend(backend, size)
    _check_options(backend, kv_bits, speculate)
    plan = memory_plan(
        checkpoint,
        module,
        size,
        device=device,
        dtype=dtype,
        max_context=max_context,
        slots=slots,
        kv_bits=kv_bits,
        as_stored=backend == "mlx" and quantize is None,
        prefix_bytes=prefix_cache,
    )
    if not plan.fits:
        best = recommend(checkpoint, plan, sizes, max_context, mappable(checkpoint) if backend == "mlx" else None)
        require_fit(plan, name, {best.format: best.size_bytes} if best else sizes)
    files = None
    if prompt_cache is not None:
        where = (module.device_name(device), module.dtype_name(device, dtype), plan.chunk, plan.widened_bytes > 0)
        programs = [(name, metadata.version(name)) for name in ("mlx-gptoss", LIBRARY[backend])]
        known = (programs, checkpoint.fingerprint(), quantize, kv_bits, speculate, where)
        files = PrefixFiles(Path(prompt_cache), repr(known))
    limits = Limits(
        slots=slots,
        max_context=plan.context,
        chunk=plan.chunk,
        drafts=DRAFTS if speculate else 0,
        kv_bits=kv_bits,
        resident_vocab=used_vocabulary(checkpoint) if plan.mapped_bytes else None,
        widen=plan.widened_bytes > 0,
    )
    engine = Engine(
        lambda: module.load(weights, device=device, dtype=dtype, limits=limits),
        max_waiting=max_waiting,
        prefix_bytes=plan.prefix_bytes,
        prefix_files=files,
    )
    return Model(
        checkpoint,
        quantize or checkpoint.format,
        tokenizer,
        engine,
        backend,
        plan,
        name,
        load_s=time.perf_counter() - started,
    )


def _check_options(backend: str, kv_bits: int | None, speculate: bool) -> None:
    """What the mlx backend alone can do."""
    if kv_bits is not None and (kv_bits != 8 or backend != "mlx"):
        raise InvalidRequest(f"kv_bits must be 8, and the backend mlx, not {kv_bits!r} and {backend}; or leave it out")
    if speculate and backend != "mlx":
        raise InvalidRequest(f"the {backend} backend cannot speculate; leave it out, or take the mlx backend")


def open_checkpoint(path_or_repo_id: str | Path | None) -> checkpoints.Checkpoint:
    """The checkpoint with its headers read and checked, and no weight touched. None is the bundled model."""
    return checkpoints.open(NANO if path_or_repo_id is None else hub.resolve(path_or_repo_id))


def memory_plan(
    checkpoint: checkpoints.Checkpoint,
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
) -> MemoryPlan:
    """What the checkpoint will take on this backend's device, and what the device has. weights_bytes: where that is
    not the checkpoint's own size, for it is quantized on the way. as_stored: whether the backend (mlx) may leave
    embeddings in the mapped file where memory is short, and on a CPU widen what is dense where there is enough.
    prefix_bytes: as plan_memory has it."""
    config = checkpoint.config
    if kv_bits is not None and config.head_dim % 64:
        raise InvalidRequest(f"kv_bits needs heads of 64, and this model's have {config.head_dim}; leave it out")
    if max_context is not None and not 1 <= max_context <= config.max_position_embeddings:
        raise InvalidRequest(f"max_context must be from 1 to {config.max_position_embeddings}, not {max_context}")
    activation_bytes = ACTIVATION_BYTES[backend.dtype_name(device, dtype)]
    may_widen = as_stored and backend.device_name(device) == "cpu"
    return plan_memory(
        config,
        checkpoint.size_bytes if weights_bytes is None else weights_bytes,
        backend.available_memory(device),
        activation_bytes=activation_bytes,
        context=max_context,
        slots=slots,
        chunk=backend.prefill_chunk(device),
        kv_bits=kv_bits,
        mappable_bytes=mappable_bytes(checkpoint) if as_stored else 0,
        widenable_bytes=widenable_bytes(checkpoint, activation_bytes) if may_widen else 0,
        prefix_bytes=prefix_bytes,
    )


def sizes_in_other_formats(checkpoint: checkpoints.Readable) -> dict[str, int]:
    """Bytes of the same model in each format that can hold it, from its layout alone."""
    dtypes = {param.name: "BF16" for param in checkpoint.params}
    sizes = {}
    for name, form in WRITERS.items():
        with contextlib.suppress(CheckpointError):  # groups that do not divide this model's rows
            units = form.units(name, checkpoint.params, dtypes)
            sizes[name] = sum(info.nbytes for unit in units for info in unit.tensors)
    return sizes


def describe(path_or_repo_id: str | Path | None = None) -> checkpoints.Summary:
    """Format, sizes and bits per weight of a checkpoint, from its headers alone."""
    return open_checkpoint(path_or_repo_id).summary()


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "mlx-4bit",
    *,
    search: str | None = None,
    overwrite: bool = False,
    progress: conversion.Progress | None = None,
) -> conversion.Report:
    """Write `source` (a folder or a hub id) to the folder `destination` in the format `to`. See weights.convert."""
    return conversion.convert(
        hub.resolve(source), Path(destination), to, search=search, overwrite=overwrite, progress=progress
    )
