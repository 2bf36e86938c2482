"""Make a small checkpoint with every quantization tool that is installed, open it, and compare every weight with the
tool's own decoding. The result is the table of mlx_gptoss/weights/README.md.

    python tests/weights/judge_tools.py [--only NAME ...] [--quick] [--check | --json]

--only: tools, or cases such as fp8-block. --quick: the first case of each row. --check leaves the README as it is, and
fails if the run disagrees with it (versions aside). --json prints what was found instead, and changes no file.

Each tool runs in a process of its own. Rows that a run does not make stay as they are, so a table can be made in
pieces; if all tools were to run, those that are not installed are marked "last tried". An exception while a checkpoint
is opened or run becomes that row's result, and the script fails after the other rows.

What a backend computes with and what `convert` writes comes from the program's own tables. A row counts only if both
backends compute, in float32, the logits of the tool's weights in float64 and then the tokens that these choose.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
from safetensors.numpy import load_file, save_file

import mlx_gptoss
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.backends.base import run_as
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.checkpoint import Checkpoint
from mlx_gptoss.weights.formats import WRITERS
from mlx_gptoss.weights.formats import gguf as gguf_format
from mlx_gptoss.weights.gguf_blocks import RENUMBERED
from mlx_gptoss.weights.tensor import MXFP4

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from judges import base

JUDGES = (  # the order of the table
    "transformers", "gpt_oss", "mlx_lm", "compressed_tensors", "bitsandbytes", "modelopt", "auto_round", "gptqmodel",
    "quark", "torchao", "gguf", "ggml", "peft",
)  # fmt: skip
README = Path(mlx_gptoss.__file__).parent / "weights/README.md"
BEGIN, END = "<!-- judged: begin -->", "<!-- judged: end -->"
HEAD = "| what the tool makes | tool | opens as | same values | mlx runs | cuda runs | written |"
IDS = np.random.default_rng(5).integers(2, base.CONFIG["vocab_size"], 20).tolist()  # longer than the window
TOKENS = 4
MAX_LOGIT_ERROR, MIN_MARGIN = 1e-4, 1e-3
ROUNDING = 1e-6  # of products and sums in float32 in another order
WRONG = ("no:", "wrong:", "failed:")  # beginnings of cells
LAST_TRIED, NOT_INSTALLED, NOT_TRIED = " (last tried)", "not installed", "not tried yet"


@dataclass(frozen=True)
class Found:
    """What was found of one row, as the cells of the table. The versions are not compared."""

    kind: str
    tool: str
    version: str
    cells: tuple[str, ...]  # opens as, same values, mlx runs, cuda runs, written

    @property
    def line(self) -> str:
        return f"| {' | '.join((self.kind, f'{self.tool} {self.version}', *self.cells))} |"


def load_judge(name: str) -> ModuleType:
    return import_module(f"judges.with_{name}")


# In the tool's process.


def make(judge: ModuleType, folder: Path, names: Sequence[str]) -> None:
    """Write each case's checkpoint to folder/CASE and the tool's decoding to folder/CASE.safetensors.

    Prints CASE when it is made. A case that fails leaves folder/CASE.error.
    """
    cases = {name: function for row in judge.ROWS for name, function in row.cases.items()}
    for name in names:
        try:
            weights = cases[name](folder / "source", folder / name)
            save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, _values(folder, name))
        except Exception:  # of somebody else's tool; it is shown, and the other cases go on
            (folder / f"{name}.error").write_text(traceback.format_exc())
        print(f"made {name}", flush=True)


def _values(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


# In this program's.


def judge_tool(name: str, folder: Path, cases: Sequence[str], say=print) -> Iterator[Found | str]:
    """Yield what was found of each row that has one of these cases, or a line on why nothing was.

    folder: has the source, and room for the checkpoints. say: is called with progress.
    """
    judge = load_judge(name)
    version = judge.version()
    if version is None:
        yield f"{judge.NAME}: {NOT_INSTALLED}"
        return
    folder = folder.resolve()
    words = [sys.executable, str(Path(__file__).resolve()), "--make", name, str(folder), *cases]
    one_thread = {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(  # in the folder, as tools leave logs where they run
            words, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | one_thread, cwd=folder
        )
        for line in process.stdout:
            if line.startswith("made "):
                say(f"{judge.NAME}: {line.strip()}")
    if process.wait():
        yield f"{judge.NAME} {version}: failed: {_last_line((folder / f'{name}.log').read_text())}"
        return
    for row in judge.ROWS:
        made = [case for case in row.cases if case in cases]
        if made:
            yield _judge_row(row, judge.NAME, version, folder, made, say)


def _judge_row(row: base.Row, tool: str, version: str, folder: Path, cases: list[str], say) -> Found | str:
    found: dict[tuple[str, ...], list[str]] = {}
    for case in cases:
        error = folder / f"{case}.error"
        if error.exists():
            return f"{tool} {version}: {case} is not made: {_last_line(error.read_text())}"
        started = time.monotonic()
        cells = judge_checkpoint(folder / case, load_file(_values(folder, case)), folder / "source")
        found.setdefault(cells, []).append(case)
        say(f"{tool}: {case}: {' | '.join(cells)} ({time.monotonic() - started:.1f} s)")
    if len(found) > 1:
        return f"{tool} {version}: the cases of {row.kind!r} differ: {found}"
    return Found(row.kind, tool, version, next(iter(found)))


def judge_checkpoint(path: Path, weights: base.Weights, source: Path) -> tuple[str, ...]:
    """The cells of a checkpoint (or of an adapter for `source`), given the tool's decoding of it."""
    is_adapter = (path / "adapter_config.json").exists()
    try:
        opened = checkpoint.open(source if is_adapter else path)
        name, same = ("an adapter", _merged(path, source, weights)) if is_adapter else (
            f"`{opened.format}`", _compare(opened, weights)
        )  # fmt: skip
    except GptOssError as error:
        return f"refused: {re.split(';|: ', str(error).replace('|', '/'))[0]}", "", "", "", "no"
    except Exception as error:
        return _failed(error), "", "", "", "no"
    runs = []
    for backend in BACKENDS:
        try:
            wrong = run(path, weights, backend, source if is_adapter else None)
        except Exception as error:
            wrong = _failed(error)
        runs.append(wrong or ("beside the weights" if is_adapter else runs_as(opened, backend)))
    return name, same, *runs, "no" if is_adapter else written(opened)


