"""Fixtures of the kernel tests: the device, and matrices in every Spec together with their values in float64.

Without a GPU the kernels run under Triton's interpreter (tests/conftest.py switches it on), on CPU tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-gptoss[cuda]')")
pytest.importorskip("triton", reason="triton is not installed (pip install 'mlx-gptoss[cuda]')")

import torch

from mlx_gptoss.backends.cuda.kernels import attention, linear, moe, norm, qkv, quantized_kv, routing, sample
from mlx_gptoss.backends.cuda.kernels.fused import Fused
from mlx_gptoss.backends.cuda.load import fuse
from mlx_gptoss.backends.cuda.matrices import Matrix
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.tensor import FP8_ROW, MXFP4, MXFP8, NVFP4, Dense, Quantized, Spec

AFFINE = [Spec("uint", bits, 64, "float") for bits in (4, 8)]
SPECS = {
    "bfloat16": None,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "mxfp8": MXFP8,
    "fp8": FP8_ROW,
    "affine4": AFFINE[0],
    "affine8": AFFINE[1],
    "affine4-f16": AFFINE[0],
    "affine4-g32": Spec("uint", 4, 32, "float"),
}


@dataclass(frozen=True)
class Stored:
    """A matrix as stored, on the device, and its values, float64 [..., N, K], on the CPU."""

    matrix: Matrix
    values: torch.Tensor


@pytest.fixture(scope="session", autouse=True)
def interpreter_patches_once():
    """Make Triton's interpreter twice as fast.

    It patches triton.language again for every function that a kernel calls, which takes half of its time. Once is
    enough: for the kernel, and for the functions of triton.language itself, which see that module as `core`.
    """
    interpreter, language = pytest.importorskip("triton.runtime.interpreter"), pytest.importorskip("triton.language")
    library = getattr(language.standard.cdiv, "fn", None)
    if library is None or not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope")):
        yield  # another version of Triton, which may patch in another way
        return
    patch, nothing, running = interpreter._patch_lang, interpreter._LangPatchScope, []

    def patch_once(fn):
        if running:
            return nothing()
        running.extend([patch(fn), patch(library)])
        first, restore = running[0], running[0].restore
        first.restore = lambda: (running[1].restore(), running.clear(), restore())
        return first

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Launched:
    """A launch that was not run. options: the kernel's arguments by name, and the compiler's options."""

    kernel: str
    grid: tuple[int, ...]
    options: dict[str, Any]


@pytest.fixture
def no_kernels(monkeypatch) -> list[Launched]:
    """What kernels/ launches; none of it runs, so tensors may be on torch's meta device."""
    launched: list[Launched] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: Any) -> None:
        launched.append(Launched(kernel.fn.__name__, grid, options))

    for module in (attention, linear, moe, norm, qkv, quantized_kv, routing, sample):
        monkeypatch.setattr(module, "launch", launch)
    return launched


@pytest.fixture(scope="session")
def weight():
    """weight(kind, *shape) makes random numbers as stored, a Dense or Quantized: all codes occur, and scales and biases
    of both signs where their type has a sign. exponents: the range of e8m0 codes."""

    def make(kind: str, *shape: int, seed: int = 0, exponents: tuple[int, int] = (118, 126)) -> Dense | Quantized:
        return _weight(np.random.default_rng(seed), kind, shape, exponents)

    return make


@pytest.fixture(scope="session")
def stored(device, weight):
    """stored(kind, *shape) makes such a weight into a matrix as the kernels read it."""

    def make(kind: str, *shape: int, **options: Any) -> Stored:
        made = weight(kind, *shape, **options)
        values = torch.from_numpy(codecs.dequantize(made)).double()
        return Stored(Fused().stored(fuse([made], device)), values)

    return make


def _weight(rng, kind: str, shape: tuple[int, ...], exponents: tuple[int, int]):
    spec = SPECS[kind]
    *lead, width = shape
    if spec is None:
        return Dense((rng.normal(size=shape) / 16).astype(ml_dtypes.bfloat16))
    codes = rng.integers(0, 256, (*lead, width * spec.bits // 8), dtype=np.uint8)
    if spec.element == "e4m3":
        codes[(codes & 127) == 127] = 0  # NaN
    scale = bias = None
    groups = (*lead, width // spec.group) if spec.group else ()
    if spec.scale == "float":
        dtype = np.float16 if kind.endswith("f16") else ml_dtypes.bfloat16
        scale, bias = ((rng.normal(size=groups) / 64).astype(dtype) for _ in "sb")
    elif spec.scale == "e4m3":
        scale = rng.integers(0, 255, groups, dtype=np.uint8)
        scale[(scale & 127) == 127] = 0x80
    elif spec.scale == "e8m0":
        scale = rng.integers(*exponents, groups, dtype=np.uint8)
    outer = None
    if kind == "nvfp4":
        outer = np.float32(2**-9)
    elif kind == "fp8":
        outer = (rng.normal(size=(*lead, 1)) / 256).astype(np.float32)
    return Quantized(spec, codes, scale, bias, outer)


@pytest.fixture(scope="session")
def close():
    """close(got, wanted, tolerance) asserts that no element is off by more than tolerance * max |wanted|."""

    def check(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
        got, wanted = got.double().cpu(), wanted.double().cpu()
        assert got.shape == wanted.shape
        error = float((got - wanted).abs().max() / wanted.abs().max())
        assert error < tolerance, f"relative error {error:.2g}"  # NaN fails

    return check
