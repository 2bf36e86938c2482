"""Convert a checkpoint to another format: plan, write, verify, rename.

Everything about the result except its values is planned from headers. The weights then stream through in chunks of
about CHUNK_VALUES values (one expert of 20b), one chunk per worker thread: each chunk is read from the mapped source,
encoded, written to its place and released. The memory needed is thus `Report.working_bytes`, whatever the size of the
model, plus at most the mapped pages of one parameter of the source.

The result grows in a hidden folder next to the destination, is read back, and is renamed at the end, so the destination
only ever appears complete. After an interruption the complete shards stay in the hidden folder, and the same conversion
continues after them (journal.py).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..errors import CheckpointError, GptOssError, InvalidRequest
from ..machine import cores
from . import checkpoint as checkpoints
from . import gguf_writing
from .adapters import open_adapter
from .adapters.merged import Merged
from .checkpoint import CheckpointLike
from .conversion_plan import ConversionPlan, plan_conversion
from .files import child
from .formats import gguf_metadata, recipe_of
from .formats.base import Encoder, Unit
from .journal import Workspace, open_workspace, recover
from .tensor import Spec, Weight
from .writer import SHARD_BYTES, Writer, write_text

Progress = Callable[[int, int, str], None]  # bytes done, bytes in total, what is being done

CHUNK_VALUES = 2**23
BYTES_PER_VALUE = 12  # memory per value of a chunk: decoded blocks, the encoded rows and their rearranged copy
MAX_WORKERS = 8
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


class Calibration(Protocol):
    """Chooses the codes of a checkpoint before it is written (calibration/).

    identity: everything that its result depends on but the source and the format, as JSON. memory_bytes: upper bound
    of the memory that it needs; disk_bytes: of the disk space, without the result's own. is_mixed: whether widths()
    chooses any.
    folder: for what is finished; it outlives an interruption.
    """

    @property
    def identity(self) -> Any: ...
    @property
    def is_mixed(self) -> bool: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def disk_bytes(self) -> int: ...
    def widths(self, source: CheckpointLike, folder: Path, progress: Progress) -> Mapping[str, Spec]:
        """Specs of single matrices by name, as for plan_conversion. progress: called with matrices measured, matrices
        in total and what is being done."""

    def run(
        self, source: CheckpointLike, widths: Mapping[str, Spec], folder: Path, progress: Progress
    ) -> CheckpointLike:
        """The checkpoint with the chosen codes. progress: called with parameters done, parameters in total and what is
        being done."""


@dataclass(frozen=True)
class Report:
    """The result of a conversion.

    source, destination: the folders.
    source_format, format: the names of their formats.
    source_bytes, bytes: the sizes of all their tensors.
    tensors: number of tensors in the result.
    parameters: number of weights.
    seconds: duration of this run.
    resumed_bytes: part of the result that an interrupted run had left.
    working_bytes: upper bound of the memory used, without the mapped pages of the source.
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


