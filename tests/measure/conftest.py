"""The tokenizer of the small checkpoints, for texts of an evaluation."""

from __future__ import annotations

import pytest

from mlx_gptoss.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(mini):
    return Tokenizer.from_folder(mini / "mxfp4")
