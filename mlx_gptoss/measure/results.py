"""What an evaluation finds: numbers of every prediction, their means, and the standard errors of those.

Predictions of one document depend on each other, so standard errors are those of documents (of windows, in a document
that has several): the spread of their sums, as for a mean over clusters. Two models are compared on the same
predictions, which removes what is hard for both from the error of the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """Where the predictions are in the text, in its order.

    window: the index of the window that each belongs to [N]. channel: of the assistant's message that the token is in,
    "" for everything else [N]. reply: the index of the assistant's turn at the end of a document that the token is in,
    -1 for none [N].
    """

    window: Integers
    channel: NDArray[np.str_]
    reply: Integers


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error, which is NaN if there is only one window."""

    mean: float
    error: float


def mean_of(values: NDArray[Any], window: Integers | None) -> Mean:
    """The mean of values [N] with its standard error over windows [N]; None counts every value as one of its own."""
    mean = float(values.mean())
    groups = np.arange(len(values)) if window is None else window
    _, index = np.unique(groups, return_inverse=True)
    count = int(index.max()) + 1
    if count < 2:
        return Mean(mean, float("nan"))
    sums = np.bincount(index, values - mean)
    return Mean(mean, float(np.sqrt((sums**2).sum() * count / (count - 1)) / len(values)))


@dataclass(frozen=True)
class Divergence:
    """A model's predictions compared with a reference's, in the order of the text.

    kl: KL(reference || model), the sum over the vocabulary of P log(P / Q), in nats, float64 [N].
    agrees: whether both rank the same token first, bool [N].
    """

    reference: Evaluation
    kl: Doubles = field(repr=False, compare=False)
    agrees: Bools = field(repr=False, compare=False)
    places: Places | None = field(default=None, repr=False, compare=False)

    @property
    def kl_mean(self) -> float:
        return float(self.kl.mean())

    @property
    def kl_error(self) -> float:
        """The standard error of kl_mean."""
        return mean_of(self.kl, self._window).error

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

    def difference(self, other: Divergence) -> Mean:
        """The mean of this model's KL less another model's on the same predictions. Its error is that of the pairs."""
        return mean_of(self.kl - other.kl, self._window)

    def by_channel(self) -> Iterator[tuple[str, Divergence]]:
        """The predictions of each channel that the assistant writes to in the text."""
        if self.places is None:
            return
        for name in sorted(set(self.places.channel.tolist()) - {""}):
            here = self.places.channel == name
            places = Places(self.places.window[here], self.places.channel[here], self.places.reply[here])
            yield name, Divergence(self.reference, self.kl[here], self.agrees[here], places)

    @property
    def _window(self) -> Integers | None:
        return None if self.places is None else self.places.window


@dataclass(frozen=True)
class Evaluation:
    """The predictions of one model on a text.

    context: maximum number of tokens before a prediction. nll: -log(probability) that each prediction gave the actual
    token, in nats, float64 [N]. against: one entry per reference. adapter: name of the LoRA adapter that the model ran
    with; size_bytes and bits_per_weight are without it. hits: whether each prediction ranked the actual token first,
    bool [N].
    """

    model: str
    format: str
    size_bytes: int
    bits_per_weight: float
    context: int
    nll: Doubles = field(repr=False, compare=False)
    against: tuple[Divergence, ...] = ()
    adapter: str | None = None
    hits: Bools | None = field(default=None, repr=False, compare=False)
    places: Places | None = field(default=None, repr=False, compare=False)

    @property
    def label(self) -> str:
        """The model, and with it the adapter."""
        return f"{self.model} + {self.adapter}" if self.adapter else self.model

    @property
    def tokens(self) -> int:
        """Number of predictions."""
        return len(self.nll)

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.mean()))

    @property
    def perplexity_error(self) -> float:
        """The standard error of the perplexity."""
        error = mean_of(self.nll, None if self.places is None else self.places.window).error
        return self.perplexity * error

    @property
    def replies(self) -> tuple[int, int] | None:
        """The replies at the ends of documents that greedy decoding gives token by token, and their number; None if the
        text has none that were predicted whole."""
        if self.hits is None or self.places is None:
            return None
        inside = self.places.reply >= 0
        if not inside.any():
            return None
        _, index = np.unique(self.places.reply[inside], return_inverse=True)
        wrong = np.bincount(index, ~self.hits[inside])
        return int((wrong == 0).sum()), len(wrong)
