"""How well checkpoints predict a text, and how far their predictions are from a reference's.

`<|endoftext|>` (with the line break after it) ends a document; documents do not see each other. Every token of a
document but its first is predicted once: from all of the document before it where the context allows, else from more
than half a context (windows overlap by half). All numbers are over those predictions.

Memory: one model at a time, the logits of one window (float32 [context, V], by default under 1 GB) and a few of its
rows in float64. A reference's logits wait for the models in a temporary file, 4 V bytes a prediction.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import api
from ..errors import GptOssError, InvalidRequest
from ..loading.memory import gigabytes
from ..tokenizer import Tokenizer
from .passages import Score, Window, read_documents, windows

if TYPE_CHECKING:
    from ..weights.checkpoint import Checkpoint

Source = str | Path | None  # as load() takes it
Progress = Callable[[int, int, str], None]  # predictions done, predictions in all, the model at work
Doubles = NDArray[np.float64]
Logits = NDArray[np.float32]

BUNDLED_TEXT = api.NANO / "eval.txt"  # written by examples/tools/nano_eval_text.py
WINDOW_BYTES = 10**9
MAX_WINDOW = 2048
BLOCK = 2**20  # values of a block of rows in float64


@dataclass(frozen=True)
class Divergence:
    """A model's predictions against a reference's, one by one in the text's order.

    kl: KL(reference || model), the sum over the vocabulary of P log(P / Q), in nats, float64 [N].
    agrees: whether both find the same token the likeliest, bool [N].
    """

    reference: Evaluation
    kl: Doubles = field(repr=False, compare=False)
    agrees: NDArray[np.bool_] = field(repr=False, compare=False)

    @property
    def kl_mean(self) -> float:
        return float(self.kl.mean())

    @property
    def kl_median(self) -> float:
        return float(np.median(self.kl))

    @property
    def kl_p99(self) -> float:
        return float(np.quantile(self.kl, 0.99))

    @property
    def kl_max(self) -> float:
        return float(self.kl.max())

    @property
    def top1_agreement(self) -> float:
        return float(self.agrees.mean())


@dataclass(frozen=True)
class Evaluation:
    """One model on a text.

    context: the most tokens that a prediction was made from. nll: what each prediction gave the token that came,
    as -log(probability), in nats, float64 [N]. against: one entry a reference.
    """

    model: str
    format: str
    size_bytes: int
    bits_per_weight: float
    context: int
    nll: Doubles = field(repr=False, compare=False)
    against: tuple[Divergence, ...] = ()

    @property
    def tokens(self) -> int:
        """Predictions made."""
        return len(self.nll)

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.mean()))


def evaluate(
    *models: Source,
    against: str | Path | Sequence[str | Path] = (),
    text: str | None = None,
    score: Score | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    kv_bits: int | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, ...]:
    """Perplexity of each model on a text and, with `against`, its divergence from each reference.

    models, against: folders or hub ids; without a model the bundled one. All need the same vocabulary.
    text: special tokens written in it are meant. None is a sample of what the bundled model was taught, from
        conversations that it never saw; it says little about other models.
    score: "all" tokens count (the default for a given text), or only "replies" (the default for the bundled one): the
        assistant's messages after the last message of somebody else in each document. It needs Harmony.
    context: tokens; the default is the largest power of two, up to 2048, that keeps a window's logits under 1 GB.
    max_tokens: stop after so many predictions.
    backend, device, dtype: as for load(). kv_bits: too, but of the models alone, not of the references.

    Each reference runs once, then each model once. Raises InvalidRequest for a text with nothing to predict or
    vocabularies that differ, GptOssError for a disk too full or logits that are not finite, and what load() raises.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, not {max_tokens}")
    subjects = [_Subject.open(model, kv_bits) for model in models or (None,)]
    references = [_Subject.open(one) for one in ([against] if isinstance(against, (str, Path)) else against)]
    _require_one_vocabulary([*references, *subjects])
    config = subjects[0].checkpoint.config
    positions = min(s.checkpoint.config.max_position_embeddings for s in (*references, *subjects))
    context = _context(context, config.vocab_size, positions)
    documents = read_documents(
        BUNDLED_TEXT.read_text(encoding="utf-8") if text is None else text,
        subjects[0].tokenizer,
        score or ("replies" if text is None else "all"),
    )
    run = _Run(
        tuple(windows(documents, context, max_tokens)),
        context,
        config.vocab_size,
        {"backend": backend, "device": device, "dtype": dtype},
    )
    return run.passes(subjects, references, progress or (lambda done, total, model: None))


