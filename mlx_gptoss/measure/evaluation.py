"""Evaluate checkpoints on a text: their perplexity, and the divergence of their predictions from a reference's.

`<|endoftext|>` (with the line break after it) ends a document; a model sees one document at a time. Every token of a
document except the first is predicted once: from all earlier tokens of the document if they fit in the context, else
from more than half a context (windows overlap by half). All numbers are over these predictions.

Memory: one model at a time, the logits of one window (float32 [context, V], by default under 1 GB), and a few rows of
them in float64. A reference's logits are kept in a temporary file, 4 V bytes per prediction.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import api
from ..calibration.divergence import kl_divergence as kl_divergence
from ..calibration.divergence import log_softmax as log_softmax
from ..errors import CheckpointError, GptOssError, InvalidRequest
from ..loading.memory import gigabytes
from ..tokenizer import Tokenizer
from .passages import Score, Window, places, read_documents, windows
from .results import Divergence as Divergence
from .results import Doubles
from .results import Evaluation as Evaluation

if TYPE_CHECKING:
    from ..weights.checkpoint import Checkpoint

Source = str | Path | None  # a model, as for load()
Progress = Callable[[int, int, str], None]  # predictions done, predictions in total, name of the running model
Logits = NDArray[np.float32]

BUNDLED_TEXT = api.NANO / "eval.txt"  # written by examples/tools/nano_eval_text.py
WINDOW_BYTES = 10**9
MAX_WINDOW = 2048
MAX_FLOAT64_VALUES = 2**20  # logits converted to float64 at once


def evaluate(
    *models: Source,
    against: str | Path | Sequence[str | Path] = (),
    text: str | None = None,
    score: Score = "all",
    context: int | None = None,
    max_tokens: int | None = None,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    kv_bits: int | None = None,
    adapter: str | Path | None = None,
    adapter_name: str | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, ...]:
    """Perplexity of each model on a text and, with `against`, its divergence from each reference.

    models, against: folders or hub ids; no model is the bundled one. All need the same vocabulary.
    text: special tokens in it are encoded as such. None is a sample of the tasks that the bundled model was trained on,
        with conversations that it was not trained on; it says little about other models.
    score: "all", the default, scores every token. "replies" scores the assistant's messages after the last message of
        another role in each document, and needs a text in Harmony.
    context: tokens; the default is the largest power of two, up to 2048, that keeps a window's logits under 1 GB.
    max_tokens: stop after this many predictions.
    backend, device, dtype: as for load(). kv_bits: as for load(), for the models but not for the references.
    adapter: a LoRA adapter, a folder or a hub id, that the models run with, but not the references. adapter_name: of it
        in the results; None is the folder's.
    progress: called as progress(predictions done, predictions in total, name of the running model).

    Runs each reference once, then each model once. Raises InvalidRequest for a text with nothing to predict or
    different vocabularies, GptOssError for too little disk space or logits that are not finite, and load()'s errors.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, not {max_tokens}")
    named = None if adapter is None else (adapter_name or Path(adapter).resolve().name, adapter)
    candidates = [_Candidate.open(model, kv_bits, named) for model in models or (None,)]
    references = [_Candidate.open(one) for one in ([against] if isinstance(against, (str, Path)) else against)]
    _require_one_vocabulary([*references, *candidates])
    config = candidates[0].checkpoint.config
    positions = min(c.checkpoint.config.max_position_embeddings for c in (*references, *candidates))
    context = _context(context, config.vocab_size, positions)
    documents = read_documents(
        BUNDLED_TEXT.read_text(encoding="utf-8") if text is None else text,
        candidates[0].tokenizer,
        score,
    )
    run = _Evaluator(
        tuple(windows(documents, context, max_tokens)),
        context,
        config.vocab_size,
        {"backend": backend, "device": device, "dtype": dtype},
    )
    return run.evaluate(candidates, references, progress or (lambda done, total, model: None))


