"""Where `serve --install-service` runs in a test, and `chat` in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_terminal import Terminal
from service_host import Host


@pytest.fixture
def host(tmp_path, monkeypatch) -> Host:
    monkeypatch.setattr(sys, "platform", "linux")
    return Host(tmp_path, monkeypatch)


@pytest.fixture
def mac(host, monkeypatch) -> Host:
    monkeypatch.setattr(sys, "platform", "darwin")
    return host


@pytest.fixture
def chat(tmp_path) -> Iterator[Callable[..., Terminal]]:
    """Starts `chat` in a pseudo-terminal, in a folder and with a history of its own, greedy."""
    opened: list[Terminal] = []

    def start(*words: str | Path, **options: Any) -> Terminal:
        options = {"MLX_GPTOSS_HISTORY": str(tmp_path / "history"), "cwd": tmp_path, **options}
        opened.append(Terminal("--temperature", "0", *words, **options))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()
