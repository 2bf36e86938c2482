"""Calibrate a conversion: choose the codes of all matrices so that the model's outputs change least on a text.

The network is quantized from the embedding table to lm_head. Two copies of the activations go with it from layer to
layer, on disk: those of the original model, and those of the model that is being made. Each matrix is quantized for the
inputs that it will see and for the outputs that the original gives (moments.py, rounding.py, layer.py). In memory are
one layer's attention, or a few experts, and chunks of tokens.

Nothing is drawn at random: the same source, text, program and number formats of BLAS give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..weights import codecs, search
from ..weights.checkpoint import CheckpointLike
from ..weights.tensor import Dense, Quantized
from .calibrated import Calibrated
from .layer import Layer, Streams
from .linear import Matrix, Target
from .memory import CHUNK, HEAD_ROWS, Memory
from .moments import MomentSums
from .network import rms_norm
from .store import Store, part_of
from .text import CalibrationText

Progress = Callable[[int, int, str], None]  # parameters done, parameters in total, what is being done


def calibrate(
    source: CheckpointLike, target: Target, text: CalibrationText, memory: Memory, folder: Path, progress: Progress
) -> Calibrated:
    """The checkpoint with its matrices quantized as `target` says, for convert to write.

    folder: for finished parts and activations; a run that finds those of an interrupted one
    continues after them.
    """
    run = _Run(source, target, text, memory, Store(folder, target.dtype), progress)
    run.run()
    return Calibrated(source, run.store, target.specs)


class _Run:
    def __init__(
        self,
        source: CheckpointLike,
        target: Target,
        text: CalibrationText,
        memory: Memory,
        store: Store,
        progress: Progress,
    ) -> None:
        self.target, self.store = target, store
        self._source, self._text, self._memory, self._progress = source, text, memory, progress
        self._params = {param.name: param for param in source.params}
        self._total = sum(param.size for param in source.params if param.is_matrix)
        self._done = 0

    def run(self) -> None:
        layers = self._source.config.num_hidden_layers
        for part in ("embed", *(f"layer-{layer}" for layer in range(layers)), "head"):
            if self.store.is_done(part):
                self._advance(sum(p.size for p in self._source.params if p.is_matrix and part_of(p) == part), part)
            elif part == "embed":
                self._embed()
            elif part == "head":
                self._head(layers)
            else:
                self._layer(int(part.removeprefix("layer-")))
            self._source.release()

    def _advance(self, parameters: int, part: str) -> None:
        self._done += parameters
        self._progress(self._done, self._total, f"calibrating {part.replace('-', ' ')}")

    def _streams(self, index: int, *, new: bool = False) -> Streams:
        """The input of a layer, or of what comes after the last one."""
        shape = (self._text.tokens, self._source.config.hidden_size) if new else None
        return Streams(*(self.store.stream(name, shape) for name in _names(index)))

    def _embed(self) -> None:
        """The embedding table gets the scales of the least squared error: all its rows count alike."""
        param, writer = self._params["embed.weight"], self.store.begin("embed")
        table = self._source.read(param.name)
        found: Quantized | Dense = Dense(codecs.to_bfloat16(table))
        spec = self.target.specs.get(param.name)
        if spec is not None:
            found = search.quantize(table, spec, self.target.dtype)
            stored = writer.quantized(param, spec)
            assert stored.scale is not None and stored.bias is not None
            stored.codes[...], stored.scale[...], stored.bias[...] = found.codes, found.scale, found.bias
        streams = self._streams(0, new=True)
        ids = np.array([id for window in self._text.windows for id in window])
        for start in range(0, len(ids), CHUNK):
            rows = slice(start, start + CHUNK)
            streams.original[rows] = codecs.dequantize(table[ids[rows]])
            streams.actual[rows] = codecs.dequantize(found[ids[rows]])
        self.store.sync(*_names(0))
        writer.commit()
        self._advance(param.size, "embed")

    def _layer(self, index: int) -> None:
        part, tokens = f"layer-{index}", self._text.tokens
        writer = self.store.begin(part)
        layer = Layer(
            self._source,
            self.target,
            writer,
            index,
            self._text.lengths,
            self._memory,
            lambda name, width: self.store.stream(name, (tokens, width)),
            lambda parameters: self._advance(parameters, part),
        )
        layer.run(self._streams(index), self._streams(index + 1, new=True))
        self.store.sync(*_names(index + 1))
        writer.commit()
        self.store.drop(*_names(index), "normed-a", "normed-b", "mixed-a", "mixed-b")

    def _head(self, layers: int) -> None:
        param, writer = self._params["lm_head.weight"], self.store.begin("head")
        streams, config = self._streams(layers), self._source.config
        matrix = Matrix(self._source, self.target, writer, param, None)
        if matrix.is_calibrated:
            norm = codecs.dequantize(self._source.read("norm.weight"))
            sums = MomentSums(config.hidden_size, with_mean=False, matmul=self.target.matmul)
            for start in range(0, len(streams), CHUNK):
                rows = slice(start, start + CHUNK)
                original, actual = np.asarray(streams.original[rows]), np.asarray(streams.actual[rows])
                sums.add(*(rms_norm(x, norm, config.rms_norm_eps) for x in (original, actual)))
            moments = sums.moments()
            for start in range(0, param.shape[0], HEAD_ROWS):
                rows = slice(start, min(start + HEAD_ROWS, param.shape[0]))
                matrix.finish_rows(moments, rows)
                self._advance((rows.stop - rows.start) * param.shape[1], "head")
        writer.commit()
        self.store.drop(*_names(layers))


def _names(index: int) -> tuple[str, str]:
    return f"original-{index}", f"actual-{index}"
