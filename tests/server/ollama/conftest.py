"""Ollama's own client."""

from __future__ import annotations

import pytest

ollama = pytest.importorskip("ollama", reason="Ollama's API is tested through Ollama's own client")


@pytest.fixture(scope="module")
def client(server):
    return ollama.Client(host=server.url)
