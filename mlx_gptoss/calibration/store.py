"""What a calibration has finished, on disk: the weights of each part of the network, and the activations before the
next part. A part appears at once, by a rename, so that after an interruption whole parts are there or not.

    FOLDER/
        embed/, layer-0/, ..., head/       NAME.codes.npy, .scale.npy and .bias.npy of a weight; NAME.values.npy
        original-3.npy, actual-3.npy       float32 [T, D], the input of layer 3 in the two models
        copies-3/, then costs/             what is measured for mixed widths (sensitivity.py)
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from ..machine import sync_folder
from ..weights.params import Param
from ..weights.tensor import Array, Dense, Quantized, Spec, Weight


def part_of(param: Param) -> str:
    """The name of the part that a parameter is finished with."""
    return f"layer-{param.layer}" if param.layer is not None else "embed" if param.role == "embed" else "head"


class Store:
    """scale_dtype: of scales and biases of all quantized weights, 16 bits wide."""

    def __init__(self, folder: Path, scale_dtype: np.dtype[Any]) -> None:
        self.folder, self.scale_dtype = folder, scale_dtype
        folder.mkdir(parents=True, exist_ok=True)

    def is_done(self, part: str) -> bool:
        """Whether a part is finished."""
        return (self.folder / part).is_dir()

    def begin(self, part: str) -> PartWriter:
        """A writer of a part's weights. What an interrupted run left of the part is removed."""
        folder = self.folder / f"{part}.unfinished"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return PartWriter(folder, self.folder / part, self.scale_dtype)

    def read(self, param: Param, spec: Spec | None) -> Weight | None:
        """The weight of a parameter as views of its files; None if it is not stored: it stays as in the source.

        spec: of a quantized weight.
        """
        base = self.folder / part_of(param)
        arrays = {
            name: np.load(path, mmap_mode="r")
            for name in ("codes", "scale", "bias", "values")
            if (path := base / f"{param.name}.{name}.npy").exists()
        }
        if "values" in arrays:
            return Dense(arrays["values"])
        if not arrays or spec is None:
            return None
        return Quantized(
            spec, arrays["codes"], arrays["scale"].view(self.scale_dtype), arrays["bias"].view(self.scale_dtype)
        )

    def array(self, part: str, name: str) -> Array:
        """An array of a finished part."""
        found: Array = np.load(self.folder / part / f"{name}.npy", mmap_mode="r")
        return found

    def remove(self, part: str) -> None:
        """Remove a finished part that is no longer needed."""
        shutil.rmtree(self.folder / part, ignore_errors=True)

    def stream(self, name: str, shape: tuple[int, int] | None = None) -> Array:
        """An array of activations on disk, float32: a new one of this shape, or the one that is there."""
        path = self.folder / f"{name}.npy"
        if shape is None:
            found: Array = np.load(path, mmap_mode="r")
            return found
        return open_memmap(path, "w+", np.float32, shape)

    def drop(self, *names: str) -> None:
        """Remove arrays of activations that are no longer needed."""
        for name in names:
            (self.folder / f"{name}.npy").unlink(missing_ok=True)

    def sync(self, *names: str) -> None:
        """Bring arrays of activations to the disk."""
        for name in names:
            _sync(self.folder / f"{name}.npy")


class PartWriter:
    """Writes the weights of one part. From any thread, as long as no two write the same rows."""

    def __init__(self, folder: Path, finished: Path, scale_dtype: np.dtype[Any]) -> None:
        self._folder, self._finished, self._scale_dtype = folder, finished, scale_dtype
        self._arrays: list[Array] = []

    def quantized(self, param: Param, spec: Spec) -> Quantized:
        """A weight to be filled in."""
        *lead, width = param.shape
        grouped = (*lead, width // spec.group)
        codes = self.array(f"{param.name}.codes", np.uint8, (*lead, width * spec.bits // 8))
        scale = self.array(f"{param.name}.scale", np.uint16, grouped)
        bias = self.array(f"{param.name}.bias", np.uint16, grouped)
        return Quantized(spec, codes, scale.view(self._scale_dtype), bias.view(self._scale_dtype))

    def values(self, param: Param) -> Array:
        """A dense parameter to be filled in, float32."""
        return self.array(f"{param.name}.values", np.float32, param.shape)

    def array(self, name: str, dtype: type[Any], shape: tuple[int, ...]) -> Array:
        """An array to be filled in."""
        array: Array = open_memmap(self._folder / f"{name}.npy", "w+", dtype, shape)
        self._arrays.append(array)
        return array

    def commit(self) -> None:
        """Make the part appear, once everything that was filled in is on the disk."""
        for array in self._arrays:
            array.flush()  # type: ignore[attr-defined]
        self._arrays.clear()
        for path in self._folder.iterdir():
            _sync(path)
        sync_folder(self._folder)
        self._folder.rename(self._finished)
        sync_folder(self._finished.parent)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
