"""A real server with the bundled model, in a thread on the loopback, and clients for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import mlx_gptoss

openai = pytest.importorskip("openai", reason="the server is tested through OpenAI's own client")
from serving import serving  # noqa: E402

from mlx_gptoss.server.run import Server  # noqa: E402

SLOTS = 4


@pytest.fixture(scope="session")
def model() -> Iterator[mlx_gptoss.Model]:
    with mlx_gptoss.load(slots=SLOTS, max_context=4096) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def server(model: mlx_gptoss.Model) -> Iterator[Server]:
    with serving(model) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    """serving(), for tests that need a server of their own."""
    return serving


@pytest.fixture(scope="session")
def idle() -> Callable[[Server], bool]:
    """Waits deadline a server has no request and no slot in use, and returns whether it got there."""

    def busy(server: Server) -> bool:
        service = server.service
        return bool(
            service.open_queues
            or service.running_responses
            or service.gate.buffered_bytes
            or service.model.status.running
        )

    def wait(server: Server) -> bool:
        deadline = time.monotonic() + 60
        while busy(server) and time.monotonic() < deadline:
            time.sleep(0.002)
        return not busy(server)

    return wait
