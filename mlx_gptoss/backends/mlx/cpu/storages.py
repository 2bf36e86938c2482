"""What kernels are made for: a matrix as it is stored, with the order in which its inputs are read, and attention's
heads.

Legend: K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

UNIT = 32  # K is a multiple of it
Integers = NDArray[np.intp]
ElementType = Literal["float", "e2m1", "e4m3", "uint"]
ScaleType = Literal["e8m0", "e4m3", "bfloat16", "float16", "float32", "none"]
SIZES = {"e8m0": 1, "e4m3": 1, "bfloat16": 2, "float16": 2, "float32": 4, "none": 0}


@dataclass(frozen=True)
class Storage:
    """How a matrix is stored. element: what a code means, or "float" (dense: 16-bit bfloat16 and float16, or 32-bit
    float32). group: weights that share a scale; 0 if they have none. scale: its type, and a dense matrix's own type."""

    element: ElementType
    bits: int
    group: int
    scale: ScaleType

    @property
    def by_words(self) -> bool:
        """Whether codes are read as vectors of 32-bit words, and inputs in the order of `by_words`."""
        return self.element != "float" and self.bits == 4


@dataclass(frozen=True)
class Heads:
    """Of attention. group: query heads that share a KV head. dim: of a head."""

    group: int
    dim: int

    def compiles(self, lanes: int) -> bool:
        """Whether there is a kernel, with vectors of so many lanes: they divide a head's halves. It is written out for
        all dimensions, and a thread's scratch has room for these."""
        return self.group in (1, 2, 4, 8, 16) and self.dim <= 256 and self.dim % (2 * lanes) == 0


def by_words(inputs: int, lanes: int) -> Integers:
    """The order of the inputs [K] for codes of 4 bits: the first of each of `lanes` words, then the second of each, to
    the eighth. What is left over is read in vectors of half as many lanes, down to 4. Shifts by 4 and a look-up then
    decode a vector of words, which no instruction has to widen."""
    order, first = [], 0
    while lanes >= UNIT // 8:
        end = first + (inputs - first) // (8 * lanes) * 8 * lanes
        order.append(np.arange(first, end).reshape(-1, lanes, 8).swapaxes(-1, -2).ravel())
        first, lanes = end, lanes // 2
    return np.concatenate(order)
