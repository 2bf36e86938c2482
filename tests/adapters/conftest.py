"""A tiny random model with PEFT adapters of every kind and PEFT's own logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

IDS = np.random.default_rng(3).integers(0, 100, 40).tolist()  # longer than the window of 8


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The checkpoint of the tiny model."""
    from tiny_peft import save_base, tiny_model

    return save_base(tiny_model(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def made_by_peft(tmp_path_factory):
    """made_by_peft(case): an adapter's folder and PEFT's logits of IDS. Each is made once."""
    pytest.importorskip("peft", reason="needs peft: pip install --no-deps peft accelerate")
    from tiny_peft import CASES, logits, make_adapter, tiny_model

    found: dict[str, tuple[Path, np.ndarray]] = {}

    def make(case: str) -> tuple[Path, np.ndarray]:
        if case not in found:
            folder = tmp_path_factory.mktemp("adapters") / case.replace(" ", "-")
            model = make_adapter(tiny_model(), folder, seed=2 + list(CASES).index(case), **CASES[case])
            found[case] = folder, logits(model, IDS)
        return found[case]

    return make


@pytest.fixture(scope="session")
def ids() -> list[int]:
    return IDS
