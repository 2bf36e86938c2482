"""What several test files share: the small checkpoints in tests/data, and where the bigger ones may be."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
import pytest

from mlx_gptoss.backends import NVIDIA_DRIVER, find_backend
from mlx_gptoss.errors import BackendUnavailable

if not any(path.exists() for path in NVIDIA_DRIVER):
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels then run on the CPU

if "PYTEST_XDIST_WORKER" in os.environ:  # xdist ignores Ctrl-C in its workers, and a process hands that on
    signal.signal(signal.SIGINT, signal.default_int_handler)

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[1] / ".." / "shared"


@pytest.fixture(scope="session")
def mini() -> Path:
    """Tiny checkpoints that the reference tools wrote, with their reference logits beside them."""
    return DATA / "mini"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Files that are too big for the repository; tests that need one skip where it is absent."""
    return SHARED


@pytest.fixture(scope="session")
def backend_module():
    """A backend's module by its name; the test skips where that cannot be imported."""

    def find(name: str) -> ModuleType:
        try:
            return cast(ModuleType, find_backend(name)[0])
        except BackendUnavailable as error:
            pytest.skip(str(error))

    return find


@pytest.fixture(scope="session")
def relative_error():
    """Largest error over each position's vocabulary, relative to the position's largest logit; the worst position."""

    def worst(got: np.ndarray, wanted: np.ndarray) -> float:
        return float((np.abs(got - wanted).max(axis=-1) / np.abs(wanted).max(axis=-1)).max())

    return worst