def convert(
    source: Path | str,
    destination: Path | str,
    to: str = "mlx-4bit",
    *,
    search: str | None = None,
    adapter: Path | str | None = None,
    calibration: Calibration | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the checkpoint `source` (a folder or a GGUF file) to the folder `destination` in the format `to`.

    Weights that are stored as the target stores them are copied bit for bit; others are decoded exactly and quantized
    once. If an earlier run was interrupted, the same call continues it.

    search: None quantizes as the format's own tools do. "mse" searches for the scales and biases of the least squared
        error of 4-bit affine weights, in the same storage (search.py).
    adapter: the folder of a LoRA adapter to merge, into bf16 alone.
    calibration: chooses the codes, in the same storage; not together with search.
    overwrite: replace an existing checkpoint, which stays in place until the new one is complete.
    progress: called in this thread with the bytes done, the bytes in total and "writing", "verifying" or what is
        being calibrated.
    Raises CheckpointError for a source that cannot be read or a format that cannot be written; GptOssError if the
    destination exists or overlaps the source, if the disk is full or if writing fails.
    """
    started = time.perf_counter()
    recipe_of(to, search)
    if calibration is not None and search is not None:
        raise InvalidRequest("calibration searches the scales by itself: leave out --search (search= in Python)")
    if adapter is not None and to != "bf16":
        raise InvalidRequest(
            f"an adapter is merged into bf16 alone, not {to}: most of its changes are smaller than half a step of "
            "quantized weights and would be lost. Apply it at run time (--adapter of generate, serve, ...), or "
            "merge it into bf16 and quantize that"
        )
    target = _check_destination(Path(source), Path(destination), overwrite)
    checkpoint = checkpoints.open(source)
    weights: CheckpointLike = checkpoint
    if adapter is not None:
        weights = Merged(checkpoint, open_adapter(adapter, checkpoint.config))
    plan = plan_conversion(weights, to, search)
    companions = _companions(checkpoint.tokenizer_folder, checkpoint.embedded_files())
    plan, resumed_bytes, working_bytes = _write(weights, target, to, plan, search, calibration, progress, companions)
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
        resumed_bytes=resumed_bytes,
        working_bytes=working_bytes,
    )


def write_checkpoint(source: CheckpointLike, destination: Path, to: str, *, progress: Progress | None = None) -> None:
    """Write weights that are not a checkpoint on disk, such as synthetic ones, to a new folder, without a tokenizer.

    Raises GptOssError if the destination exists; else as `convert`.
    """
    if destination.exists():
        raise GptOssError(f"{destination} exists already; choose another destination")
    plan = plan_conversion(source, to)
    _write(source, Path(os.path.abspath(destination)), to, plan, None, None, progress, {})


def _write(
    source: CheckpointLike,
    target: Path,
    to: str,
    plan: ConversionPlan,
    search: str | None,
    calibration: Calibration | None,
    progress: Progress | None,
    companions: Mapping[str, bytes],
) -> tuple[ConversionPlan, int, int]:
    """Carry out a plan. companions: the tokenizer and the like, name -> content.

    Returns (the plan with the widths that calibration chose, bytes that an earlier run had left, upper bound of the
    working memory in bytes).
    """
    report = progress or (lambda done, total, what: None)
    with open_workspace(target, _identity(source, plan, search, calibration)) as workspace:
        if calibration is not None:
            _check_free_space(target.parent, plan.size_bytes + calibration.disk_bytes)
            source, plan = _calibrated(source, to, calibration, workspace, plan, report)
        gguf = None
        if plan.is_gguf:
            entries = gguf_metadata.entries(plan.config, companions, int(plan.metadata["file_type"]), target.name)
            gguf = partial(gguf_writing.layout, entries)
        writer = Writer(workspace.folder, plan.tensors, plan.metadata, SHARD_BYTES, workspace, gguf)
        _check_free_space(target.parent, plan.size_bytes - writer.resumed_bytes)
        working_bytes = _write_tensors(source, plan, writer, report)
        if not plan.is_gguf:
            for name, data in companions.items():
                write_text(workspace.folder / name, data)
            for name, content in {**plan.extra_files, "config.json": plan.config}.items():
                write_text(workspace.folder / name, json.dumps(content, indent=2) + "\n")
        _check_result(
            workspace, {"gguf"} if plan.is_gguf else {to, "mlx"} if calibration and calibration.is_mixed else {to}, plan
        )
        workspace.install()
    return plan, writer.resumed_bytes, max(working_bytes, calibration.memory_bytes if calibration else 0)


def _calibrated(
    source: CheckpointLike,
    to: str,
    calibration: Calibration,
    workspace: Workspace,
    plan: ConversionPlan,
    progress: Progress,
) -> tuple[CheckpointLike, ConversionPlan]:
    """Calibrate in the workspace, and plan again if that chooses widths. progress: gets bytes of the result."""

    def part_done(done: int, total: int, what: str) -> None:
        progress(plan.size_bytes * done // total, plan.size_bytes, what)

    widths = calibration.widths(source, workspace.calibration, part_done)
    if widths:
        plan = plan_conversion(source, to, widths=widths)
    return calibration.run(source, widths, workspace.calibration, part_done), plan


def _identity(
    checkpoint: CheckpointLike, plan: ConversionPlan, search: str | None, calibration: Calibration | None
) -> dict[str, Any]:
    """Everything that the bytes of the result depend on, as JSON."""
    try:
        program = metadata.version("mlx-gptoss")
    except metadata.PackageNotFoundError:
        program = "not installed"
    return {
        "program": program,
        "source": checkpoint.fingerprint(),
        "plan": plan.digest,
        "search": search,
        "calibration": None if calibration is None else calibration.identity,
        "shard_bytes": SHARD_BYTES,
    }


def _write_tensors(checkpoint: CheckpointLike, plan: ConversionPlan, writer: Writer, progress: Progress) -> int:
    """Write all tensors and read them back; returns the upper bound of the working memory in bytes."""
    workers = min(MAX_WORKERS, cores())
    pool = ThreadPoolExecutor(workers)
    try:
        done = writer.resumed_bytes
        for written in _run_jobs(pool, workers, _chunk_jobs(checkpoint, plan.units, writer)):
            done += written
            progress(done, plan.size_bytes, "writing")
        writer.finish()
        done = 0
        for length in _run_jobs(pool, workers, writer.verification_jobs()):
            done += length
            progress(done, plan.size_bytes, "verifying")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        writer.close()
    largest_chunk = max(_rows_per_chunk(unit) * unit.values // unit.rows for unit in plan.units)
    return workers * largest_chunk * BYTES_PER_VALUE


def _rows_per_chunk(unit: Unit) -> int:
    return min(unit.rows, max(1, CHUNK_VALUES * unit.rows // unit.values))


def _chunk_jobs(checkpoint: CheckpointLike, units: Iterable[Unit], writer: Writer) -> Iterator[Callable[[], int]]:
    """One function per chunk that is not written yet, in order. It writes the chunk and returns the bytes written."""
    for unit in units:
        if writer.is_written([info.name for info in unit.tensors]):
            continue
        weights = [checkpoint.read(param.name) for param in unit.params]
        encode = unit.encode(weights)
        step = _rows_per_chunk(unit)
        for start in range(0, unit.rows, step):
            stop = min(start + step, unit.rows)
            parts = [weight[start:stop] for weight in weights]
            yield partial(_write_chunk, writer, unit, encode, range(start, stop), checkpoint, parts)


def _write_chunk(
    writer: Writer, unit: Unit, encode: Encoder, rows: range, checkpoint: CheckpointLike, parts: Sequence[Weight]
) -> int:
    """Write some rows of a unit, then release `parts`, the rows of the source that they were made from."""
    try:
        written = sum(writer.write(*piece) for piece in encode(rows.start, rows.stop))
    except CheckpointError as error:
        raise CheckpointError(f"{unit.params[0].name}: {error}") from error
    for part in parts:
        checkpoint.release(part)
    return written


def _run_jobs(pool: ThreadPoolExecutor, workers: int, jobs: Iterator[Callable[[], int]]) -> Iterator[int]:
    """Run jobs in the pool and yield their results as they finish. At most `workers` + 1 jobs exist at a time."""
    pending: set[Future[int]] = {pool.submit(job) for job in islice(jobs, workers + 1)}
    while pending:
        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in finished:
            yield future.result()
        pending |= {pool.submit(job) for job in islice(jobs, len(finished))}


def _companions(source: Path, embedded: Mapping[str, str] | None) -> dict[str, bytes]:
    """The tokenizer and the other files that accompany weights, name -> content.

    They are those of the folder `source`, unless a GGUF file has them inside: `embedded`, name -> text.
    """
    if embedded is not None:
        return {name: text.encode("utf-8", "surrogatepass") for name, text in embedded.items()}
    return {name: child(source, name).read_bytes() for name in COMPANION_FILES if (source / name).exists()}


def _check_destination(source: Path, destination: Path, overwrite: bool) -> Path:
    """The destination as an absolute path. Raises GptOssError if it must not be written."""
    target, origin = Path(os.path.abspath(destination)), source.resolve()
    recover(target)
    real = target.resolve()
    if real == origin or real.is_relative_to(origin) or origin.is_relative_to(real):
        raise GptOssError(f"{destination} is, contains or is inside the source; choose a folder outside it")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise GptOssError(f"{destination} exists and is not a folder; choose another destination")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise GptOssError(
                f"{destination} exists already; choose another destination, or replace it with --overwrite "
                "(overwrite=True in Python)"
            )
        if not (target / "config.json").exists() and not (target / "model.gguf").exists():
            raise GptOssError(f"{destination} is not a checkpoint, so it is not overwritten; remove it first")
    return target


def _check_free_space(parent: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(parent).free
    if needed_bytes + 2**20 > free_bytes:
        raise GptOssError(
            f"the result takes {needed_bytes / 1e9:.2f} GB but only {free_bytes / 1e9:.2f} GB are free in {parent}; "
            "free some space or choose another disk"
        )


def _check_result(workspace: Workspace, names: set[str], plan: ConversionPlan) -> None:
    """Open the result as any reader would. Its bytes have been compared already. names: of the formats it may have."""
    found = checkpoints.open(workspace.folder)
    if found.format not in names or found.size_bytes != plan.size_bytes:
        raise CheckpointError(
            f"what was written as {' or '.join(sorted(names))} reads back as {found.format}, {found.size_bytes} bytes; "
            "please report this"
        )
