"""The functions of the Python API: load() a checkpoint onto a backend, describe() it, convert() it."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from .calibration.plan import Calibration
from .calibration.plan import plan_calibration as _plan_calibration
from .calibration.widths import Budget
from .engine import Engine, LoadedAdapter, PrefixFiles
from .errors import InvalidRequest
from .loading import hub
from .loading.distributed import coordinate, serve_rank
from .loading.memory import PREFERRED_CONTEXT, require_fit, weights_that_fit
from .loading.plan import NANO as NANO
from .loading.plan import LoadPlan, LoadRequest, Progress, open_source, plan_load
from .loading.plan import describe_adapter as describe_adapter
from .loading.plan import is_adapter as is_adapter
from .loading.plan import memory_plan as memory_plan
from .loading.plan import open_checkpoint as open_checkpoint
from .loading.plan import sizes_in_other_formats as sizes_in_other_formats
from .loading.products import find_products
from .loading.recommend import mappable_by_format, recommend
from .model import Model
from .options import LoadOptions
from .options.load import loads
from .ranks import find_launch
from .weights import checkpoint as checkpoints
from .weights import convert as conversion
from .weights.checkpoint import Checkpoint, Summary


@loads(LoadOptions)
def load(path_or_repo_id: str | Path | None, options: LoadOptions) -> Model:
    """Open a checkpoint and load it onto a device. The Model is a context manager; close() frees its memory.

    path_or_repo_id: a folder or file in any format that is read (mlx_gptoss/weights/README.md), a hub id such as
        "openai/gpt-oss-20b" (downloaded once), or None for the bundled model.

    Among several ranks (mlx.launch, torchrun) the model is split over them. Only rank 0 gets a Model; on the others
    this call serves rank 0 until that closes its model, and then ends the process (SystemExit).

    Raises CheckpointError, DoesNotFit (before any weight is read), BackendUnavailable or InvalidRequest.
    """
    return load_request(LoadRequest.of(None if path_or_repo_id is None else str(path_or_repo_id), options))


def load_request(request: LoadRequest, progress: Progress | None = None) -> Model:
    """load(), as one value says it that can be sent to another process. progress: called on the loading thread as
    progress(bytes of weights read, bytes in all)."""
    started = time.perf_counter()
    launch = find_launch()
    if launch is not None and launch.rank:
        serve_rank(launch)
        sys.exit(0)
    if launch is not None:
        plan, start = coordinate(request, launch)
        make_runner = partial(start, partial(plan.load, plan.limits(), progress))
    else:
        plan = plan_load(request, open_source(request))
        _require_fit(plan)
        make_runner = partial(plan.load, plan.limits(), progress)
    files = PrefixFiles(Path(request.prompt_cache), _fingerprint(plan)) if request.prompt_cache else None
    checkpoint = plan.source
    assert isinstance(checkpoint, Checkpoint)
    tokenizer = checkpoint.tokenizer()
    engine = Engine(
        make_runner, max_waiting=request.max_waiting, prefix_bytes=plan.memory.prefix_bytes, prefix_files=files
    )
    return Model(
        checkpoint,
        request.quantize or checkpoint.format,
        tokenizer,
        engine,
        plan.backend,
        plan.memory,
        request.name,
        load_s=time.perf_counter() - started,
        adapters={
            name: LoadedAdapter(index, adapter.digest) for index, (name, adapter) in enumerate(plan.adapters.items())
        },
    )


def describe(path_or_repo_id: str | Path | None = None) -> Summary:
    """Format, sizes and bits per weight of a checkpoint, from its headers: no weight is read.

    path_or_repo_id: as in load(). Raises CheckpointError.
    """
    return open_checkpoint(path_or_repo_id).summary()


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "mlx-4bit",
    *,
    search: str | None = None,
    calibrate: bool | str | Path | Calibration | None = None,
    bits_per_weight: float | None = None,
    memory: int | None = None,
    context: int | None = None,
    backend: str = "auto",
    device: str | None = None,
    adapter: str | Path | None = None,
    overwrite: bool = False,
    progress: conversion.Progress | None = None,
) -> conversion.Report:
    """Write a checkpoint in another format. Streams: a few chunks of one layer are in memory at a time.

    source: a folder or a hub id. destination: the folder to write; it appears complete and read back, or not at all.
    to: "mxfp4", "bf16", "fp8-dynamic", "int4-autoround", "nvfp4", "mlx-3bit", "mlx-4bit", "mlx-6bit", "mlx-8bit",
        "mlx-mxfp8", "mlx-nvfp4", "mlx-mxfp4", "mlx-mxfp4-q8", "mlx-mxfp4-q4", "gguf", "gguf-f16" or "gguf-bf16".
    search: "mse" searches the scales with the least squared error for 4-bit affine weights, which takes about nine
        times as long; None rounds as mlx-lm does.
    calibrate: choose the codes of a 4-bit or 3-bit format so that the model's outputs change least on a text: True for
        the text that comes with the program, a .txt or .jsonl file, or what plan_calibration returned. The result has
        the same layout and size; see mlx_gptoss/weights/README.md. None or False does not.
    bits_per_weight: with calibrate, for mlx-4bit, mlx-3bit and mlx-mxfp4-q4: matrices get 3, 4, 6 or 8 bits each, those
        more whose rounding changes the outputs most, so that the whole result has at most this many bits per weight.
    memory, context: in place of bits_per_weight, the bytes of memory that the result may take while it runs on a GPU
        with a sequence of `context` tokens (None is 8192), by the memory plan of MLX.
    backend, device: as for load(); with calibrate, their GPU computes the large products, and numpy on a CPU.
    adapter: a LoRA adapter, a folder or a hub id, to merge into the weights; into bf16 alone.
    overwrite: replace an existing destination once the new one is complete.
    progress: called as progress(bytes done, bytes in all, what is being done).

    The same call continues an interrupted conversion after its last complete file or calibrated layer. The Report has
    the size, the number of tensors, the time and the memory used. Raises CheckpointError for a source that cannot be
    read, and GptOssError for an unknown format, an existing destination or a full disk.
    """
    merged = None if adapter is None else hub.resolve_adapter(adapter)
    calibration = calibrate if isinstance(calibrate, Calibration) else None
    if calibrate is None or calibrate is False or calibration is not None:
        for name, value in (("bits_per_weight", bits_per_weight), ("memory", memory), ("context", context)):
            if value is not None:
                raise InvalidRequest(f"{name} is for widths measured on a text: give calibrate=True or a file, too")
    elif not isinstance(calibrate, Calibration):
        calibration = plan_calibration(
            source,
            to,
            calibrate,
            bits_per_weight=bits_per_weight,
            memory=memory,
            context=context,
            backend=backend,
            device=device,
        )
    return conversion.convert(
        hub.resolve(source),
        Path(destination),
        to,
        search=search,
        adapter=merged,
        calibration=calibration,
        overwrite=overwrite,
        progress=progress,
    )


def plan_calibration(
    source: str | Path,
    to: str,
    text: bool | str | Path = True,
    *,
    bits_per_weight: float | None = None,
    memory: int | None = None,
    context: int | None = None,
    backend: str = "auto",
    device: str | None = None,
) -> Calibration:
    """What convert(source, ..., to, calibrate=text) computes with: the tokens of the text, memory and disk space.

    bits_per_weight, memory, context, backend, device: as for convert().
    Raises InvalidRequest for a format that is not calibrated, a text that cannot be read or a size that mixed widths
    cannot have, DoesNotFit if there is too little memory to calibrate.
    """
    path = None if isinstance(text, bool) else Path(text)
    checkpoint = checkpoints.open(hub.resolve(source))
    budget = _budget(checkpoint, bits_per_weight, memory, context)
    return _plan_calibration(checkpoint, to, path, budget, find_products(backend, device))


def _budget(
    checkpoint: Checkpoint, bits_per_weight: float | None, memory: int | None, context: int | None
) -> Budget | None:
    """The size of a result of mixed widths; None for a format's own widths. Raises InvalidRequest."""
    if bits_per_weight is not None and memory is not None:
        raise InvalidRequest("give bits_per_weight or memory, not both")
    if bits_per_weight is not None:
        parameters = sum(param.size for param in checkpoint.params)
        return Budget(int(bits_per_weight * parameters / 8), f"{bits_per_weight:g} bits per weight")
    if memory is None and context is not None:
        raise InvalidRequest("context says for what memory is: give memory, too")
    if memory is None:
        return None
    longest = checkpoint.config.max_position_embeddings
    context = min(PREFERRED_CONTEXT, longest) if context is None else context
    if not 1 <= context <= longest:
        raise InvalidRequest(f"context must be from 1 to {longest}, not {context}")
    reason = f"{memory / 1e9:g} GB of memory with {context} tokens of context"
    return Budget(weights_that_fit(checkpoint.config, memory, context), reason)


def _require_fit(plan: LoadPlan) -> None:
    """Raise DoesNotFit, with the format that would fit, if the plan needs more memory than there is."""
    checkpoint = plan.source
    if plan.memory.fits or not isinstance(checkpoint, Checkpoint):
        return
    sizes, context = sizes_in_other_formats(checkpoint), plan.request.max_context
    may_stay = mappable_by_format(checkpoint) if plan.backend == "mlx" else None
    best = recommend(checkpoint, plan.memory, sizes, context, may_stay)
    require_fit(plan.memory, plan.request.name, {best.format: best.size_bytes} if best else sizes)


def _fingerprint(plan: LoadPlan) -> str:
    """Everything that a computed prompt depends on: programs, weights, options, device and dtype."""
    request, memory, module = plan.request, plan.memory, plan.module
    device, dtype = module.device_name(request.device), module.dtype_name(request.device, request.dtype)
    where = (device, dtype, memory.chunk, memory.upcast_bytes > 0, request.custom_kernels)
    return repr((plan.versions(), plan.part.fingerprint(), request.quantize, request.kv_bits, request.speculate, where))
