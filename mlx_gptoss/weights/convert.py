"""Write a checkpoint in another format: plan, stream, verify, rename.

Everything about the result but its values is planned from headers. Then the weights pass through in chunks of about
CHUNK values (one expert of 20b), each read from the mapped source, re-coded, written to its place and let go, one
chunk a worker thread. So the memory needed is `Report.working_bytes`, whatever the size of the model, beside at most
one parameter's pages of the source. The result grows in a hidden folder beside the destination, is read back, and is
renamed at the end. After an interruption only shards that are whole stay there, for the same conversion to go on after
them (journal.py); the destination itself only ever appears whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import SWIGLU_ALPHA, published
from ..errors import CheckpointError, GptOssError
from ..machine import cores
from . import checkpoint as checkpoints
from . import codecs
from .checkpoint import Readable
from .formats import recipe_of
from .formats.base import Encoder, Recipe, Unit
from .journal import Workspace, recover, workspace
from .safetensors import TensorInfo
from .tensor import Dense, Weight
from .writer import SHARD_BYTES, Writer, write_text

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done

CHUNK = 2**23
BYTES_A_VALUE = 12  # of a chunk in work: decoded blocks, the re-coded rows, and their rearranged copy
MAX_WORKERS = 8
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    resumed_bytes: of the result, what an interrupted run had left. working_bytes: the memory bound that it kept, beside
    the source's mapped pages.
    """

    source: Path
    destination: Path
    source_format: str
    format: str
    source_bytes: int
    bytes: int
    tensors: int
    parameters: int
    seconds: float
    resumed_bytes: int
    working_bytes: int