def _context(wanted: int | None, vocab: int, longest: int) -> int:
    if wanted is None:
        fitting = max(1, WINDOW_BYTES // (4 * vocab))
        return min(MAX_WINDOW, longest, 1 << fitting.bit_length() - 1)
    if not 1 <= wanted <= longest:
        raise InvalidRequest(f"the context must be from 1 to the model's {longest} tokens, not {wanted}")
    return wanted


# ---- the models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """A checkpoint to run, its headers read."""

    source: Source
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    kv_bits: int | None

    @classmethod
    def open(cls, source: Source, kv_bits: int | None = None) -> _Subject:
        checkpoint = api.open_checkpoint(source)
        return cls(source, checkpoint, Tokenizer.from_folder(checkpoint.tokenizer_folder), kv_bits)

    @property
    def name(self) -> str:
        return "the bundled model" if self.source is None else str(self.source)


def _require_one_vocabulary(subjects: Sequence[_Subject]) -> None:
    first, *others = subjects
    for other in others:
        if not _same_vocabulary(first, other):
            raise InvalidRequest(
                f"{first.name} and {other.name} have different vocabularies; only the predictions of checkpoints of "
                "one model can be compared"
            )


def _same_vocabulary(a: _Subject, b: _Subject) -> bool:
    one, two = a.tokenizer, b.tokenizer
    return (
        a.checkpoint.config.vocab_size == b.checkpoint.config.vocab_size
        and one.vocab_size == two.vocab_size
        and one.specials == two.specials
        and all(one.token_bytes(id) == two.token_bytes(id) for id in range(one.vocab_size))
    )


@dataclass(frozen=True)
class _Reference:
    """What a reference's pass left: its own numbers, its likeliest tokens [N], and all of its logits."""

    evaluation: Evaluation
    top: NDArray[np.int64]
    logits: _LogitsFile


class _LogitsFile:
    """Raw logits, float32 [N, V], written in order and read back by rows."""

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


class _Run:
    """The passes of one evaluate(): each reference's, then each model's."""

    def __init__(self, windows: Sequence[Window], context: int, vocab: int, options: dict[str, Any]) -> None:
        """options: backend, device and dtype, as for load()."""
        self._windows = windows
        self._context = context
        self._vocab = vocab
        self._options = options
        self._targets = np.array([id for window in windows for id in window.targets])

    def passes(
        self, subjects: Sequence[_Subject], references: Sequence[_Subject], progress: Progress
    ) -> tuple[Evaluation, ...]:
        self._require_disk(len(references))
        total = len(self._targets) * (len(subjects) + len(references))

        def log(passes: int, subject: _Subject) -> Callable[[int], None]:
            return lambda done: progress(passes * len(self._targets) + done, total, subject.name)

        with ExitStack() as stack:
            recorded = []
            for place, reference in enumerate(references):
                file = stack.enter_context(tempfile.TemporaryFile(prefix="mlx-gptoss-"))
                recorded.append(self._record(reference, _LogitsFile(file, self._vocab), log(place, reference)))
            return tuple(
                self._measure(subject, recorded, log(place, subject))
                for place, subject in enumerate(subjects, len(references))
            )

    def _record(self, subject: _Subject, file: _LogitsFile, log: Callable[[int], None]) -> _Reference:
        nll, top = np.empty(len(self._targets)), np.empty(len(self._targets), np.int64)
        for here, rows in self._predictions(subject, log):
            nll[here], top[here] = self._nll_rows(here, log_softmax(rows)), rows.argmax(-1)
            file.append(rows)
        return _Reference(self._evaluation(subject, nll), top, file)

    def _measure(self, subject: _Subject, references: Sequence[_Reference], log: Callable[[int], None]) -> Evaluation:
        nll, top = np.empty(len(self._targets)), np.empty(len(self._targets), np.int64)
        kl = np.empty((len(references), len(self._targets)))
        for here, rows in self._predictions(subject, log):
            log_q = log_softmax(rows)
            nll[here], top[here] = self._nll_rows(here, log_q), rows.argmax(-1)
            for place, reference in enumerate(references):
                kl[place, here] = kl_divergence(log_softmax(reference.logits.read(here)), log_q)
        against = [Divergence(r.evaluation, kl[place], top == r.top) for place, r in enumerate(references)]
        return self._evaluation(subject, nll, against)

    def _nll_rows(self, here: slice, log_q: Doubles) -> Doubles:
        """-log of the probability that each row [V] gave to the token that came."""
        taken: Doubles = np.take_along_axis(log_q, self._targets[here, None], -1)[:, 0]
        return -taken

    def _predictions(self, subject: _Subject, log: Callable[[int], None]) -> Iterator[tuple[slice, Logits]]:
        """The raw logits [n, V] of all predictions in order, a few rows at a time, with their places."""
        at_once = max(1, BLOCK // self._vocab)
        start = 0
        log(start)
        with api.load(subject.source, max_context=self._context, kv_bits=subject.kv_bits, **self._options) as model:
            for window in self._windows:
                logits = model.logits(window.inputs)[-len(window.targets) :]
                if not np.isfinite(logits).all():
                    raise GptOssError(
                        f"{subject.name} gives logits that are not finite: try --dtype float32, or get the checkpoint "
                        "again"
                    )
                for at in range(0, len(logits), at_once):
                    rows = logits[at : at + at_once]
                    yield slice(start + at, start + at + len(rows)), rows
                start += len(logits)
                log(start)

    def _evaluation(self, subject: _Subject, nll: Doubles, against: Sequence[Divergence] = ()) -> Evaluation:
        summary = subject.checkpoint.summary()
        return Evaluation(
            model=subject.name,
            format=summary.format,
            size_bytes=summary.size_bytes,
            bits_per_weight=summary.bits_per_weight,
            context=self._context,
            nll=nll,
            against=tuple(against),
        )

    def _require_disk(self, references: int) -> None:
        count, folder = len(self._targets), tempfile.gettempdir()
        needed, free = 4 * references * count * self._vocab, shutil.disk_usage(folder).free
        if needed > free:
            raise GptOssError(
                f"a reference's predictions of {count} tokens take {gigabytes(needed)} and {folder} has "
                f"{gigabytes(free)} free: use --max-tokens {free // (5 * references * self._vocab)}, or set TMPDIR to "
                "a folder on a larger disk"
            )


# ---- the numbers ---------------------------------------------------------------------------------------------------


def log_softmax(logits: NDArray[np.floating[Any]]) -> Doubles:
    """Natural log-probabilities over the last axis, in float64. Logits must be finite."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def kl_divergence(log_p: Doubles, log_q: Doubles) -> Doubles:
    """KL(P || Q) in nats over the last axis, of natural log-probabilities. Never below 0, where rounding may put it."""
    divergence: Doubles = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return np.maximum(divergence, 0.0)
