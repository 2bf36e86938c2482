"""A server of two models, each in a process of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serving import serving_models

from mlx_gptoss.loading.plan import NANO
from mlx_gptoss.server.run import Server


@pytest.fixture(scope="session")
def two_models(tmp_path_factory) -> dict[str, Path]:
    """Two folders with the bundled model."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("alpha", "beta"):
        shutil.copytree(NANO, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return {name: folder / name for name in ("alpha", "beta")}


@pytest.fixture(scope="module")
def pair(two_models) -> Iterator[Server]:
    with serving_models(two_models, max_context=4096, slots=2, max_waiting=2, prefix_cache=50_000_000) as server:
        yield server


@pytest.fixture(scope="module")
def http(pair) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pair.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def states() -> Callable[[Server], dict[str, str]]:
    """The state of each model, as /health tells it."""

    def ask(server: Server) -> dict[str, str]:
        models = httpx.get(f"{server.url}/health", timeout=60).json()["models"]
        return {model["id"]: model["state"] for model in models}

    return ask


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], bool]], None]:
    """Waits until a condition holds."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return wait
