"""A folder with a prompt cache, for the tests of its files."""

from __future__ import annotations

from pathlib import Path

import pytest
from cached_prompts import answer, files_in

from mlx_gptoss.engine import prefix_files


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read on a busy machine may take long."""
    monkeypatch.setattr(prefix_files, "READ_TIMEOUT_S", 60.0)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder with the files of KNOWN."""
    assert 0 < answer(tmp_path) < answer(tmp_path)
    assert len(files_in(tmp_path)) > 6
    return tmp_path