def _context(wanted: int | None, vocab: int, longest: int) -> int:
    if wanted is None:
        fitting = max(1, WINDOW_BYTES // (4 * vocab))
        return min(MAX_WINDOW, longest, 1 << fitting.bit_length() - 1)
    if not 1 <= wanted <= longest:
        raise InvalidRequest(f"the context must be from 1 to the model's {longest} tokens, not {wanted}")
    return wanted


# ---- the models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint to run, with its headers read. adapter: name and path."""

    source: Source
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    kv_bits: int | None
    adapter: tuple[str, str | Path] | None

    @classmethod
    def open(
        cls, source: Source, kv_bits: int | None = None, adapter: tuple[str, str | Path] | None = None
    ) -> _Candidate:
        checkpoint = api.open_checkpoint(source)
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            raise CheckpointError(f"{source} has no tokenizer.json: copy it there from the model's repository")
        return cls(source, checkpoint, tokenizer, kv_bits, adapter)

    @property
    def name(self) -> str:
        return "the bundled model" if self.source is None else str(self.source)


def _require_one_vocabulary(candidates: Sequence[_Candidate]) -> None:
    first, *others = candidates
    for other in others:
        if not _same_vocabulary(first, other):
            raise InvalidRequest(
                f"{first.name} and {other.name} have different vocabularies; only the predictions of checkpoints of "
                "one model can be compared"
            )


def _same_vocabulary(a: _Candidate, b: _Candidate) -> bool:
    return (
        a.checkpoint.config.vocab_size == b.checkpoint.config.vocab_size
        and a.tokenizer.vocab_size == b.tokenizer.vocab_size
        and a.tokenizer.specials == b.tokenizer.specials
        and all(a.tokenizer.token_bytes(id) == b.tokenizer.token_bytes(id) for id in range(a.tokenizer.vocab_size))
    )


@dataclass(frozen=True)
class _Reference:
    """The results of a reference: its own numbers, its most likely tokens [N], and the file with its logits."""

    evaluation: Evaluation
    top: NDArray[np.int64]
    logits: _LogitsFile


class _LogitsFile:
    """A file of raw logits, float32 [N, V], written in order and read by row."""

    def __init__(self, file: IO[bytes], vocab: int) -> None:
        self._file = file
        self._vocab = vocab

    def append(self, rows: Logits) -> None:
        self._file.write(np.ascontiguousarray(rows).data)

    def read(self, rows: slice) -> Logits:
        row_bytes = 4 * self._vocab
        self._file.seek(rows.start * row_bytes)
        data = self._file.read((rows.stop - rows.start) * row_bytes)
        return np.frombuffer(data, np.float32).reshape(-1, self._vocab)


class _Evaluator:
    """Runs the references and the models of one evaluate() over the same windows."""

    def __init__(self, windows: Sequence[Window], context: int, vocab: int, options: dict[str, Any]) -> None:
        """options: backend, device and dtype, as for load()."""
        self._windows = windows
        self._context = context
        self._vocab = vocab
        self._options = options
        self._targets = np.array([id for window in windows for id in window.targets])
        self._places = places(windows)

    def evaluate(
        self, candidates: Sequence[_Candidate], references: Sequence[_Candidate], progress: Progress
    ) -> tuple[Evaluation, ...]:
        self._require_disk(len(references))
        total = len(self._targets) * (len(candidates) + len(references))

        def report(models_before: int, model: _Candidate) -> Callable[[int], None]:
            return lambda done: progress(models_before * len(self._targets) + done, total, model.name)

        with ExitStack() as stack:
            recorded = []
            for index, reference in enumerate(references):
                file = stack.enter_context(tempfile.TemporaryFile(prefix="mlx-gptoss-"))
                recorded.append(self._record(reference, _LogitsFile(file, self._vocab), report(index, reference)))
            return tuple(
                self._compare(candidate, recorded, report(index, candidate))
                for index, candidate in enumerate(candidates, len(references))
            )

    def _record(self, reference: _Candidate, file: _LogitsFile, report: Callable[[int], None]) -> _Reference:
        """Run a reference and write its logits to the file."""
        nll, top = np.empty(len(self._targets)), np.empty(len(self._targets), np.int64)
        for span, rows in self._predictions(reference, report):
            nll[span], top[span] = self._nll_rows(span, log_softmax(rows)), rows.argmax(-1)
            file.append(rows)
        return _Reference(self._evaluation(reference, nll, top), top, file)

    def _compare(
        self, candidate: _Candidate, references: Sequence[_Reference], report: Callable[[int], None]
    ) -> Evaluation:
        """Run a model and compare its predictions with each reference's."""
        nll, top = np.empty(len(self._targets)), np.empty(len(self._targets), np.int64)
        kl = np.empty((len(references), len(self._targets)))
        for span, rows in self._predictions(candidate, report):
            log_q = log_softmax(rows)
            nll[span], top[span] = self._nll_rows(span, log_q), rows.argmax(-1)
            for index, reference in enumerate(references):
                kl[index, span] = kl_divergence(log_softmax(reference.logits.read(span)), log_q)
        against = [
            Divergence(r.evaluation, kl[index], top == r.top, self._places) for index, r in enumerate(references)
        ]
        return self._evaluation(candidate, nll, top, against)

    def _nll_rows(self, span: slice, log_q: Doubles) -> Doubles:
        """-log of the probability that each row [V] gave the actual token."""
        log_probabilities: Doubles = np.take_along_axis(log_q, self._targets[span, None], -1)[:, 0]
        return -log_probabilities

    def _predictions(self, candidate: _Candidate, report: Callable[[int], None]) -> Iterator[tuple[slice, Logits]]:
        """Raw logits [n, V] of all predictions in order, a few rows at a time, each with its span of predictions."""
        rows_at_once = max(1, MAX_FLOAT64_VALUES // self._vocab)
        start = 0
        report(start)
        options = {"max_context": self._context, "kv_bits": candidate.kv_bits, **self._options}
        adapters = dict([candidate.adapter] if candidate.adapter else [])
        chosen = next(iter(adapters), None)
        with api.load(candidate.source, adapters=adapters or None, **options) as model:
            for window in self._windows:
                logits = model.logits(window.inputs, chosen)[-len(window.targets) :]
                if not np.isfinite(logits).all():
                    raise GptOssError(
                        f"{candidate.name} gives logits that are not finite: try --dtype float32, or download the "
                        "checkpoint again"
                    )
                for first in range(0, len(logits), rows_at_once):
                    rows = logits[first : first + rows_at_once]
                    yield slice(start + first, start + first + len(rows)), rows
                start += len(logits)
                report(start)

    def _evaluation(
        self, candidate: _Candidate, nll: Doubles, top: NDArray[np.int64], against: Sequence[Divergence] = ()
    ) -> Evaluation:
        summary = candidate.checkpoint.summary()
        return Evaluation(
            model=candidate.name,
            format=summary.format,
            size_bytes=summary.size_bytes,
            bits_per_weight=summary.bits_per_weight,
            context=self._context,
            nll=nll,
            against=tuple(against),
            adapter=candidate.adapter and candidate.adapter[0],
            hits=top == self._targets,
            places=self._places,
        )

    def _require_disk(self, references: int) -> None:
        count, folder = len(self._targets), tempfile.gettempdir()
        needed, free = 4 * references * count * self._vocab, shutil.disk_usage(folder).free
        if needed > free:
            raise GptOssError(
                f"the references' logits for {count} tokens need {gigabytes(needed)}, and {folder} has "
                f"{gigabytes(free)} free: use --max-tokens {free // (5 * references * self._vocab)}, or set TMPDIR to "
                "a folder on a larger disk"
            )
