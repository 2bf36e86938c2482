"""The custom kernels run on a Mac's GPU with MLX_GPTOSS_TEST_DEVICE=gpu, and elsewhere in the emulator."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import Emulator, compiler
from metal_numbers import wide

ON_GPU = os.environ.get("MLX_GPTOSS_TEST_DEVICE") == "gpu"
# Largest errors, of the largest value: sums in another order; then half a step of the rounded result.
LIMITS = {mx.float32: 4e-6, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}
WORST: dict[str, list[float]] = defaultdict(list)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulator is made for Linux; MLX_GPTOSS_TEST_DEVICE=gpu runs the kernels on a Mac's GPU")
    if compiler() is None:
        pytest.skip("there is no C++ compiler (g++ or clang++) to run Metal's kernels with")
    return Emulator(tmp_path_factory.mktemp("metal"))


@pytest.fixture
def metal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Emulator | None:
    """mx.fast.metal_kernel works: on the GPU, or as the emulator that is returned."""
    if ON_GPU:
        return None
    emulator: Emulator = request.getfixturevalue("compiled")
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    emulator.launches.clear()
    return emulator


@pytest.fixture
def run(metal: Emulator | None) -> Iterator[Callable[..., list[np.ndarray]]]:
    """run(function, *arguments) returns what a kernel returns as float64 arrays; in the emulator it does not depend on
    the order in which threads run."""

    def call(function: Callable[..., Any], *arguments: Any) -> list[np.ndarray]:
        found = as_list(function(*arguments))
        if metal is not None:
            metal.descending = True
            again = as_list(function(*arguments))
            metal.descending = False
            for a, b in zip(found, again, strict=True):
                assert np.array_equal(wide(a), wide(b), equal_nan=True), (
                    "the result depends on the order of the threads"
                )
        return [wide(array) for array in found]

    yield call
    if metal is not None:
        metal.descending = False


@pytest.fixture
def close() -> Callable[..., None]:
    """close(kernel, found, wanted, dtype) fails if a value is further from the exact one than `dtype` explains."""

    def check(kernel: str, found: np.ndarray, wanted: np.ndarray, dtype: mx.Dtype, factor: float = 1.0) -> None:
        assert found.shape == wanted.shape
        error = float(np.abs(found - wanted).max() / (np.abs(wanted).max() or 1.0))
        WORST[f"{kernel}, {str(dtype).rpartition('.')[2]}"].append(error)
        assert error <= factor * LIMITS[dtype], f"relative error {error:.3g}"  # NaN fails

    return check


def as_list(found: Any) -> Sequence[mx.array]:
    return [found] if isinstance(found, mx.array) else [array for array in found if array is not None]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.get_verbosity() > 0 and WORST:
        terminalreporter.section("custom kernels against float64, errors relative to the largest value")
        for kernel, errors in sorted(WORST.items()):
            terminalreporter.write_line(f"{kernel}: {len(errors)} cases, worst error {max(errors):.2g}")