@dataclass(frozen=True)
class Plan:
    """All of the result but the values."""

    units: tuple[Unit, ...]
    config: Mapping[str, Any]
    extra_files: Mapping[str, Any]  # JSON files beside config.json
    metadata: Mapping[str, str]

    @property
    def tensors(self) -> list[TensorInfo]:
        return [info for unit in self.units for info in unit.tensors]

    @property
    def size_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors)

    @property
    def digest(self) -> str:
        """SHA-256 of all that is planned."""
        tensors = [(info.name, info.dtype, info.shape) for info in self.tensors]
        text = json.dumps([tensors, self.config, self.extra_files, self.metadata], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def convert(
    source: Path | str,
    destination: Path | str,
    to: str = "mlx-4bit",
    *,
    search: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the checkpoint in the folder `source` to the folder `destination` in the format `to`.

    What is stored as the target stores it stays so, bit for bit; the rest is decoded exactly and quantized once.
    search: None quantizes as the reference tools do; "mse" looks, for 4-bit affine weights, for scales and biases of
    least squared error, in the same storage (search.py). `progress` is called in this thread. With `overwrite`, an old
    checkpoint at the destination stays until the new one is whole. A run that was interrupted is continued by the same
    call. Raises CheckpointError for a source that cannot be read or an unknown format, GptOssError for a destination in
    the way, a full disk or a write that fails.
    """
    started = time.perf_counter()
    recipe_of(to, search)
    target = _destination(Path(source), Path(destination), overwrite)
    checkpoint = checkpoints.open(source)
    plan = make_plan(checkpoint, to, search)
    embedded = checkpoint.embedded() if checkpoint.embedded else None
    companions = partial(_companions, checkpoint.tokenizer_folder, embedded)
    resumed, working = _write(checkpoint, target, to, plan, search, progress, companions)
    return Report(
        source=checkpoint.folder,
        destination=target,
        source_format=checkpoint.format,
        format=to,
        source_bytes=checkpoint.size_bytes,
        bytes=plan.size_bytes,
        tensors=len(plan.tensors),
        parameters=sum(param.size for param in checkpoint.params),
        seconds=time.perf_counter() - started,
        resumed_bytes=resumed,
        working_bytes=working,
    )


def write_checkpoint(source: Readable, destination: Path, to: str, *, progress: Progress | None = None) -> None:
    """Write what is no checkpoint on disk, such as weights made up for a benchmark, to a folder that does not exist
    yet. Without a tokenizer; else as convert() does."""
    if destination.exists():
        raise GptOssError(f"{destination} exists already; choose another destination")
    plan = make_plan(source, to)
    _write(source, Path(os.path.abspath(destination)), to, plan, None, progress, lambda folder: None)


def _write(
    source: Readable,
    target: Path,
    to: str,
    plan: Plan,
    search: str | None,
    progress: Progress | None,
    companions: Callable[[Path], None],
) -> tuple[int, int]:
    """All of convert() once the plan is made. companions: writes what belongs beside weights into a folder. Returns the
    bytes that an earlier run had left and the bound on working memory."""
    with workspace(target, _identity(source, plan, search)) as space:
        writer = Writer(space.folder, plan.tensors, plan.metadata, SHARD_BYTES, space)
        _check_space(target.parent, plan.size_bytes - writer.kept)
        working = _stream(source, plan, writer, progress or (lambda done, total, what: None))
        companions(space.folder)
        for name, content in {**plan.extra_files, "config.json": plan.config}.items():
            write_text(space.folder / name, json.dumps(content, indent=2) + "\n")
        _verify(space, to, plan)
        space.install()
    return writer.kept, working


def make_plan(checkpoint: Readable, to: str, search: str | None = None) -> Plan:
    """Names, dtypes and shapes of the result, and its config.json. Of the source, only vectors are read."""
    form, recipe = recipe_of(to, search)
    config = checkpoint.config
    if not config.eos_token_id:  # `original/config.json` has none
        config = replace(config, eos_token_id=checkpoint.stop_ids)
    content = published(config) | form.config_entries(to, checkpoint.params)
    if not config.eos_token_id:
        del content["eos_token_id"]
    if config.swiglu_alpha != SWIGLU_ALPHA:
        content["swiglu_alpha"] = config.swiglu_alpha
    units = form.units(to, checkpoint.params, _vector_dtypes(checkpoint) | _scale_dtypes(checkpoint, recipe))
    extra = form.extra_files(to, checkpoint.params)
    return Plan(tuple(units), content, extra, {"format": "mlx" if form.family == "mlx" else "pt"})


def _vector_dtypes(checkpoint: Readable) -> dict[str, str]:
    """Norms, sinks and biases become bfloat16 where that is exact, else stay wider: float32."""
    found = {}
    for param in checkpoint.params:
        if not param.is_matrix:
            weight = checkpoint.read(param.name)
            exact = codecs.dequantize(Dense(codecs.to_bfloat16(weight))) == codecs.dequantize(weight)
            found[param.name] = "BF16" if exact.all() else "F32"
    return found


def _scale_dtypes(checkpoint: Readable, recipe: Recipe) -> dict[str, str]:
    """Float scales of matrices that are stored as the target stores them stay as they are."""
    found = {}
    for param in checkpoint.params:
        spec, dtype = checkpoint.stored_as(param.name)
        if param.is_matrix and dtype is not None and spec == recipe[param.role][1]:
            found[param.name] = dtype
    return found


def _identity(checkpoint: Readable, plan: Plan, search: str | None) -> dict[str, Any]:
    """All that the bytes of the result depend on, as JSON."""
    try:
        program = metadata.version("mlx-gptoss")
    except metadata.PackageNotFoundError:
        program = "not installed"
    return {
        "program": program,
        "source": checkpoint.fingerprint(),
        "plan": plan.digest,
        "search": search,
        "shard_bytes": SHARD_BYTES,
    }


def _stream(checkpoint: Readable, plan: Plan, writer: Writer, progress: Progress) -> int:
    """Write all tensors and read them back; returns the bound on working memory, in bytes."""
    workers = min(MAX_WORKERS, cores())
    pool = ThreadPoolExecutor(workers)
    try:
        done = writer.kept
        for written in _in_parallel(pool, workers, _jobs(checkpoint, plan.units, writer)):
            done += written
            progress(done, plan.size_bytes, "writing")
        writer.finish()
        done = 0
        for length in _in_parallel(pool, workers, writer.checks()):
            done += length
            progress(done, plan.size_bytes, "verifying")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        writer.close()
    largest = max(_rows_a_chunk(unit) * unit.values // unit.rows for unit in plan.units)
    return workers * largest * BYTES_A_VALUE


def _rows_a_chunk(unit: Unit) -> int:
    return min(unit.rows, max(1, CHUNK * unit.rows // unit.values))


def _jobs(checkpoint: Readable, units: Iterable[Unit], writer: Writer) -> Iterator[Callable[[], int]]:
    """The chunks in order of all units that are not written yet, each a function that writes one and returns the bytes
    written."""
    for unit in units:
        if writer.is_written([info.name for info in unit.tensors]):
            continue
        weights = [checkpoint.read(param.name) for param in unit.params]
        encode = unit.encode(weights)
        step = _rows_a_chunk(unit)
        for start in range(0, unit.rows, step):
            stop = min(start + step, unit.rows)
            parts = [codecs.rows(weight, start, stop) for weight in weights]
            yield partial(_write_chunk, writer, unit, encode, range(start, stop), checkpoint, parts)


def _write_chunk(
    writer: Writer, unit: Unit, encode: Encoder, rows: range, checkpoint: Readable, parts: Sequence[Weight]
) -> int:
    """Write some rows of a unit, then let go of the `parts` of the source that they came from."""
    try:
        written = sum(writer.write(*piece) for piece in encode(rows.start, rows.stop))
    except CheckpointError as error:
        raise CheckpointError(f"{unit.params[0].name}: {error}") from error
    for part in parts:
        checkpoint.release(part)
    return written


def _in_parallel(pool: ThreadPoolExecutor, workers: int, jobs: Iterator[Callable[[], int]]) -> Iterator[int]:
    """Run jobs, few in flight at a time, yielding results as they come."""
    pending: set[Future[int]] = {pool.submit(job) for job in islice(jobs, workers + 1)}
    while pending:
        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in finished:
            yield future.result()
        pending |= {pool.submit(job) for job in islice(jobs, len(finished))}


def _companions(source: Path, embedded: Mapping[str, str] | None, folder: Path) -> None:
    """Copy the tokenizer and what else belongs beside weights, or write those that a GGUF file had inside."""
    for name, text in (embedded or {}).items():
        write_text(folder / name, text)
    for name in COMPANIONS:
        if embedded is None and (source / name).exists():
            (folder / name).write_bytes(checkpoints.child(source, name).read_bytes())


def _verify(space: Workspace, to: str, plan: Plan) -> None:
    """Open the result as any reader would; its bytes have been compared already."""
    found = checkpoints.open(space.folder)
    if found.format != to or found.size_bytes != plan.size_bytes:
        raise CheckpointError(
            f"what was written as {to} reads back as {found.format}, {found.size_bytes} bytes; please report this"
        )


def _destination(source: Path, destination: Path, overwrite: bool) -> Path:
    """The folder to write, made absolute. Refuses what is in the way."""
    target, origin = Path(os.path.abspath(destination)), source.resolve()
    recover(target)
    real = target.resolve()
    if real == origin or real.is_relative_to(origin) or origin.is_relative_to(real):
        raise GptOssError(f"{destination} is, holds or lies in the source; choose a folder beside it")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise GptOssError(f"{destination} exists and is not a folder; choose another destination")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise GptOssError(
                f"{destination} exists already; choose another destination, or replace it with --overwrite "
                "(overwrite=True in Python)"
            )
        if not (target / "config.json").exists():
            raise GptOssError(f"{destination} is not a checkpoint, so it is not overwritten; remove it first")
    return target


def _check_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if needed + 2**20 > free:
        raise GptOssError(
            f"the result takes {needed / 1e9:.2f} GB but only {free / 1e9:.2f} GB are free in {parent}; "
            "free some space or choose another disk"
        )
