"""Custom Metal kernels, compiled by mx.fast.metal_kernel from the .metal files in this folder.

MLX writes a kernel's signature from the arrays that it is called with, and compiles it at its first use for these
dtypes and template arguments. So an error in a text appears when a result is evaluated, as a RuntimeError.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

FOLDER = Path(__file__).parent
SIMDGROUP = 32  # threads

Template = Sequence[tuple[str, bool | int | mx.Dtype]]
Size = tuple[int, int, int]


class MetalKernel:
    """The kernel whose body is NAME.metal. inputs, outputs: the names of its arrays, in order. header: the name of
    another text, before the function."""

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str], header: str | None = None) -> None:
        self._kernel = mx.fast.metal_kernel(
            name=name,
            input_names=list(inputs),
            output_names=list(outputs),
            source=_text(name),
            header=_text(header) if header else "",
        )

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Template,
        groups: Size,
        threads: int,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """The outputs, of these shapes and dtypes. groups: threadgroups along x, y and z, of `threads` threads each.

        Inputs that are not contiguous are copied first."""
        found: list[mx.array] = self._kernel(  # type: ignore[operator]
            inputs=list(inputs),
            template=list(template),
            grid=(groups[0] * threads, groups[1], groups[2]),
            threadgroup=(threads, 1, 1),
            output_shapes=[tuple(shape) for shape in shapes],
            output_dtypes=list(dtypes),
        )
        return found


def texts_digest() -> str:
    """A short digest of all kernels' texts."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.metal")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _text(name: str) -> str:
    return (FOLDER / f"{name}.metal").read_text(encoding="utf-8")