def _failed(error: Exception) -> str:
    """The cell for an exception, whose traceback goes to stderr."""
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}".replace("|", "/")


def _compare(opened: Checkpoint, weights: base.Weights) -> str:
    """The cell for how our values differ from the tool's, once rounded to the dtype in which the tool decodes."""
    return _same((codecs.dequantize(weight), weights[param.name]) for param, weight in opened.weights())


def _merged(path: Path, source: Path, weights: base.Weights) -> str:
    """As _compare, for the weights with the adapter inside, which `convert` rounds to bfloat16 once."""
    with tempfile.TemporaryDirectory() as folder:
        mlx_gptoss.convert(source, Path(folder) / "merged", to="bf16", adapter=path)
        for param, weight in checkpoint.open(Path(folder) / "merged").weights():
            if not np.allclose(codecs.dequantize(weight), weights[param.name], rtol=2**-8, atol=1e-6):
                return f"no: {param.name} differs"
    return "merged, to bfloat16's rounding"


def _same(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> str:
    worst, exact = 0.0, True
    for ours, theirs in pairs:
        ours = ours.astype(theirs.dtype)
        if ours.shape != theirs.shape:
            return f"no: {ours.shape} for {theirs.shape}"
        exact = exact and np.array_equal(ours, theirs)
        largest = float(np.abs(theirs.astype(np.float64)).max()) or 1.0
        difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max()
        worst = max(worst, float(difference) / largest)
    return "all bits" if exact else "yes, to rounding" if worst < ROUNDING else f"no: {worst:.0e} apart"


def run(path: Path, weights: base.Weights, backend: str, source: Path | None) -> str:
    """What is wrong with the logits and the greedy tokens, against the tool's weights in float64; "" if nothing is.

    source: the model, where `path` is an adapter.
    """
    tensors = base.as_tensors(weights)
    options = {"backend": backend, "device": "cpu", "dtype": "float32"}
    adapter = None if source is None else "judged"
    if adapter:
        options["adapters"] = {adapter: path}
    with mlx_gptoss.load(source or path, **options) as model:
        logits = model.logits(IDS, adapter)
        done = model.complete(
            IDS,
            max_tokens=TOKENS,
            sampling=mlx_gptoss.Sampling(temperature=0),
            **({"adapter": adapter} if adapter else {}),
        )
    expected = base.logits(tensors, [*IDS, *done.ids])
    wanted = expected[: len(IDS)]
    error = float((np.abs(logits - wanted).max(axis=-1) / np.abs(wanted).max(axis=-1)).max())
    if not error < MAX_LOGIT_ERROR:
        return f"wrong: {error:.0e} off"
    for scores, token in zip(expected[len(IDS) - 1 :], done.ids, strict=False):
        best = np.partition(scores, -2)[-2:]
        if best[1] - best[0] < MIN_MARGIN * np.abs(scores).max():
            break
        if scores.argmax() != token:
            return f"wrong: token {token} for {scores.argmax()}"
    return ""


def runs_as(opened: Checkpoint, backend: str) -> str:
    """The cell for the storage in which a backend computes with the quantized matrices, where it is not their own."""
    others = set()
    for param in opened.params:
        source = opened._binding.sources[param.name]
        if not param.is_matrix or (source.spec is None and not source.stored_name):
            continue
        if source.spec is None:
            others.add("float32")
        elif run_as(backend, source.spec) != source.spec or source.stored_name.upper() in RENUMBERED:
            others.add(f"{run_as(backend, source.spec).bits}-bit codes")
    return f"as {' and '.join(sorted(others))}" if others else "as stored"


def written(opened: Checkpoint) -> str:
    """The cell for whether `convert` writes this format; of GGUF, these types."""
    if opened.format != gguf_format.FAMILY:
        return "yes" if opened.format in WRITERS else "no"
    types = {"MXFP4", "F32", *gguf_format._REST.values()}
    stored = {info.blocks or info.dtype for info in opened.tensors.values()}
    return (
        "yes"
        if stored <= types and "MXFP4" in stored and opened.stored_as("layers.0.experts.up.weight")[0] == MXFP4
        else "no"
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


# The table.


def rows() -> Iterator[tuple[str, base.Row]]:
    """(module of the judge, row) in the order of the table."""
    for name in JUDGES:
        for row in load_judge(name).ROWS:
            yield name, row


def read_table(text: str) -> dict[tuple[str, str], Found]:
    """The rows of the README by (kind, tool)."""
    found = {}
    for line in text.partition(BEGIN)[2].partition(END)[0].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if len(cells) == HEAD.count(" | ") + 1 and line.strip() != HEAD:
            tool, _, version = cells[1].removesuffix(LAST_TRIED).rpartition(" ")
            found[cells[0], tool] = Found(cells[0], tool, version, tuple(cells[2:]))
    return found


def updated(text: str, found: Sequence[Found], whole: bool) -> str:
    """The README with these rows in its table. whole: every tool was tried, so rows without a result are marked."""
    old, new = read_table(text), {(each.kind, each.tool): each for each in found}
    lines = [HEAD, "|---|---|---|---|---|---|---|"]
    for name, row in rows():
        key = row.kind, load_judge(name).NAME
        if key in new:
            lines.append(new[key].line)
        elif key in old:
            line = old[key].line
            marked = f"{old[key].tool} {old[key].version}{LAST_TRIED}"
            was_marked = f"| {marked} |" in text
            lines.append(
                line.replace(f"{old[key].tool} {old[key].version}", marked, 1) if whole or was_marked else line
            )
        else:
            lines.append(Found(row.kind, key[1], "?", (NOT_TRIED, "", "", "", "")).line)
    before, rest = text.split(BEGIN)
    return "\n".join([before + BEGIN, "", *lines, "", END]) + rest.split(END)[1]


def disagreements(text: str, found: Sequence[Found]) -> list[str]:
    """One line for each row of the run that the README has otherwise."""
    old = read_table(text)
    lines = []
    for each in found:
        known = old.get((each.kind, each.tool))
        if known is None or known.cells != each.cells:
            was = "no row" if known is None else " | ".join(known.cells)
            lines.append(
                f"{each.tool} {each.version}, {each.kind}: found {' | '.join(each.cells)}; the README has {was}"
            )
    return lines


def chosen_cases(only: Sequence[str], quick: bool) -> dict[str, list[str]]:
    """The cases to make, by judge."""
    found: dict[str, list[str]] = {}
    for name, row in rows():
        cases = list(row.cases)[:1] if quick else list(row.cases)
        keep = [c for c in cases if not only or c in only or name in only or load_judge(name).NAME in only]
        found.setdefault(name, []).extend(keep)
    return {name: cases for name, cases in found.items() if cases}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder that keeps the checkpoints")
    parser.add_argument("--make", nargs="+", metavar="WORD", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        name, folder, *cases = options.make
        make(load_judge(name), Path(folder), cases)
        return 0
    chosen = chosen_cases(options.only, options.quick)
    if not chosen:
        parser.error(f"no tool or case is called {' or '.join(options.only)}; tools: {', '.join(JUDGES)}")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        work = options.keep or Path(folder)
        say(f"the small model is in {work}; cases: {sum(map(len, chosen.values()))}")
        base.write_source(work / "source")
        for name, cases in chosen.items():
            for each in judge_tool(name, work, cases, say):
                if isinstance(each, Found):
                    found.append(each)
                elif each.endswith(NOT_INSTALLED):
                    say(each)
                else:
                    failed.append(each)
    text = README.read_text("utf-8")
    wrong = [f"{each.tool}, {each.kind}: {cell}" for each in found for cell in each.cells if cell.startswith(WRONG)]
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    elif options.check:
        wrong += disagreements(text, found)
    else:
        README.write_text(updated(text, found, not options.only), "utf-8")
        say(f"{len(found)} rows written to {README}")
    for line in (*failed, *wrong):
        say(f"error: {line}")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
