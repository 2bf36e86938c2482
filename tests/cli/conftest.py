"""Where `serve --install-service` runs in a test."""

from __future__ import annotations

import sys

import pytest
from service_host import Host


@pytest.fixture
def host(tmp_path, monkeypatch) -> Host:
    monkeypatch.setattr(sys, "platform", "linux")
    return Host(tmp_path, monkeypatch)


@pytest.fixture
def mac(host, monkeypatch) -> Host:
    monkeypatch.setattr(sys, "platform", "darwin")
    return host
