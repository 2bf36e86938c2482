from __future__ import annotations

import pytest


@pytest.fixture
def neon(monkeypatch, tmp_path):
    """Arm's processors: compiles kernels for them, and runs them where QEMU is installed."""
    from cpu_targets import Neon

    return Neon(monkeypatch, tmp_path)
