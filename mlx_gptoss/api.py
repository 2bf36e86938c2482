"""The Python API's functions: load() a checkpoint onto a backend, describe() it, convert() it."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from .engine import Engine, PrefixFiles
from .loading import hub
from .loading.distributed import coordinate, serve_rank
from .loading.memory import require_fit
from .loading.plan import NANO as NANO
from .loading.plan import LoadOptions, LoadPlan, open_source, plan_load
from .loading.plan import memory_plan as memory_plan
from .loading.plan import open_checkpoint as open_checkpoint
from .loading.plan import sizes_in_other_formats as sizes_in_other_formats
from .loading.recommend import mappable, recommend
from .model import Model
from .ranks import find_launch
from .weights import convert as conversion
from .weights.checkpoint import Checkpoint, Summary


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
    backend: "mlx"; "cuda", which is torch, on a CPU too; or "auto": cuda where torch is installed and finds an NVIDIA
        GPU, else mlx.
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
    On one of several ranks (mlx.launch, torchrun) the model is split among them, and rank 0 alone has a Model: on the
    others this call does what rank 0 tells, until that closes its model, and then ends the process (SystemExit).
    Raises CheckpointError, DoesNotFit (before anything is loaded), BackendUnavailable or InvalidRequest.
    """
    started = time.perf_counter()
    options = LoadOptions(
        model=None if path_or_repo_id is None else str(path_or_repo_id),
        backend=backend,
        device=device,
        dtype=dtype,
        max_context=max_context,
        slots=slots,
        quantize=quantize,
        kv_bits=kv_bits,
        speculate=speculate,
        prefix_cache=prefix_cache,
    )
    launch, files = find_launch(), None
    if launch is not None and launch.rank:
        serve_rank(launch)
        sys.exit(0)
    if launch is not None:
        load_plan, start = coordinate(options, launch)
        make_runner = partial(start, partial(load_plan.load, load_plan.limits()))
    else:
        load_plan = plan_load(options, open_source(options))
        _require_fit(load_plan)
        make_runner = partial(load_plan.load, load_plan.limits())
    if prompt_cache is not None:
        files = PrefixFiles(Path(prompt_cache), _fingerprint(load_plan))
    checkpoint = load_plan.source
    assert isinstance(checkpoint, Checkpoint)
    tokenizer = checkpoint.tokenizer()
    engine = Engine(make_runner, max_waiting=max_waiting, prefix_bytes=load_plan.plan.prefix_bytes, prefix_files=files)
    return Model(
        checkpoint,
        quantize or checkpoint.format,
        tokenizer,
        engine,
        load_plan.backend,
        load_plan.plan,
        options.name,
        load_s=time.perf_counter() - started,
    )


def _require_fit(load_plan: LoadPlan) -> None:
    """Raise DoesNotFit if it does not, with the format that would fit."""
    checkpoint = load_plan.source
    if load_plan.plan.fits or not isinstance(checkpoint, Checkpoint):
        return
    sizes, context = sizes_in_other_formats(checkpoint), load_plan.options.max_context
    may_stay = mappable(checkpoint) if load_plan.backend == "mlx" else None
    best = recommend(checkpoint, load_plan.plan, sizes, context, may_stay)
    require_fit(load_plan.plan, load_plan.options.name, {best.format: best.size_bytes} if best else sizes)


def _fingerprint(load_plan: LoadPlan) -> str:
    """Of everything that what is computed of a prompt hangs on."""
    options, plan, module = load_plan.options, load_plan.plan, load_plan.module
    where = (
        module.device_name(options.device),
        module.dtype_name(options.device, options.dtype),
        plan.chunk,
        plan.upcast_bytes > 0,
    )
    checkpoint = load_plan.part.fingerprint()
    return repr((load_plan.programs(), checkpoint, options.quantize, options.kv_bits, options.speculate, where))


def describe(path_or_repo_id: str | Path | None = None) -> Summary:
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
