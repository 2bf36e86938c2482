"""Where a checkpoint departs from a reference: the error of the activations after each layer, computed in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import api
from ..calibration.forward import Forward
from ..errors import CheckpointError, InvalidRequest
from .evaluation import BUNDLED_TEXT
from .passages import read_documents

TOKENS, WINDOW = 2048, 512  # of the text, and of a document, at most


@dataclass(frozen=True)
class LayerError:
    """part: "embed" or "layer 3". own: what this part adds, given the reference's input. total: what has come together
    up to here. Both are the norm of the difference over that of the reference's activations."""

    part: str
    own: float
    total: float


def layer_errors(model: str | Path | None, against: str | Path, text: str | None = None) -> list[LayerError]:
    """The errors of a model's layers on the first TOKENS tokens of a text; None is the text of evaluate().

    Raises InvalidRequest if the two are not of the same sizes, and evaluate()'s errors for the text.
    """
    ours, theirs = (api.open_checkpoint(one) for one in (model, against))
    same = all(a.shape == b.shape for a, b in zip(ours.params, theirs.params, strict=False))
    if not same or len(ours.params) != len(theirs.params):
        raise InvalidRequest(f"{model or 'the bundled model'} and {against} are not of the same sizes")
    tokenizer = theirs.tokenizer()
    if tokenizer is None:
        raise CheckpointError(f"{against} has no tokenizer.json: copy it there from the model's repository")
    windows: list[tuple[int, ...]] = []
    for document in read_documents(BUNDLED_TEXT.read_text("utf-8") if text is None else text, tokenizer):
        left = TOKENS - sum(map(len, windows))
        if left > 0:
            windows.append(document.ids[: min(WINDOW, left)])
    ids, lengths = [id for window in windows for id in window], [len(window) for window in windows]
    return list(_errors(Forward(ours), Forward(theirs), ids, lengths))


def _errors(ours: Forward, theirs: Forward, ids: list[int], lengths: list[int]) -> Iterator[LayerError]:
    wanted, found = theirs.embed(ids), ours.embed(ids)
    yield LayerError("embed", _relative(found, wanted), _relative(found, wanted))
    for index in range(theirs.config.num_hidden_layers):
        alone = ours.layer(index, wanted, lengths)
        wanted, found = theirs.layer(index, wanted, lengths), ours.layer(index, found, lengths)
        yield LayerError(f"layer {index}", _relative(alone, wanted), _relative(found, wanted))


def _relative(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
